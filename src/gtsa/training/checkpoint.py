"""Checkpoints that are whole or absent: safetensors and JSON under a SHA-256 manifest, never a pickle.

    checkpoints/step-00000100/
        *.safetensors   tensors
        state.json      everything else the next step needs
        manifest.json   size and SHA-256 of each file above

A checkpoint is written to a hidden folder beside its place, flushed to the disk, renamed, and read back; only then
are older ones removed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from gtsa.core import files
from gtsa.core.errors import UserError
from gtsa.core.migration import SCHEMA, migrated

if TYPE_CHECKING:  # a command line that is wrong is answered without torch
    from torch import Tensor

Tensors: TypeAlias = "Mapping[str, Mapping[str, Tensor]]"  # {file stem: {name: tensor}}
FORMAT = 1
MANIFEST, STATE = "manifest.json", "state.json"
NAME = re.compile(r"step-(\d{8,})")
LEFT = re.compile(r"\.(draft|old)-\d{8,}-\d+")  # by an interrupted save


class Damaged(Exception):
    """A checkpoint that is not what was written; the message says what is wrong with it."""


def write(folder: Path, step: int, tensors: Tensors, state: Mapping[str, Any], keep: int = 2) -> Path:
    """Writes the checkpoint of ``step`` into ``folder`` and leaves it there with the ``keep`` - 1 before it.

    Only one process may write into a folder at a time.

    Raises:
        UserError: the disk is full or refuses (6), or something else lies in its place (8); what was there before is
            untouched.
    """
    import safetensors.torch

    place, draft = folder / name(step), folder / f".draft-{step:08d}-{os.getpid()}"
    if os.path.lexists(place) and not is_ours(place):
        raise UserError(in_the_way(place), 8)
    try:
        folder.mkdir(exist_ok=True)
        clear(folder)
        draft.mkdir()
        listed = {}
        for stem, group in tensors.items():
            tidy = {key: tensor.detach().cpu().contiguous() for key, tensor in group.items()}
            listed[f"{stem}.safetensors"] = _store(draft / f"{stem}.safetensors", safetensors.torch.save(tidy))
        listed[STATE] = _store(draft / STATE, _json({"schema": SCHEMA, "step": step, **state}))
        _store(draft / MANIFEST, _json({"format": FORMAT, "files": listed}))
        files.flush(draft)
        if place.exists():  # the same step again, from a run that went back to an older checkpoint
            place.rename(folder / f".old-{step:08d}-{os.getpid()}")
        draft.rename(place)
        files.flush(folder)
        verify(place)
    except (OSError, Damaged) as error:
        shutil.rmtree(draft, ignore_errors=True)
        safe = max((p.name for p in listing(folder) if p != place), default="none")
        raise UserError(
            f"the checkpoint of step {step} could not be saved in {folder}: {error}; the newest that is safe there: "
            f"{safe}. Make room or choose another disk, then go on with --resume",
            6,
        ) from None
    ours = [other for other in listing(folder) if is_ours(other)]
    older = [other for other in ours if _step(other) < step]
    for other in ours:  # newer ones are damaged: a run that went back behind them has left them ahead of it
        if other != place and other not in older[: keep - 1]:
            remove(other)
    clear(folder)
    return place


def name(step: int) -> str:
    """Of a step's folder."""
    return f"step-{step:08d}"


def listing(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, newest first, whole or not; links, and what holds no file of ours, are none."""
    found = [place for place in folder.glob("step-*") if NAME.fullmatch(place.name) and _holds_ours(place)]
    return sorted(found, key=_step, reverse=True)


def strangers(folder: Path) -> list[Path]:
    """What lies in ``folder`` under the name of a checkpoint and is none of ours: it is never removed."""
    return sorted(place for place in folder.glob("step-*") if not is_ours(place))


def in_the_way(place: Path) -> str:
    """What to tell of a stranger in the place of a checkpoint to come."""
    return f"{place} is no checkpoint of gtsa, and one is to be written there; move it away, then go on with --resume"


def is_ours(place: Path) -> bool:
    """Whether a folder has our manifest, damaged or not; only then it may be removed."""
    if not NAME.fullmatch(place.name) or not _holds_ours(place) or not (place / MANIFEST).is_file():
        return False
    try:
        manifest = json.loads((place / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return True
    return isinstance(manifest, dict) and {"format", "files"} <= manifest.keys()


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, and a line for each newer one that is not."""
    problems = []
    for place in listing(folder):
        try:
            verify(place)
        except Damaged as damage:
            problems.append(f"{place.name} is damaged ({damage})")
        else:
            return place, problems
    return None, problems


def verify(place: Path) -> None:
    """Raises Damaged unless every byte of the checkpoint is as it was written."""
    try:
        for file, expected in _manifest(place).items():
            if _digest(place / file) != expected:
                raise Damaged(f"{file} was changed or cut short")
        if name(json.loads((place / STATE).read_bytes())["step"]) != place.name:
            raise Damaged("it is another step's")
    except OSError as error:
        raise Damaged(f"{Path(error.filename or place).name}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{MANIFEST} or {STATE} cannot be read: {error}") from None


def read(place: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Tensors and state of a verified checkpoint: of the files that its manifest lists, and no others."""
    import safetensors.torch

    listed = [Path(file) for file in sorted(_manifest(place))]
    tensors = {f.stem: safetensors.torch.load_file(place / f) for f in listed if f.suffix == ".safetensors"}
    return tensors, _state(place)


def newest_state(folder: Path) -> dict[str, Any]:
    """The state of the newest checkpoint that has a whole one, without a look at its tensors; empty where none has."""
    for place in listing(folder):
        with suppress(OSError, Damaged, ValueError, KeyError):
            if _digest(place / STATE) == _manifest(place)[STATE]:
                return _state(place)
    return {}


def _state(place: Path) -> dict[str, Any]:
    """The state under the names of today."""
    state = json.loads((place / STATE).read_bytes())
    schema = state.get("schema", 1)
    if "settings" in state:
        state["settings"] = migrated(state["settings"], schema, str(place))
    return migrated(state, schema, str(place))


@contextmanager
def understood(place: Path) -> Iterator[None]:
    """Makes a UserError (4) of what a whole checkpoint lacks that this version needs, or holds in another form."""
    try:
        yield
    except UserError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if "DefaultCPUAllocator" in str(error) or type(error).__name__ == "OutOfMemoryError":
            raise
        what = f"it has no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:200]
        raise UserError(
            f"{place} is whole, but not what this version of gtsa writes ({what}): use the version that wrote it, or "
            "start anew in another folder",
            4,
        ) from None


def remove(place: Path) -> None:
    """Removes a checkpoint of ours: the files that its manifest lists, or the usual ones. Others stay."""
    try:
        listed = list(_manifest(place))
    except (OSError, ValueError, Damaged):
        listed = [*(file.name for file in place.glob("*.safetensors")), STATE]
    for file in (*listed, MANIFEST):
        with suppress(IsADirectoryError):
            (place / file).unlink(missing_ok=True)
    with suppress(OSError):  # it holds something else
        place.rmdir()


def clear(folder: Path) -> None:
    """Removes what an interrupted save has left."""
    for left in folder.glob(".*-*"):
        if LEFT.fullmatch(left.name) and left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)


def _manifest(place: Path) -> dict[str, Any]:
    """{file: size and SHA-256}."""
    raw = (place / MANIFEST).read_bytes()
    try:
        manifest = json.loads(raw)
        listed: dict[str, Any] = manifest["files"]
        if raw != _json(manifest) or manifest["format"] != FORMAT or any(Path(file).name != file for file in listed):
            raise Damaged(f"{MANIFEST} was changed, or written by another version")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{MANIFEST} cannot be read: {error}") from None
    return listed


def _holds_ours(place: Path) -> bool:
    if place.is_symlink() or not place.is_dir():
        return False
    return (place / MANIFEST).exists() or (place / STATE).exists() or any(place.glob("*.safetensors"))


def _step(place: Path) -> int:
    return int(place.name.removeprefix("step-"))


def _store(path: Path, data: bytes) -> dict[str, Any]:
    return {"bytes": len(data), "sha256": files.write(path, data)}


def _digest(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": files.digest(path)}


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True).encode() + b"\n"
