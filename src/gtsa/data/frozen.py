"""The images of a run, frozen in a list when it began. A file that changed since then is refused."""

from __future__ import annotations

import io
import json
import os
from copy import copy
from itertools import islice
from typing import NamedTuple

import numpy as np
from torch import Tensor

from gtsa.data.images.blobs import File
from gtsa.data.images.pixels import BadImage, Range
from gtsa.data.sources import Detail, Source

SCALES = (1, 2, 4, 8)  # large JPEGs are decoded at 1 / scale


TOGETHER = 10_000  # lines of the list that are parsed at a time: faster than one by one, and in little memory

_quote = json.JSONEncoder().encode


class ImageList(NamedTuple):
    """The list of a run: names, and [n, 3] bytes, width and height, 0 where they are not known."""

    names: list[str]
    sizes: np.ndarray


def list_line(source: Source, index: int, size: tuple[int, int] | None) -> str:
    """The line of an image in the list, as JSON: name, bytes, and width and height if they are known."""
    known = size is not None and source.file(index) is not None
    sides = f', "width": {size[0]}, "height": {size[1]}' if size and known else ""
    return f'{{"name": {_quote(source.name(index))}, "bytes": {source.size(index)}{sides}}}\n'


def parse_list(raw: bytes) -> ImageList:
    """Reads what ``list_line`` wrote. Raises ValueError where it is damaged."""
    names: list[str] = []
    sizes = [np.empty((0, 3), np.int64)]
    file = io.BytesIO(raw)
    try:
        while lines := list(islice(file, TOGETHER)):
            entries = json.loads(b"[" + b",".join(lines) + b"]")
            names += [str(entry["name"]) for entry in entries]
            values = [[int(entry.get(key, 0)) for key in ("bytes", "width", "height")] for entry in entries]
            sizes.append(np.array(values, np.int64).reshape(-1, 3))
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None
    return ImageList(names, np.concatenate(sizes))


class Frozen:
    """A source whose files must still have the sizes in the list.

    Args:
        source: of the images in the list, in its order.
        sizes: of the list. Files without sizes are not checked.
    """

    def __init__(self, source: Source, sizes: np.ndarray) -> None:
        self.source, self.outside = source, source.outside
        self.ignored, self.unreadable = source.ignored, source.unreadable
        self.range16, self.sizes = source.range16, sizes

    def with_range16(self, range16: Range) -> Frozen:
        """The same images, of which those of 16 bits are read with this range."""
        other, source = copy(self), copy(self.source)
        source.range16 = other.range16 = range16
        other.source = source
        return other

    def __len__(self) -> int:
        return len(self.source)

    def name(self, index: int) -> str:
        return self.source.name(index)

    def size(self, index: int) -> int:
        return int(self.sizes[index, 0])

    def path(self, index: int) -> str | None:
        return self.source.path(index)

    def file(self, index: int) -> File | None:
        return self.source.file(index)

    def read(self, index: int, detail: Detail | None = None) -> Tensor:
        """Raises BadImage where the file has another number of bytes or pixels than in the list."""
        size, width, height = self.sizes[index].tolist()
        pixels = self.source.read(index, detail)
        now = pixels.shape[-1], pixels.shape[-2]
        if width and not any(now in _scaled(width, height, scale) for scale in SCALES):
            raise BadImage(f"another image than when the run began: {now[0]} x {now[1]} px, was {width} x {height}")
        path = self.source.path(index)
        try:
            current = self.source.size(index) if path is None else os.path.getsize(path)
        except OSError as error:
            raise BadImage(error.strerror or str(error)) from None
        if size and current != size:
            raise BadImage(f"another file than when the run began: {current:,} bytes, was {size:,}")
        return pixels


def _scaled(width: int, height: int, scale: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The scaled size, upright or rotated by its EXIF orientation."""
    w, h = -(-width // scale), -(-height // scale)
    return (w, h), (h, w)
