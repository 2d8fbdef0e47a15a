"""The images of a run as its list froze them: a file that is another one by now is not read in its place."""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np
from torch import Tensor

from gtsa.core.errors import UserError
from gtsa.data.pixels import BadImage
from gtsa.data.sources import Detail, Source

SCALES = (1, 2, 4, 8)  # at which large JPEGs are decoded


def frozen(source: Source, index: int, size: tuple[int, int] | None) -> dict[str, Any]:
    """The entry of an image in the list: its name, its bytes, and its width and height where they are known."""
    entry: dict[str, Any] = {"name": source.name(index), "bytes": source.size(index)}
    if size is not None and source.path(index) is not None:
        entry |= {"width": size[0], "height": size[1]}
    return entry


class Frozen:
    """A source whose files must still have the size that they had when they were listed.

    Args:
        source: of the images in the list, in its order.
        listed: lines of JSON, as made by ``frozen``. Files of which nothing is known are read as they are.

    Raises:
        UserError: the list is damaged (4).
    """

    def __init__(self, source: Source, listed: bytes) -> None:
        self.source, self.outside = source, source.outside
        self.ignored, self.unreadable = source.ignored, source.unreadable
        entries = map(json.loads, listed.splitlines())
        try:
            sizes = [[int(entry.get(key, 0)) for key in ("bytes", "width", "height")] for entry in entries]
            self.sizes = np.array(sizes, np.int64).reshape(-1, 3)
        except (ValueError, TypeError, OverflowError) as error:
            raise UserError(
                f"the list of images is damaged ({error}); bring it back, or start another run", 4
            ) from None

    def __len__(self) -> int:
        return len(self.source)

    def name(self, index: int) -> str:
        return self.source.name(index)

    def size(self, index: int) -> int:
        return int(self.sizes[index, 0])

    def path(self, index: int) -> str | None:
        return self.source.path(index)

    def read(self, index: int, detail: Detail | None = None) -> Tensor:
        """Raises BadImage where the file has other bytes or pixels than it had, in number."""
        size, width, height = self.sizes[index].tolist()
        pixels = self.source.read(index, detail)
        path = self.source.path(index)
        if path is None:
            return pixels
        seen = pixels.shape[-1], pixels.shape[-2]
        if width and not any(seen in _scaled(width, height, scale) for scale in SCALES):
            raise BadImage(f"another image than when the run began: {seen[0]} x {seen[1]} px, was {width} x {height}")
        try:
            now = os.path.getsize(path)
        except OSError as error:
            raise BadImage(error.strerror or str(error)) from None
        if size and now != size:
            raise BadImage(f"another file than when the run began: {now:,} bytes, was {size:,}")
        return pixels


def _scaled(width: int, height: int, scale: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Upright, or turned by its EXIF orientation."""
    w, h = -(-width // scale), -(-height // scale)
    return (w, h), (h, w)
