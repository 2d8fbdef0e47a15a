"""Opens tar shards with their indexes. An index is made once, and kept beside the shard or in the cache folder."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from gtsa.core.errors import UserError
from gtsa.core.files import cache_folder, store
from gtsa.data.images import decoding
from gtsa.data.shards import storage
from gtsa.data.shards.storage import RemoteFile, Stored
from gtsa.data.shards.tar_index import NotTar, TarIndex, from_json, has_member, read_index, to_json

INDEX = ".index"  # the index of 000000.tar is 000000.tar.index


@dataclass(frozen=True)
class Shard:
    """A shard that is open. ``name``: for the user."""

    name: str
    stored: Stored
    index: TarIndex


def open_shard(path: str, name: str) -> Shard:
    """Opens a shard by path or URL.

    Raises:
        OSError: it cannot be read, or is no tar archive.
        UserError: it is compressed, or its server sends whole files only (3).
    """
    stored = storage.open_stored(path)
    return Shard(name, stored, _kept_index(stored) or _make_index(stored))


def write_index(path: Path) -> TarIndex:
    """Writes the index beside a local shard, and returns it. Raises OSError."""
    stored = storage.LocalFile(str(path))
    with storage.scanned(stored) as read:
        index = read_index(read, stored.size, decoding.SUFFIXES)
    store(Path(f"{path}{INDEX}"), to_json(index, stored.mark))
    return index


def _kept_index(stored: Stored) -> TarIndex | None:
    """The index that was made before; None if there is none, or the shard has changed since."""
    for place in _places(stored):
        with suppress(OSError):
            if index := from_json(place.read_bytes(), lambda mark: mark == stored.mark):
                return index
    return _uploaded_index(stored) if isinstance(stored, RemoteFile) else None


def _uploaded_index(stored: RemoteFile) -> TarIndex | None:
    """The index beside a remote shard. It was made on disk, so the size and two headers have to fit, not the ETag."""
    if "?" in stored.path:  # a signed URL is for one file
        return None
    try:
        beside = RemoteFile(stored.path + INDEX)
        index = from_json(beside.read(0, beside.size), lambda mark: mark["bytes"] == stored.size)
        if index is None or not all(has_member(stored.read, index, n) for n in (0, -1) if index.names):
            return None
    except OSError:
        return None
    _keep(stored, index)
    return index


def _make_index(stored: Stored) -> TarIndex:
    if isinstance(stored, RemoteFile):
        stored.check_ranges()
    try:
        with storage.scanned(stored) as read:
            index = read_index(read, stored.size, decoding.SUFFIXES)
    except NotTar as reason:
        if str(reason).startswith("compressed"):
            raise UserError(
                f"{stored.path} is {reason}, so its images cannot be read one by one: unpack it to a plain .tar file", 3
            ) from None
        raise OSError(f"not a tar archive: {reason}") from None
    _keep(stored, index)
    return index


def _keep(stored: Stored, index: TarIndex) -> None:
    raw = to_json(index, stored.mark)
    for place in _places(stored):
        with suppress(OSError):  # without an index the next start takes longer
            place.parent.mkdir(parents=True, exist_ok=True)
            store(place, raw)
            return


def _places(stored: Stored) -> list[Path]:
    """Where the index of a shard is kept: beside it, or in the cache folder if that is not possible."""
    remote = isinstance(stored, RemoteFile)
    name = stored.path if remote else os.path.abspath(stored.path)
    cached = cache_folder() / "shards" / f"{sha256(os.fsencode(name)).hexdigest()[:32]}{INDEX}"
    return [cached] if remote else [Path(stored.path + INDEX), cached]
