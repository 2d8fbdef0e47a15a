"""What a pretraining run is asked for: the settings given, over those of the demo or of the run that goes on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gtsa import config, strict
from gtsa.errors import Remedy
from gtsa.terminal import say

SAMPLE = Path(__file__).parent / "sample"
FREE_TO_CHANGE = {  # on --resume; everything else decides what is learnt
    "out", "resume", "overwrite", "data", "data_root", "devices", "nodes", "device", "workers", "log_every",
    "checkpoint_every", "evaluate_every", "keep", "eval", "eval_train", "eval_val", "eval_folds", "eval_config",
    "keep_best", "max_bad", "steps", "epochs", "accumulate", "deterministic",
}  # fmt: skip


def described(data: Any) -> str:
    """``data`` as config.yaml tells it: a path, from wherever it is resumed, or words for what is no path."""
    if isinstance(data, str | os.PathLike):
        return os.path.abspath(data) if os.path.exists(data) else os.fspath(data)
    if not hasattr(data, "__len__"):
        raise Remedy(f"data: a folder, a list file or a map-style dataset, not a {type(data).__name__}")
    return f"<{type(data).__name__} of {len(data)} items>"


def asked(given: Mapping[str, Any], tell: bool = True) -> Any:
    """Settings as asked for: over the demo where there is no data, over the run's own where it is resumed.

    ``tell``: changes of a resumed run are shown.

    Raises:
        Remedy: a setting is wrong, is missing, or differs from the run's own (2), or the data would be removed (8).
    """
    base: dict[str, Any] = {}
    out = given.get("out")
    where = None
    if isinstance(out, str | os.PathLike):
        where, given = Path(out) / "config.yaml", {**given, "out": os.fspath(out)}
    if given.get("resume") and where and where.is_file():
        base, given = strict.read_yaml(where), _settled(given)
        new = strict.validated(config.Pretrain, strict.merged(base, given))
        old = strict.validated(config.Pretrain, base)
        changes = strict.differences(old, new)
        if differing := [line for line in changes if line.split(":")[0] not in FREE_TO_CHANGE]:
            raise Remedy(
                "--resume goes on with the same settings; these differ:\n  "
                + "\n  ".join(differing)
                + "\nleave them out, or start another run with --init and another --out"
            )
        for line in changes:
            if tell and line.split(":")[0] not in ("out", "resume") and os.environ.get("LOCAL_RANK", "0") == "0":
                say(f"changed: {line}")
        return new
    if given.get("resume") and given.get("data") is None:
        raise Remedy(f"--resume: there is no run in {out}; mind its name, or give --data to start one")
    if given.get("data") is None:
        base = strict.read_yaml(SAMPLE / "demo.yaml") | {"data": str(SAMPLE / "images")}
    new = strict.validated(config.Pretrain, strict.merged(base, given))
    if new.out is None:
        raise Remedy("--out is missing: name a folder for the run")
    for name in ("data", "init"):
        place = os.path.realpath(getattr(new, name) or os.devnull)
        if new.overwrite and os.path.commonpath([place, os.path.realpath(new.out)]) == os.path.realpath(new.out):
            raise Remedy(f"--{name} {getattr(new, name)} lies inside --out, which is to be overwritten; move either", 8)
    return new


def _settled(given: Mapping[str, Any]) -> dict[str, Any]:
    """``given`` without what is left to us: that was resolved when the run began, and stays as it was."""
    found = {key: _settled(value) if isinstance(value, Mapping) else value for key, value in given.items()}
    return {key: value for key, value in found.items() if not (isinstance(value, str) and value == "auto")}
