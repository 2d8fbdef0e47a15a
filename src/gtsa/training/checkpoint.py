"""Checkpoints that are whole or absent: safetensors and JSON under a SHA-256 manifest, never a pickle.

    checkpoints/step-00000100/
        *.safetensors   tensors
        state.json      everything else the next step needs
        manifest.json   size and SHA-256 of each file above

A checkpoint is written to a hidden folder beside its own, flushed to the disk, renamed, and read back. Only then are
older ones removed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict

from gtsa.core import files
from gtsa.core.errors import UserError
from gtsa.core.migration import SCHEMA, migrated

if TYPE_CHECKING:  # a wrong command line is answered without torch
    from torch import Tensor

Tensors: TypeAlias = "Mapping[str, Mapping[str, Tensor]]"  # {file stem: {name: tensor}}
FORMAT = 1
MANIFEST, STATE = "manifest.json", "state.json"
NAME = re.compile(r"step-(\d{8,})")
LEFT = re.compile(r"\.(draft|old)-\d{8,}-\d+")  # what an interrupted save leaves


class FileEntry(TypedDict):
    """A file in the manifest."""

    bytes: int
    sha256: str


class Damaged(Exception):
    """A checkpoint differs from what was written; the message says how."""


def write(folder: Path, step: int, tensors: Tensors, state: Mapping[str, object], keep: int = 2) -> Path:
    """Writes the checkpoint of ``step`` into ``folder``, and removes all but it and the ``keep`` - 1 before it.

    Only one process may write into a folder at a time.

    Raises:
        UserError: the disk is full or cannot be written (6), or a folder that is no checkpoint has its name (8). The
            checkpoints from before are unchanged.
    """
    import safetensors.torch

    path, draft = folder / name(step), folder / f".draft-{step:08d}-{os.getpid()}"
    if os.path.lexists(path) and not is_ours(path):
        raise UserError(obstruction(path), 8)
    try:
        folder.mkdir(exist_ok=True)
        clear(folder)
        draft.mkdir()
        entries: dict[str, FileEntry] = {}
        for stem, group in tensors.items():
            contiguous = {key: tensor.detach().cpu().contiguous() for key, tensor in group.items()}
            entries[f"{stem}.safetensors"] = _store(draft / f"{stem}.safetensors", safetensors.torch.save(contiguous))
        entries[STATE] = _store(draft / STATE, _json({"schema": SCHEMA, "step": step, **state}))
        _store(draft / MANIFEST, _json({"format": FORMAT, "files": entries}))
        files.flush(draft)
        if path.exists():  # the same step again, in a run that resumed from an older checkpoint
            path.rename(folder / f".old-{step:08d}-{os.getpid()}")
        draft.rename(path)
        files.flush(folder)
        verify(path)
    except (OSError, Damaged) as error:
        shutil.rmtree(draft, ignore_errors=True)
        newest_left = max((p.name for p in listing(folder) if p != path), default="none")
        raise UserError(
            f"the checkpoint of step {step} could not be saved in {folder}: {error}; the newest one there is "
            f"{newest_left}. Make room or choose another disk, then resume with --resume",
            6,
        ) from None
    ours = [other for other in listing(folder) if is_ours(other)]
    older = [other for other in ours if _step(other) < step]
    for other in ours:  # newer ones are damaged: the run has resumed from a checkpoint before them
        if other != path and other not in older[: keep - 1]:
            remove(other)
    clear(folder)
    return path


def name(step: int) -> str:
    """The folder name of a step's checkpoint."""
    return f"step-{step:08d}"


def listing(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, newest first, whole or not; no links, and no folders without files of ours."""
    paths = [path for path in folder.glob("step-*") if NAME.fullmatch(path.name) and _holds_ours(path)]
    return sorted(paths, key=_step, reverse=True)


def foreign(folder: Path, first: int = 0, last: int = 0) -> list[Path]:
    """Paths in ``folder`` that are named like a checkpoint but are none of ours: they are never removed.

    Raises UserError (8) where one has the name of a checkpoint to come, after the steps ``first`` to ``last``.
    """
    found = sorted(path for path in folder.glob("step-*") if not is_ours(path))
    for path in found:
        if (step := NAME.fullmatch(path.name)) and first < int(step[1]) <= last:
            raise UserError(obstruction(path), 8)
    return found


def obstruction(path: Path) -> str:
    """The message about a foreign path that has the name of a checkpoint to come."""
    return f"{path} is not a checkpoint of gtsa, but one must be written there; move it away, then resume with --resume"


def is_ours(path: Path) -> bool:
    """Whether a folder has our manifest, damaged or not. Only then may it be removed."""
    if not NAME.fullmatch(path.name) or not _holds_ours(path) or not (path / MANIFEST).is_file():
        return False
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return True
    return isinstance(manifest, dict) and {"format", "files"} <= manifest.keys()


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, and a line for each newer one that is damaged."""
    problems = []
    for path in listing(folder):
        try:
            verify(path)
        except Damaged as damage:
            problems.append(f"{path.name} is damaged ({damage})")
        else:
            return path, problems
    return None, problems


def verify(path: Path) -> None:
    """Raises Damaged unless the checkpoint is byte for byte what was written."""
    try:
        for file, expected in _manifest(path).items():
            if _digest(path / file) != expected:
                raise Damaged(f"{file} was changed or cut short")
        if name(json.loads((path / STATE).read_bytes())["step"]) != path.name:
            raise Damaged("it is that of another step")
    except OSError as error:
        raise Damaged(f"{Path(error.filename or path).name}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{MANIFEST} or {STATE} cannot be read: {error}") from None


def read(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Tensors and state of a verified checkpoint. Only files that its manifest lists are read."""
    import safetensors.torch

    names = [Path(file) for file in sorted(_manifest(path))]
    tensors = {f.stem: safetensors.torch.load_file(path / f) for f in names if f.suffix == ".safetensors"}
    return tensors, _state(path)


def newest_state(folder: Path) -> dict[str, Any]:
    """The newest checkpoint state that is whole, empty where there is none. Tensors are not read."""
    for path in listing(folder):
        with suppress(OSError, Damaged, ValueError, KeyError):
            if _digest(path / STATE) == _manifest(path)[STATE]:
                return _state(path)
    return {}


def _state(path: Path) -> dict[str, Any]:
    """The state, with today's names of settings."""
    state = json.loads((path / STATE).read_bytes())
    schema = state.get("schema", 1)
    if "settings" in state:
        state["settings"] = migrated(state["settings"], schema, str(path))
    return migrated(state, schema, str(path))


@contextmanager
def understood(path: Path) -> Iterator[None]:
    """Turns errors about the contents of a whole checkpoint, written by another version, into a UserError (4)."""
    try:
        yield
    except UserError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if "DefaultCPUAllocator" in str(error) or type(error).__name__ == "OutOfMemoryError":
            raise
        difference = f"it has no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:200]
        raise UserError(
            f"{path} is whole, but not what this version of gtsa writes ({difference}): use the version that wrote it, "
            "or start anew in another folder",
            4,
        ) from None


def remove(path: Path) -> None:
    """Removes a checkpoint of ours: the files in its manifest, or the usual ones. Other files stay."""
    try:
        names = list(_manifest(path))
    except (OSError, ValueError, Damaged):
        names = [*(file.name for file in path.glob("*.safetensors")), STATE]
    for file in (*names, MANIFEST):
        with suppress(IsADirectoryError):
            (path / file).unlink(missing_ok=True)
    with suppress(OSError):  # it holds other files
        path.rmdir()


def clear(folder: Path) -> None:
    """Removes what interrupted saves have left."""
    for left in folder.glob(".*-*"):
        if LEFT.fullmatch(left.name) and left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)


def _manifest(path: Path) -> dict[str, FileEntry]:
    """{file: size and SHA-256}."""
    raw = (path / MANIFEST).read_bytes()
    try:
        manifest = json.loads(raw)
        entries: dict[str, FileEntry] = manifest["files"]
        if raw != _json(manifest) or manifest["format"] != FORMAT or any(Path(file).name != file for file in entries):
            raise Damaged(f"{MANIFEST} was changed, or written by another version")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{MANIFEST} cannot be read: {error}") from None
    return entries


def _holds_ours(path: Path) -> bool:
    if path.is_symlink() or not path.is_dir():
        return False
    return (path / MANIFEST).exists() or (path / STATE).exists() or any(path.glob("*.safetensors"))


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _store(path: Path, data: bytes) -> FileEntry:
    return {"bytes": len(data), "sha256": files.write(path, data)}


def _digest(path: Path) -> FileEntry:
    return {"bytes": path.stat().st_size, "sha256": files.digest(path)}


def _json(value: Mapping[str, object]) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True).encode() + b"\n"
