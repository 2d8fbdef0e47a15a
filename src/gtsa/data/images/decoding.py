"""Decodes image files to pixels. Every file is read whole, or refused with the reason.

Pillow reads 8-bit formats, of an allowlist. tifffile reads TIFFs of other depths.
"""

from __future__ import annotations

import math
import os
import stat
import struct
import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.ImageFile import ImageFile
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor

from gtsa.data.images import tiff
from gtsa.data.images.blobs import File, open_file
from gtsa.data.images.pixels import LARGEST, BadImage, Range, as_rgb, check_size, upright
from gtsa.data.images.quiet import quiet

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP")  # JPEG: also MPO, camera files with a second picture
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp"}


class Header(NamedTuple):
    format: str
    mode: str
    width: int
    height: int
    frames: int = 1
    depth: int = 8  # bits a sample


def read_header(path: File) -> Header:
    """Reads the header of an image without decoding it. Raises BadImage."""
    with open_image(path) as image:
        width, height = check_size(image.width, image.height)
        tiff.refuse_bands(image)
        try:
            frames = getattr(image, "n_frames", 1)
        except Exception as error:  # counting frames reads more of the file
            raise BadImage(_reason(error)) from None
        return Header(image.format or "?", image.mode, width, height, frames, _depth(image))


def _depth(image: ImageFile) -> int:
    """Bits a sample."""
    if isinstance(image, TiffImageFile):
        return int(max(image.tag_v2.get(258, (1,))))
    return 16 if image.format == "PNG" and any("16" in str(tile[3]) for tile in image.tile) else 8


def decode(
    path: File,
    detail: Callable[[int, int], float] | None = None,
    range16: Range = (0, 65535),
    decoder: str = "pillow",
) -> Tensor:
    """The image in ``path`` as uint8 RGB [3, H, W], upright by its EXIF orientation. Raises BadImage.

    Args:
        detail: smallest useful scale of a width x height image; large JPEGs are decoded at 1/2, 1/4 or 1/8 if that
            is not below it.
        range16: values of 16-bit images that become 0 and 255; values between are scaled linearly and rounded.
        decoder: "pillow", or "simplejpeg" for the JPEGs that it reads without a warning.

    Palettes and CMYK are converted. Transparent pixels become a neutral grey. Floating-point values must lie in [0, 1].
    Of an animated file the first frame is read. Colour profiles are ignored.
    """
    with open_image(path) as image:
        check_size(image.width, image.height)
        tiff.refuse_bands(image)
        full = image.size
        if detail is not None and image.format == "JPEG":
            scale = detail(image.width, image.height)
            image.draft(None, (math.ceil(image.width * scale), math.ceil(image.height * scale)))
        try:
            if image.format == "PNG":
                _check_png(path)
            array = _from_simplejpeg(image, path, full) if decoder == "simplejpeg" else None
            if array is None:
                array = tiff.read(path, range16) if tiff.is_deep(image) else _from_pillow(image, path, range16)
        except BadImage:
            raise
        except Exception as error:  # Pillow's decoders raise nearly anything on a damaged file
            raise BadImage(_reason(error)) from None
        # Pillow's bytes are used without a copy: PyTorch warns of read-only memory, which the block silences
        return torch.from_numpy(array).permute(2, 0, 1)


class open_image:
    """Opens a file with Pillow for a with-block. Errors become BadImage; libraries print nothing."""

    def __init__(self, path: File) -> None:
        self.path = path

    def __enter__(self) -> ImageFile:
        quiet.__enter__()
        try:
            return self._open()
        except BaseException:
            quiet.__exit__()
            raise

    def _open(self) -> ImageFile:
        try:
            if isinstance(self.path, str | os.PathLike) and not stat.S_ISREG(os.stat(self.path).st_mode):
                raise BadImage("not a regular file")
            self.file = open_file(self.path)
        except (OSError, ValueError) as error:  # ValueError: a path that holds a null byte
            raise BadImage(getattr(error, "strerror", None) or str(error)) from None
        try:
            return Image.open(self.file, formats=FORMATS)
        except Image.DecompressionBombError:
            self.file.close()
            raise BadImage(f"more than {LARGEST:,} pixels: cut it into tiles") from None
        except Exception as error:
            self.file.seek(0)
            head = self.file.read(64)
            self.file.close()
            raise BadImage(_reason_no_image(head, self.path, error)) from None

    def __exit__(self, *_: object) -> None:
        self.file.close()
        quiet.__exit__()


def _reason_no_image(head: bytes, path: File, error: Exception) -> str:
    """Why a file is not an image in a known format, from its first bytes."""
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


def _check_png(path: File) -> None:
    """Checks the checksum of every chunk. Pillow ignores those of pixel data."""
    with open_file(path) as file:
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


def _from_pillow(image: Image.Image, path: File, range16: Range) -> np.ndarray:
    if image.format == "PNG" and range16 != (0, 65535) and image.mode in ("RGB", "RGBA"):
        with open_file(path) as file:
            if file.read(25)[24] == 16:
                raise BadImage("a 16-bit colour PNG cannot be read at a declared range: convert it to TIFF")
    image = ImageOps.exif_transpose(image) if _has_orientation(image) else image
    return as_rgb(image, range16)


def _from_simplejpeg(image: ImageFile, file: File, full: tuple[int, int]) -> np.ndarray | None:
    """A JPEG at the scale that Pillow's draft has; None where it is no plain JPEG, or libjpeg warns of anything."""
    import simplejpeg

    if image.format not in ("JPEG", "MPO") or image.mode not in ("RGB", "L"):
        return None
    with open_file(file) as opened:
        data = opened.read()
    try:
        array: np.ndarray = simplejpeg.decode_jpeg(
            data, colorspace="RGB", min_factor=round(full[0] / image.width), strict=True
        )
    except ValueError:
        return None
    return upright(array, _orientation(image)) if array.shape[:2] == (image.height, image.width) else None


def _has_orientation(image: Image.Image) -> bool:
    return 2 <= _orientation(image) <= 8


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # damaged EXIF: the pixels are still good
        return 1


def read_values(path: File) -> np.ndarray:
    """The stored numbers of an image, of palettes the indices: any type, [H, W] or [H, W, bands]. Raises BadImage.

    Pillow keeps the upper eight bits of 16-bit colour PNGs.
    """
    with open_image(path) as image:
        check_size(image.width, image.height)
        try:
            return tiff.read_values(path)[0] if tiff.is_deep(image) else np.asarray(image)
        except BadImage:
            raise
        except Exception as error:
            raise BadImage(_reason(error)) from None


def _reason(error: Exception) -> str:
    text = str(error).split("\n")[0].strip()
    if "imagecodecs" in text:
        return "a compressed TIFF of more than 8 bits: install its decoder with pip install 'gtsa[tiff]'"
    return f"damaged: {text}" if text else f"damaged: {type(error).__name__}"
