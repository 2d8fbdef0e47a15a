"""The requested settings of a run: those given, over those of the demo or of the run that is resumed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gtsa.core import files
from gtsa.core.errors import UserError, is_first_process
from gtsa.core.files import IMAGES
from gtsa.core.migration import completed
from gtsa.core.settings import differences, merged, validated
from gtsa.core.settings_file import read_yaml
from gtsa.core.terminal import say
from gtsa.data.shards import storage
from gtsa.pretraining.settings import METHODS, MethodSettings, Pretrain
from gtsa.training import checkpoint

SAMPLE = Path(__file__).parents[1] / "data" / "sample"
FREE_TO_CHANGE = {  # on --resume; all others decide what is learnt
    "out", "resume", "overwrite", "data", "data_root", "devices", "nodes", "shard", "device", "workers", "log_every",
    "loggers", "checkpoint_every", "evaluate_every", "keep_checkpoints", "eval", "eval_train", "eval_val", "eval_folds",
    "eval_config", "keep_best", "max_bad", "steps", "epochs", "accumulate", "compile",
    "activation_checkpointing", "deterministic", "report", "plan",
}  # fmt: skip


def describe(data: object) -> str:
    """``data`` as config.yaml names it: an absolute path, or a description of what is no path."""
    if isinstance(data, str | os.PathLike):
        path = os.fspath(data)
        return os.path.abspath(path) if os.path.exists(path) or storage.is_pattern(path) else path
    if not hasattr(data, "__len__"):
        raise UserError(f"data: a folder, a list file or a map-style dataset, not a {type(data).__name__}")
    return f"<{type(data).__name__} of {len(data)} items>"


def requested_settings(given: Mapping[str, object], show: bool = True) -> Pretrain:
    """The settings given: over those of the demo where there is no data, over the run's own where it is resumed.

    Args:
        show: print the changes of a resumed run, and settings without effect.

    Raises:
        UserError: a setting is wrong, is missing, or differs from the run's own; there is no run to resume, and no
            data for a new one (2); the run's own settings are damaged (4); the data would be removed (8).
    """
    show = show and is_first_process()
    out = given.get("out")
    if isinstance(out, str | os.PathLike):
        given = {**given, "out": os.fspath(out)}
        saved = settings_of(Path(out), show) if given.get("resume") else None
        if saved is not None:
            return _resume_settings(saved, given, show)
    if given.get("resume") and given.get("data") is None:
        raise _no_run_error(out)
    base: dict[str, Any] = {}
    if given.get("data") is None:
        base = read_yaml(SAMPLE / "demo.yaml") | {"data": str(SAMPLE / "images")}
    settings = validated(Pretrain, merged(base, given))
    if show and (names := _without_effect(settings)):
        say(f"without effect, as the method is {settings.method}: {', '.join(names)}")
    for line in _idle(settings) if show else ():
        say(line)
    if settings.out is None and not settings.plan:
        raise UserError("--out is missing: name a folder for the run")
    _check_overwrite(settings)
    return settings


def _resume_settings(saved: Mapping[str, Any], given: Mapping[str, object], show: bool) -> Pretrain:
    """The settings given, over those that the run has ``saved``."""
    settings = validated(Pretrain, merged(saved, _without_auto(given)))
    changes = differences(validated(Pretrain, saved), settings)
    if fixed := [line for line in changes if line.split(":")[0] not in FREE_TO_CHANGE]:
        raise UserError(
            "--resume continues with the same settings; these differ:\n  "
            + "\n  ".join(fixed)
            + "\nleave them out, or start another run with --init and another --out"
        )
    for line in changes:
        if show and line.split(":")[0] not in ("out", "resume", "plan", "shard"):
            say(f"changed: {line}")
    return settings


def _no_run_error(out: object) -> UserError:
    """The error of --resume without --data, where ``out`` holds no settings of a run."""
    if not isinstance(out, str | os.PathLike):
        return UserError("--out is missing: --resume needs the folder of the run")
    if (Path(out) / IMAGES).exists():
        return UserError(
            f"--resume: {out}/config.yaml is missing; restore it, or give the run's settings and --data again", 4
        )
    return UserError(f"--resume: there is no run in {os.fspath(out)}; check --out, or give --data to start a run there")


def _check_overwrite(settings: Pretrain) -> None:
    """Raises UserError where --overwrite would remove the data or given weights (8)."""
    if not settings.overwrite or settings.out is None:
        return
    out = os.path.realpath(settings.out)
    for name, value in ({"data": settings.data, "init": settings.init} | settings.given_weights).items():
        if os.path.commonpath([os.path.realpath(value or os.devnull), out]) == out:
            raise UserError(f"--{name} {value} lies inside --out, which is to be overwritten; move either", 8)


def plain_values(settings: Pretrain) -> dict[str, Any]:
    """Settings as a checkpoint holds them: plain values for JSON."""
    values: dict[str, Any] = json.loads(settings.model_dump_json(exclude={"resume", "overwrite", "plan", "shard"}))
    return values


def settings_of(out: Path, show: bool = True) -> dict[str, Any] | None:
    """The settings of the run in ``out``; None where there is no run.

    They are read from config.yaml. It must be what was written last: its seal fits, and settings that must not change
    are those of the newest checkpoint. If config.yaml is missing they are read from the checkpoint (and ``show`` prints
    that).

    Raises:
        UserError: config.yaml is damaged, or is that of another run (4).
    """
    path, kept = out / "config.yaml", _settings_of_checkpoint(out / "checkpoints")
    if not path.is_file():
        if kept is None:
            return None
        if show:
            say(f"{path} is missing: using the settings in the newest checkpoint")
        return dict(kept.model_dump())
    seal = files.is_sealed(path.read_bytes())
    if kept is None and seal is None and not _may_lack_seal(out):
        raise UserError(f"{path} is damaged, and there is no checkpoint yet: start anew with --overwrite", 4)
    try:
        saved = completed(read_yaml(path, schema=1))
        settings = validated(Pretrain, saved) if kept else None
    except UserError as error:
        if kept is None and seal is not False:
            raise
        raise _damaged_config_error(path, [str(error)], kept) from None
    lines = differences(kept, settings) if kept and settings else []
    if seal:
        lines = [line for line in lines if line.split(":")[0] not in FREE_TO_CHANGE]
    lines = [line for line in lines if line.split(":")[0] not in ("out", "resume", "overwrite")]
    lines = [line for line in lines if ": auto, now " not in line]  # the checkpoint's version lacked the setting
    if lines or (seal is False and kept is None):
        raise _damaged_config_error(path, lines, kept)
    return saved


def _settings_of_checkpoint(checkpoints: Path) -> Pretrain | None:
    """The settings in the newest checkpoint; None where there is none, or one from before they were saved."""
    values = checkpoint.newest_state(checkpoints).get("settings")
    try:
        return None if values is None else validated(Pretrain, completed(values))
    except (UserError, TypeError):  # another version's
        return None


def _may_lack_seal(out: Path) -> bool:
    """Whether config.yaml may lack its seal: a run from before there were seals, or a file that a user put there."""
    return any((out / "checkpoints").glob("step-*")) or not (out / IMAGES).exists()


def _damaged_config_error(path: Path, lines: list[str], kept: Pretrain | None) -> UserError:
    details = "\n  ".join(["", *lines]) if lines else " (its last line, a checksum of the others, does not fit)"
    action = "restore it"
    if kept is not None:
        action += ", or remove it: --resume then uses the settings in the newest checkpoint"
    return UserError(
        f"{path} is not what the run was started with:{details}\n{action}. Settings are changed on the command "
        "line, not in this file",
        4,
    )


def _without_auto(given: Mapping[str, object]) -> dict[str, object]:
    """``given`` without values that are auto: the run has resolved them when it began."""
    values = {key: _without_auto(value) if isinstance(value, Mapping) else value for key, value in given.items()}
    return {key: value for key, value in values.items() if not (isinstance(value, str) and value == "auto")}


def _without_effect(settings: Pretrain) -> list[str]:
    """Settings of other methods that differ from their defaults."""
    sections = {name: getattr(settings, name) for name in MethodSettings if name != settings.method}
    return [
        line.split(":")[0]
        for name, section in sections.items()
        for line in differences(type(section)(), section, f"{name}.")
    ]


def _idle(settings: Pretrain) -> list[str]:
    """A line for each setting of the method that was changed, but has no effect beside other settings."""
    lines, options, method = [], settings.options, settings.method
    changed = {key for key, value in MethodSettings[method]() if value != options[key]}
    for name, conditions in METHODS[method].constants["idle_settings"].items():
        if name in changed and all(options[key] in values for key, values in conditions.items()):
            reasons = " and ".join(f"{method}.{key} is {options[key]}" for key in conditions)
            lines.append(f"without effect, as {reasons}: {method}.{name}")
    return lines
