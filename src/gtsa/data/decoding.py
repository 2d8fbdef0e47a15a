"""From a file to pixels, with files as they come: every one is read whole, or refused with its reason.

8-bit formats go through Pillow behind an allowlist; TIFFs of other depths go through tifffile.
"""

from __future__ import annotations

import math
import os
import stat
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from gtsa.data import tiff
from gtsa.data.pixels import LARGEST, BadImage, Range, as_rgb, check_size
from gtsa.data.quiet import quiet

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP")  # JPEG: also MPO, files of cameras that hold a second picture
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp"}


class Header(NamedTuple):
    format: str
    mode: str
    width: int
    height: int
    frames: int = 1
    depth: int = 8  # bits a sample


def header(path: str | Path) -> Header:
    """What a file says it is, without decoding it. Raises BadImage."""
    with opened(path) as image:
        width, height = check_size(image.width, image.height)
        tiff.refuse_bands(image)
        try:
            frames = getattr(image, "n_frames", 1)
        except Exception as error:  # counting them reads on in the file
            raise BadImage(_reason(error)) from None
        return Header(image.format or "?", image.mode, width, height, frames, _depth(image))


def _depth(image: Any) -> int:
    """Bits a sample."""
    if image.format == "TIFF":
        return int(max(image.tag_v2.get(258, (1,))))
    return 16 if image.format == "PNG" and any("16" in str(tile[3]) for tile in image.tile) else 8


def decode(
    path: str | Path,
    detail: Callable[[int, int], float] | None = None,
    range16: Range = (0, 65535),
) -> Tensor:
    """The image in ``path`` as uint8 RGB [3, H, W], upright by its EXIF orientation. Raises BadImage.

    Args:
        detail: smallest useful scale of a width x height image; large JPEGs are decoded at 1/2, 1/4 or 1/8 if that
            is enough.
        range16: values of 16-bit images that become 0 and 255, rounded linearly between.

    Palettes and CMYK are converted, transparent pixels show a neutral grey, floating-point images must lie in
    [0, 1]; of an animated file the first frame is taken; colour profiles are ignored.
    """
    with opened(path) as image:
        check_size(image.width, image.height)
        tiff.refuse_bands(image)
        if detail is not None and image.format == "JPEG":
            scale = detail(image.width, image.height)
            image.draft(None, (math.ceil(image.width * scale), math.ceil(image.height * scale)))
        try:
            if image.format == "PNG":
                _checked_png(path)
            deep = tiff.is_deep(image)
            array = tiff.read(path, range16) if deep else _from_pillow(image, path, range16)
        except BadImage:
            raise
        except Exception as error:  # Pillow's decoders raise nearly anything on a damaged file
            raise BadImage(_reason(error)) from None
    return torch.from_numpy(array).permute(2, 0, 1)


class opened:
    """Opens a file with Pillow for a with-block; what goes wrong is a BadImage, and libraries say nothing."""

    def __init__(self, path: str | Path) -> None:
        self.path = path

    def __enter__(self) -> Any:
        quiet.__enter__()
        try:
            return self._open()
        except BaseException:
            quiet.__exit__()
            raise

    def _open(self) -> Any:
        try:
            mode = os.stat(self.path).st_mode
            if not stat.S_ISREG(mode):
                raise BadImage("not a regular file")
            self.file = open(self.path, "rb")  # noqa: SIM115, closed by __exit__
        except (OSError, ValueError) as error:  # ValueError: a path that holds a null byte
            raise BadImage(getattr(error, "strerror", None) or str(error)) from None
        try:
            return Image.open(self.file, formats=FORMATS)
        except Image.DecompressionBombError:
            self.file.close()
            raise BadImage(f"more than {LARGEST:,} pixels: cut it into tiles") from None
        except Exception as error:
            head = os.pread(self.file.fileno(), 64, 0)
            self.file.close()
            raise BadImage(_foreign(head, self.path, error)) from None

    def __exit__(self, *_: object) -> None:
        self.file.close()
        quiet.__exit__()


def _foreign(head: bytes, path: str | Path, error: Exception) -> str:
    """Why a file is no image that we read, from its first bytes."""
    if not head:
        return "empty file"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the image itself: run 'git lfs pull'"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "an HTML page, not an image: download it again"
    if not any(head):
        return "zero bytes only"
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+") and (kind := tiff.describe(path)):
        return kind
    if isinstance(error, UnidentifiedImageError):
        return "not a JPEG, PNG, WebP, TIFF or BMP image, or its header is damaged"
    return _reason(error)


def _checked_png(path: str | Path) -> None:
    """Compares the checksum of every chunk: Pillow passes over those of the pixels."""
    with open(path, "rb") as file:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            data, checksum = file.read(length), file.read(4)
            if len(checksum) < 4:
                raise BadImage("damaged: image file is truncated")
            if zlib.crc32(data, zlib.crc32(kind)) != int.from_bytes(checksum):
                raise BadImage(f"damaged: wrong checksum of a {kind.decode('latin-1')} chunk")
            if kind == b"IEND":
                return


def _from_pillow(image: Any, path: str | Path, range16: Range) -> np.ndarray:
    if image.format == "PNG" and range16 != (0, 65535) and image.mode in ("RGB", "RGBA"):
        with open(path, "rb") as file:
            if file.read(25)[24] == 16:
                raise BadImage("a 16-bit colour PNG cannot be read at a declared range: convert it to TIFF")
    image = ImageOps.exif_transpose(image) if _turned(image) else image
    return as_rgb(image, range16)


def _turned(image: Any) -> bool:
    try:
        turn: int = image.getexif().get(0x0112, 1)
        return bool(2 <= turn <= 8)
    except Exception:  # damaged EXIF is no reason to refuse the pixels
        return False


def values(path: str | Path) -> np.ndarray:
    """The numbers in a file as they are stored, palettes as places: any type, [H, W] or [H, W, bands]. Raises BadImage.

    Of 16-bit colour PNGs Pillow keeps the upper eight bits.
    """
    with opened(path) as image:
        check_size(image.width, image.height)
        try:
            return tiff.stored_values(path)[0] if tiff.is_deep(image) else np.asarray(image)
        except BadImage:
            raise
        except Exception as error:
            raise BadImage(_reason(error)) from None


def _reason(error: Exception) -> str:
    text = str(error).split("\n")[0].strip()
    if "imagecodecs" in text:
        return "a compressed TIFF of more than 8 bits: install what reads it with pip install 'gtsa[tiff]'"
    return f"damaged: {text}" if text else f"damaged: {type(error).__name__}"
