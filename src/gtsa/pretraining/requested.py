"""What a pretraining run is asked for: the settings given, over those of the demo or of the run that goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gtsa.core import files
from gtsa.core.errors import UserError, speaks
from gtsa.core.settings import differences, merged, read_yaml, validated
from gtsa.core.terminal import say
from gtsa.pretraining.settings import MethodSettings, Pretrain
from gtsa.training import checkpoint

SAMPLE = Path(__file__).parents[1] / "data" / "sample"
FREE_TO_CHANGE = {  # on --resume; everything else decides what is learnt
    "out", "resume", "overwrite", "data", "data_root", "devices", "nodes", "device", "workers", "log_every",
    "checkpoint_every", "evaluate_every", "keep_checkpoints", "eval", "eval_train", "eval_val", "eval_folds",
    "eval_config", "keep_best", "max_bad", "steps", "epochs", "accumulate", "deterministic", "plan",
}  # fmt: skip


def described(data: Any) -> str:
    """``data`` as config.yaml tells it: a path, from wherever it is resumed, or words for what is no path."""
    if isinstance(data, str | os.PathLike):
        return os.path.abspath(data) if os.path.exists(data) else os.fspath(data)
    if not hasattr(data, "__len__"):
        raise UserError(f"data: a folder, a list file or a map-style dataset, not a {type(data).__name__}")
    return f"<{type(data).__name__} of {len(data)} items>"


def requested_settings(given: Mapping[str, Any], tell: bool = True) -> Any:
    """Settings as asked for: over the demo where there is no data, over the run's own where it is resumed.

    ``tell``: changes of a resumed run are shown.

    Raises:
        UserError: a setting is wrong, is missing, or differs from the run's own (2), the run's own are damaged (4), or
            the data would be removed (8).
    """
    base: dict[str, Any] = {}
    out = given.get("out")
    own = None
    if isinstance(out, str | os.PathLike):
        given = {**given, "out": os.fspath(out)}
        own = settings_of(Path(out), tell) if given.get("resume") else None
    if own is not None:
        base, given = own, _settled(given)
        new = validated(Pretrain, merged(base, given))
        old = validated(Pretrain, base)
        changes = differences(old, new)
        if differing := [line for line in changes if line.split(":")[0] not in FREE_TO_CHANGE]:
            raise UserError(
                "--resume goes on with the same settings; these differ:\n  "
                + "\n  ".join(differing)
                + "\nleave them out, or start another run with --init and another --out"
            )
        for line in changes:
            if tell and speaks() and line.split(":")[0] not in ("out", "resume", "plan"):
                say(f"changed: {line}")
        return new
    if given.get("resume") and given.get("data") is None:
        if out and (Path(out) / "images.jsonl").exists():
            told = f"--resume: {out}/config.yaml is gone; bring it back, or give the run's settings and --data again"
            raise UserError(told, 4)
        if tell and speaks():
            say(f"there is no run in {out} yet: starting one, on the sample that comes with gtsa")
    if given.get("data") is None:
        base = read_yaml(SAMPLE / "demo.yaml") | {"data": str(SAMPLE / "images")}
    new = validated(Pretrain, merged(base, given))
    if tell and speaks() and (idle := _without_effect(new)):
        say(f"without effect, as the method is {new.method}: {', '.join(idle)}")
    if new.out is None and new.plan:
        return new
    if new.out is None:
        raise UserError("--out is missing: name a folder for the run")
    for name in ("data", "init"):
        place = os.path.realpath(getattr(new, name) or os.devnull)
        if new.overwrite and os.path.commonpath([place, os.path.realpath(new.out)]) == os.path.realpath(new.out):
            raise UserError(
                f"--{name} {getattr(new, name)} lies inside --out, which is to be overwritten; move either", 8
            )
    return new


def written(settings: Any) -> dict[str, Any]:
    """Settings as a checkpoint keeps them: plain values for JSON."""
    return dict(json.loads(settings.model_dump_json(exclude={"resume", "overwrite", "plan"})))


def settings_of(out: Path, tell: bool = True) -> dict[str, Any] | None:
    """The settings of the run in ``out``, or None where there is none.

    config.yaml says them, if it is what was written last: its seal is right, and what must not change is as the newest
    checkpoint keeps it. Where it is gone the checkpoint says them (and ``tell`` shows that).

    Raises:
        UserError: config.yaml is damaged, or another run's (4).
    """
    where, kept = out / "config.yaml", _kept(out / "checkpoints")
    if not where.is_file():
        if kept is None:
            return None
        if tell:
            say(f"{where} is gone: the settings are those that the newest checkpoint keeps")
        return dict(kept.model_dump())
    seal = files.is_sealed(where.read_bytes())
    if kept is None and seal is None and not _unsealed_but_whole(out):
        raise UserError(f"{where} is damaged, and there is no checkpoint yet: start anew with --overwrite", 4)
    try:
        base = read_yaml(where, schema=1)
        now = validated(Pretrain, base) if kept else None
    except UserError as remedy:
        if kept is None and seal is not False:
            raise
        raise _damaged(where, [str(remedy)], kept) from None
    lines = differences(kept, now) if kept and now else []
    if seal:
        lines = [line for line in lines if line.split(":")[0] not in FREE_TO_CHANGE]
    lines = [line for line in lines if line.split(":")[0] not in ("out", "resume", "overwrite")]
    if lines or (seal is False and kept is None):
        raise _damaged(where, lines, kept)
    return base


def _kept(checkpoints: Path) -> Any:
    """The settings that the newest checkpoint keeps; None where there is none, or one of before they were kept."""
    found = checkpoint.newest_state(checkpoints).get("settings")
    try:
        return None if found is None else validated(Pretrain, found)
    except (UserError, TypeError):  # another version's
        return None


def _unsealed_but_whole(out: Path) -> bool:
    """Whether config.yaml may lack its seal: a run of before there was one, or a file that a user put there."""
    return any((out / "checkpoints").glob("step-*")) or not (out / "images.jsonl").exists()


def _damaged(where: Path, lines: list[str], kept: Any) -> UserError:
    told = "\n  ".join(["", *lines]) if lines else " (its last line, a checksum of the others, does not fit)"
    way = "bring it back"
    if kept is not None:
        way += ", or remove it: --resume then takes the settings that the newest checkpoint keeps"
    return UserError(
        f"{where} is not what the run was started with:{told}\n{way}. Settings are changed on the command line, not in "
        "this file",
        4,
    )


def _settled(given: Mapping[str, Any]) -> dict[str, Any]:
    """``given`` without what is left to us: that was resolved when the run began, and stays as it was."""
    found = {key: _settled(value) if isinstance(value, Mapping) else value for key, value in given.items()}
    return {key: value for key, value in found.items() if not (isinstance(value, str) and value == "auto")}


def _without_effect(settings: Any) -> list[str]:
    """Settings of other methods that were given another value than their own."""
    sections = {name: getattr(settings, name) for name in MethodSettings if name != settings.method}
    return [
        line.split(":")[0]
        for name, section in sections.items()
        for line in differences(type(section)(), section, f"{name}.")
    ]
