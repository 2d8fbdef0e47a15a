"""A folder of downscaled JPEGs: an image is decoded and reduced once, and later epochs and runs read the result.

An image is reduced to the size that its views need, and kept as a JPEG of quality 95 with whole colours (4:4:4). Its
pixels therefore differ a little from those of the file. They are the same whether the cache has it already, cannot be
written, or has to be made again. A file of the cache is named for all that its content depends on: the image's path,
size and time, and the settings. So another image or other settings never find it.
"""

from __future__ import annotations

import hashlib
import io
import math
import mmap
import os
import zlib
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gtsa.core.files import draft_of
from gtsa.core.terminal import say
from gtsa.data.sources import Detail
from gtsa.data.views.multicrop import MultiCrop, resized

QUALITY = 95
VERSION = 1  # of how images are reduced and stored


class Images(Protocol):
    """The part of a source that the cache uses."""

    def read(self, index: int, detail: Detail | None = None) -> Tensor: ...
    def path(self, index: int) -> str | None: ...


class JpegCache:
    """Reads a source through a cache in ``folder``. Images that are no files, and small ones, are read as they are.

    Args:
        settings: what decoded pixels depend on beside the file, e.g. the decoder.
    """

    def __init__(self, source: Images, folder: str, multicrop: MultiCrop, settings: str = "") -> None:
        self.source, self.folder = source, Path(folder)
        needs = multicrop.shapes, multicrop.global_crops_scale, multicrop.local_crops_scale, multicrop.aspect
        self.settings = f"{VERSION} {QUALITY} {needs} {settings}"
        self.full = mmap.mmap(-1, 1)  # 1: nothing is written any more; workers share it
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write(self.folder / "writable", b"")
        except OSError as error:
            self._stop_writing(error)

    def read(self, index: int, detail: Detail | None = None) -> Tensor:
        """The reduced image. Raises BadImage where the source does."""
        path = self.source.path(index)
        if path is None or detail is None:
            return self.source.read(index, detail)
        file = self._file(path)
        kept = _read(file)
        if kept is not None:
            return kept
        pixels = self.source.read(index, detail)
        height, width = pixels.shape[-2:]
        scale = detail(width, height)
        size = math.ceil(height * scale), math.ceil(width * scale)
        if size == (height, width):
            return pixels
        buffer = io.BytesIO()
        reduced = resized(pixels, (0, 0, width, height), *size)
        Image.fromarray(reduced.movedim(0, -1).numpy()).save(buffer, "JPEG", quality=QUALITY, subsampling=0)
        self._keep(file, buffer.getvalue())
        return _decoded(buffer.getvalue())

    def _file(self, path: str) -> Path | None:
        try:
            status = os.stat(path)
        except OSError:  # the source says what is wrong
            return None
        content = f"{os.path.abspath(path)} {status.st_size} {status.st_mtime_ns} {self.settings}"
        key = hashlib.sha256(content.encode("utf-8", "surrogateescape")).hexdigest()
        return self.folder / key[:2] / f"{key[2:34]}.jpg"

    def _keep(self, file: Path | None, data: bytes) -> None:
        """Writes a file of the cache, whole or not at all. It ends with a checksum, which JPEG readers ignore."""
        if file is None or self.full[0]:
            return
        try:
            file.parent.mkdir(exist_ok=True)
            self._write(file, data + zlib.crc32(data).to_bytes(4))
        except OSError as error:
            self._stop_writing(error)

    def _write(self, file: Path, data: bytes) -> None:
        draft = draft_of(file)
        try:
            draft.write_bytes(data)
            draft.replace(file)
        except OSError:
            draft.unlink(missing_ok=True)
            raise

    def _stop_writing(self, error: OSError) -> None:
        if not self.full[0]:
            self.full[0] = 1
            say(f"--cache {self.folder}: {error.strerror or error}; training continues, and no more images are kept")


def _read(file: Path | None) -> Tensor | None:
    """The image in a file of the cache; None where there is none, or where it is damaged."""
    try:
        raw = file.read_bytes() if file else b""
    except OSError:
        return None
    data, checksum = raw[:-4], raw[-4:]
    return _decoded(data) if data and zlib.crc32(data).to_bytes(4) == checksum else None


def _decoded(data: bytes) -> Tensor:
    with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
        return torch.from_numpy(np.array(image)).movedim(-1, 0)
