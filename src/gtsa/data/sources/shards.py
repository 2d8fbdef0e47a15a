"""Tar shards in the layout of WebDataset, on disk or behind URLs: random access, and nothing is extracted."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
from torch import Tensor

from gtsa.core.errors import UserError
from gtsa.data.images import decoding
from gtsa.data.images.blobs import Part, loaded
from gtsa.data.images.pixels import BadImage
from gtsa.data.shards import storage
from gtsa.data.shards.shard_index import Shard, open_shard
from gtsa.data.shards.storage import Stored
from gtsa.data.sources import ALL, PACKED, SHARDS, Detail, Progress, Selection, matcher, packed_data
from gtsa.data.threaded import map_in_order, map_short

SPLIT = re.compile(rf"{re.escape(SHARDS)}/", re.IGNORECASE)  # between the shard and the member
GONE = "no longer in the shards"


class Shards:
    """Every image in tar files, in the order of the shards' names and then of the images' names (by bytes).

    ``data`` is a .tar file, a folder of them, a pattern (``shards/{000..099}.tar``, ``shards/*.tar``), or a URL of any
    of these. The name of an image is ``SHARD/MEMBER``; patterns of the selection are for the member. Positions come
    from an index, which is kept (``shard_index``). ``unreadable`` lists shards that cannot be read to their end.
    """

    def __init__(
        self,
        data: str,
        selection: Selection = ALL,
        files: Sequence[str] | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.root, self.range16 = storage.fixed_part(os.fspath(data)), selection.range16
        self.decoder = selection.decoder
        self.ignored: dict[str, int] = Counter()
        self.unreadable: list[tuple[str, str]] = []
        self.outside: list[tuple[str, str]] = []
        self._shards: list[str] = []
        self._stored: list[Stored] = []
        self._names: list[str] = []  # of the images within their shards
        self._bad: dict[int, str] = {}
        places = [np.empty((0, 3), np.int64)]
        is_selected = matcher(selection.include, selection.exclude)
        for shard in self._open(os.fspath(data), files is not None):
            places.append(self._add(shard, is_selected))
            if progress:
                progress(len(self._names))
        self._places = np.concatenate(places)  # of each image: shard, offset, size
        if files is not None:
            self._select(files)

    @staticmethod
    def claims(data: object) -> bool:
        if not isinstance(data, str | os.PathLike):
            return False
        path = os.fspath(data)
        return (
            storage.is_url(path)
            or storage.is_pattern(path)
            or (os.path.isfile(path) and path.lower().endswith(SHARDS))
            or storage.holds_only(path, SHARDS, decoding.SUFFIXES)
        )

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        shard = int(self._places[index, 0])
        return self._names[index] if shard < 0 else f"{self._shards[shard]}/{self._names[index]}"

    def size(self, index: int) -> int:
        return int(self._places[index, 2])

    def path(self, index: int) -> None:
        return None

    def file(self, index: int) -> Part:
        """Raises BadImage with the reason where the index says that the image cannot be read."""
        if index in self._bad:
            raise BadImage(self._bad[index])
        shard, offset, size = self._places[index].tolist()
        return Part(partial(_read_part, self._stored[shard]), offset, size)

    def read(self, index: int, detail: Detail | None = None) -> Tensor:
        return decoding.decode(loaded(self.file(index)), detail, self.range16, self.decoder)

    def _open(self, data: str, resumed: bool) -> Iterator[Shard]:
        """The shards with their indexes, by name. A named shard that does not exist is an error in a new run."""
        paths = {storage.relative(path, self.root): path for path in _expand(data)}
        named = sorted(paths.items(), key=lambda item: os.fsencode(f"{item[0]}/"))
        work = map_in_order if storage.is_url(data) else map_short
        for (name, _), shard in zip(named, work(_try_to_open, named), strict=True):
            if isinstance(shard, Shard):
                yield shard
            elif isinstance(shard, FileNotFoundError) and not resumed:
                raise UserError(f"--data {data}: {name} does not exist; name existing shards only", 3)
            else:
                self.unreadable.append((name, shard.strerror or str(shard)))
        if not self._shards and not resumed:
            reason = "; ".join(f"{name}: {why}" for name, why in self.unreadable[:5]) or "none matches"
            raise UserError(f"--data {data}: no shard can be read ({reason}); check the path and its permissions", 3)

    def _add(self, shard: Shard, is_selected: Callable[[str], bool]) -> np.ndarray:
        """Adds the selected images of a shard, and returns their places, [n, 3]."""
        index, first = shard.index, len(self._names)
        chosen = [i for i, member in enumerate(index.names) if is_selected(member)]
        chosen.sort(key=lambda i: os.fsencode(index.names[i]))
        self._names += [index.names[i] for i in chosen]
        self._bad |= {first + at: index.bad[i] for at, i in enumerate(chosen) if i in index.bad}
        for kind, count in index.ignored.items():
            self.ignored[kind] += count
        if left := len(index.names) - len(chosen):
            self.ignored["not chosen"] += left
        if index.problem:
            self.unreadable.append((shard.name, index.problem))
        places = np.array([index.offsets, index.sizes], np.int64).T[chosen]
        places = np.concatenate([np.full((len(chosen), 1), len(self._shards)), places], axis=1)
        self._shards.append(shard.name)
        self._stored.append(shard.stored)
        return places

    def _select(self, files: Sequence[str]) -> None:
        """Reduces the images to those of a list, in its order. One that is gone is kept, and cannot be read."""
        chosen = list(self._positions(files))
        self._bad = {at: GONE if i < 0 else self._bad[i] for at, i in enumerate(chosen) if i < 0 or i in self._bad}
        self._names = [name if i < 0 else self._names[i] for name, i in zip(files, chosen, strict=True)]
        gone = np.array([[-1, 0, 0]], np.int64)
        self._places = np.concatenate([self._places, gone])[chosen]  # -1 is the last

    def _positions(self, files: Sequence[str]) -> Iterator[int]:
        """The number of each named image; -1 where there is none."""
        number = {name: shard for shard, name in enumerate(self._shards)}
        starts = np.searchsorted(self._places[:, 0], range(len(number) + 1)).tolist()
        members: dict[int, dict[str, int]] = {}
        for name in files:
            heads = (match.end() for match in SPLIT.finditer(name))
            end = next((end for end in heads if name[: end - 1] in number), None)
            if end is None:
                yield -1
                continue
            shard = number[name[: end - 1]]
            if shard not in members:
                members[shard] = {self._names[i]: i for i in range(*starts[shard : shard + 2])}
            yield members[shard].get(name[end:], -1)


def _expand(data: str) -> list[str]:
    if data.lower().endswith(PACKED):
        raise packed_data(data)
    try:
        return storage.expand(data, SHARDS)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(f"--data {data} cannot be listed: {reason}; check the address and its permissions", 3) from None


def _try_to_open(name_and_path: tuple[str, str]) -> Shard | OSError:
    name, path = name_and_path
    try:
        return open_shard(path, name)
    except OSError as error:
        return error


def _read_part(stored: Stored, offset: int, length: int) -> bytes:
    try:
        data = stored.read(offset, length)
    except OSError as error:
        raise BadImage(error.strerror or str(error)) from None
    if len(data) < length:
        raise BadImage("cut off: the archive ends within it")
    return data
