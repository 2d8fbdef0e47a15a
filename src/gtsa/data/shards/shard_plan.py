"""Which images go into which shard, and the record of a folder of shards."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from gtsa.core.errors import UserError
from gtsa.core.files import is_draft, read_json, store

RECORD = "shards.json"
SCHEMA = 1
OURS = re.compile(r"\d{6,}\.tar(\.index)?")
BLOCK = 512  # bytes; a member is a header block and its content in whole blocks
UNITS = {"kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


class Limits(NamedTuple):
    """The most that a shard holds; one of the two is None."""

    bytes: int | None
    images: int | None


def limits_of(shard_size: str, images_per_shard: int | None) -> Limits:
    """Raises UserError (2) where a limit is no size or no count."""
    if images_per_shard is not None:
        if images_per_shard < 1:
            raise UserError(f"--images-per-shard {images_per_shard}: at least 1")
        return Limits(None, images_per_shard)
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kmgt]i?b)", shard_size.strip().lower())
    if match is None or float(match[1]) == 0:
        raise UserError(f"--shard-size {shard_size}: give a number with its unit, e.g. 500MB or 1GiB")
    return Limits(int(float(match[1]) * UNITS[match[2]]), None)


def split(sizes: Sequence[int], limits: Limits) -> list[range]:
    """The images of each shard: in order, as many as fit, at least one. It depends on nothing but the sizes."""
    shards, first, used = [], 0, 0
    for index, size in enumerate(sizes):
        needed = BLOCK + -(-size // BLOCK) * BLOCK
        full = index - first == limits.images if limits.bytes is None else used + needed > limits.bytes
        if full and index > first:
            shards.append(range(first, index))
            first, used = index, 0
        used += needed
    return [*shards, range(first, len(sizes))] if sizes else shards


@dataclass
class Record:
    """What a folder of shards holds.

    Attributes:
        job: digest of the names and sizes of the images, and of the settings.
        shards: one entry for each that is complete: name, images, bytes.
        left_out: names of images that are in no shard, with reasons.
    """

    job: str
    planned: int
    shards: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[dict[str, str]] = field(default_factory=list)

    def save(self, folder: Path) -> None:
        store(folder / RECORD, (json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1) + "\n").encode())


def read_record(folder: Path) -> Record | None:
    """The record in a folder; None if there is none. Raises UserError (8) where it is damaged."""
    if not (folder / RECORD).exists():
        return None
    values = read_json(folder / RECORD)
    try:
        if values.pop("schema") != SCHEMA:
            raise ValueError
        return Record(**values)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"{folder}/{RECORD} is damaged or of another version: choose another --out", 8) from None


def check_folder(folder: Path) -> None:
    """Raises UserError where --out is a file (2), or holds files that are no shards of gtsa (8)."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"--out {folder} is a file: name a folder for the shards")
    names = sorted(path.name for path in folder.iterdir())
    ours = read_record(folder) is not None
    for name in names:
        if is_draft(name, "*.tar", "*.index", RECORD) or (ours and (name == RECORD or OURS.fullmatch(name))):
            continue
        raise UserError(f"--out {folder} holds other files ({name}): choose a new or empty folder", 8)


def shard_name(number: int) -> str:
    return f"{number:06d}.tar"
