"""Image files wherever they lie: at a path, in memory, or as a part of a larger file."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol, cast

BUFFER = 2**15  # bytes that are read at a time: most headers fit


class Blob(Protocol):
    """The bytes of an image file that has no path of its own."""

    def open(self) -> BinaryIO:
        """The bytes as a file that can be sought. Raises BadImage or OSError where they cannot be read."""


File = str | Path | Blob


def open_file(file: File) -> BinaryIO:
    """Opens an image file for reading."""
    return open(file, "rb") if isinstance(file, str | Path) else file.open()


def loaded(file: File) -> File:
    """The file in memory if it has no path, so that all who read it share one request."""
    if isinstance(file, str | Path | Bytes):
        return file
    with file.open() as opened:
        return Bytes(opened.read())


class Bytes(NamedTuple):
    """A file in memory."""

    data: bytes

    def open(self) -> BinaryIO:
        return io.BytesIO(self.data)


class Part(NamedTuple):
    """A part of a larger file.

    Args:
        read: offset, length -> bytes of the larger file.
        offset, size: where the part lies, in bytes.
    """

    read: Callable[[int, int], bytes]
    offset: int
    size: int

    def open(self) -> BinaryIO:
        return cast(BinaryIO, io.BufferedReader(_PartReader(self), BUFFER))


class _PartReader(io.RawIOBase):
    def __init__(self, part: Part) -> None:
        self.part, self.position = part, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self.position = max(0, offset + (0, self.position, self.part.size)[whence])
        return self.position

    def readinto(self, buffer: Any, /) -> int:
        data = self._read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        return self._read(self.part.size)

    def _read(self, length: int) -> bytes:
        length = max(0, min(length, self.part.size - self.position))
        data = self.part.read(self.part.offset + self.position, length) if length else b""
        self.position += len(data)
        return data
