"""Checkpoints that are whole or absent: safetensors and JSON under a SHA-256 manifest, never a pickle.

    checkpoints/step-00000100/
        *.safetensors   tensors
        state.json      everything else the next step needs
        manifest.json   size and SHA-256 of each file above

A checkpoint is written to a hidden folder beside its place, flushed to the disk, renamed, and read back; only then
are older ones removed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from gtsa.core import Remedy

Tensors = Mapping[str, Mapping[str, Tensor]]  # {file stem: {name: tensor}}
FORMAT = 1


class Damaged(Exception):
    """A checkpoint that is not what was written; the message says what is wrong with it."""


def write(folder: Path, step: int, tensors: Tensors, state: Mapping[str, Any], keep: int = 2) -> Path:
    """Writes the checkpoint of ``step`` into ``folder`` and leaves it there with the ``keep`` - 1 before it.

    Raises:
        Remedy: the disk is full or refuses (6); what was there before is untouched.
    """
    place, draft = folder / f"step-{step:08d}", folder / f".draft-{step:08d}-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _clear(folder)
        draft.mkdir()
        listed = {}
        for stem, group in tensors.items():
            tidy = {name: tensor.detach().cpu().contiguous() for name, tensor in group.items()}
            listed[f"{stem}.safetensors"] = _store(draft / f"{stem}.safetensors", safetensors.torch.save(tidy))
        listed["state.json"] = _store(draft / "state.json", _json({"step": step, **state}))
        _store(draft / "manifest.json", _json({"format": FORMAT, "files": listed}))
        _flush(draft)
        if place.exists():  # the same step again, from a run that went back to an older checkpoint
            place.rename(folder / f".old-{step:08d}-{os.getpid()}")
        draft.rename(place)
        _flush(folder)
        verify(place)
    except (OSError, Damaged) as error:
        shutil.rmtree(draft, ignore_errors=True)
        newest = max((p.name for p in listing(folder) if p != place), default="none")
        raise Remedy(
            f"the checkpoint of step {step} could not be saved in {folder}: {error}; the newest that is safe there: "
            f"{newest}. Make room or choose another disk, then go on with --resume",
            6,
        ) from None
    older = [other for other in listing(folder) if other.name < place.name]
    for other in listing(folder):  # newer ones are damaged: a run that went back behind them has left them ahead of it
        if other != place and other not in older[: keep - 1]:
            shutil.rmtree(other)
    _clear(folder)
    return place


def listing(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, newest first, whole or not."""
    return sorted(folder.glob("step-*"), reverse=True)


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
        raw = (place / "manifest.json").read_bytes()
        manifest = json.loads(raw)
        if raw != _json(manifest) or manifest["format"] != FORMAT:
            raise Damaged("manifest.json was changed, or written by another version")
        for name, expected in manifest["files"].items():
            if _digest(place / name) != expected:
                raise Damaged(f"{name} was changed or cut short")
        if f"step-{json.loads((place / 'state.json').read_bytes())['step']:08d}" != place.name:
            raise Damaged("it is another step's")
    except OSError as error:
        raise Damaged(f"{Path(error.filename or place).name}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"manifest.json or state.json cannot be read: {error}") from None


def read(place: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Tensors and state of a verified checkpoint."""
    tensors = {file.stem: safetensors.torch.load_file(file) for file in sorted(place.glob("*.safetensors"))}
    return tensors, json.loads((place / "state.json").read_bytes())


def store(path: Path, data: bytes) -> None:
    """Writes a file so that it is there whole or not at all."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    _store(draft, data)
    draft.replace(path)
    _flush(path.parent)


def _store(path: Path, data: bytes) -> dict[str, Any]:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _digest(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True).encode() + b"\n"


def _flush(folder: Path) -> None:
    """Makes the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _clear(folder: Path) -> None:
    """Removes what an interrupted save has left."""
    for left in (*folder.glob(".draft-*"), *folder.glob(".old-*")):
        shutil.rmtree(left, ignore_errors=True)
