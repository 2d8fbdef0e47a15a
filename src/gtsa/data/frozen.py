"""The images of a run, frozen in a list when it began. A file that changed since then is refused."""

from __future__ import annotations

import json
import os
from copy import copy
from typing import Any

import numpy as np
from torch import Tensor

from gtsa.core.errors import UserError
from gtsa.data.pixels import BadImage, Range
from gtsa.data.sources import Detail, Source

SCALES = (1, 2, 4, 8)  # large JPEGs are decoded at 1 / scale


def list_entry(source: Source, index: int, size: tuple[int, int] | None) -> dict[str, Any]:
    """The entry of an image in the list: name, bytes, and width and height if they are known."""
    entry: dict[str, Any] = {"name": source.name(index), "bytes": source.size(index)}
    if size is not None and source.path(index) is not None:
        entry |= {"width": size[0], "height": size[1]}
    return entry


class Frozen:
    """A source whose files must still have the sizes in the list.

    Args:
        source: of the images in the list, in its order.
        listed: lines of JSON from ``list_entry``. Files without sizes in the list are not checked.

    Raises:
        UserError: the list is damaged (4).
    """

    def __init__(self, source: Source, listed: bytes) -> None:
        self.source, self.outside = source, source.outside
        self.ignored, self.unreadable = source.ignored, source.unreadable
        self.range16 = source.range16
        entries = map(json.loads, listed.splitlines())
        try:
            sizes = [[int(entry.get(key, 0)) for key in ("bytes", "width", "height")] for entry in entries]
            self.sizes = np.array(sizes, np.int64).reshape(-1, 3)
        except (ValueError, TypeError, OverflowError) as error:
            raise UserError(
                f"the list of images is damaged ({error}); bring it back, or start another run", 4
            ) from None

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

    def read(self, index: int, detail: Detail | None = None) -> Tensor:
        """Raises BadImage where the file has another number of bytes or pixels than in the list."""
        size, width, height = self.sizes[index].tolist()
        pixels = self.source.read(index, detail)
        path = self.source.path(index)
        if path is None:
            return pixels
        now = pixels.shape[-1], pixels.shape[-2]
        if width and not any(now in _scaled(width, height, scale) for scale in SCALES):
            raise BadImage(f"another image than when the run began: {now[0]} x {now[1]} px, was {width} x {height}")
        try:
            current = os.path.getsize(path)
        except OSError as error:
            raise BadImage(error.strerror or str(error)) from None
        if size and current != size:
            raise BadImage(f"another file than when the run began: {current:,} bytes, was {size:,}")
        return pixels


def _scaled(width: int, height: int, scale: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The scaled size, upright or rotated by its EXIF orientation."""
    w, h = -(-width // scale), -(-height // scale)
    return (w, h), (h, w)
