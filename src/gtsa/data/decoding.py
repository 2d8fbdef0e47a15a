"""From a file to pixels, with files as they come: every one is read whole, or refused with its reason.

8-bit formats go through Pillow behind an allowlist; TIFFs of other depths go through tifffile.
"""

from __future__ import annotations

import io
import math
import os
import stat
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tifffile
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from gtsa.data.quiet import quiet

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP")  # JPEG: also MPO, files of cameras that hold a second picture
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp"}
LARGEST = 2**27  # pixels; larger ones are refused from their header
SMALLEST = 16  # px of the short side: one patch
NEUTRAL = (124, 116, 104)  # shows through transparent pixels: ImageNet's mean, which normalises to 0
ALPHA = {"RGBA", "LA", "PA", "La", "RGBa"}

BAND = 2**22  # pixels that are converted at a time

Range = tuple[float, float]


class BadImage(Exception):
    """An image that cannot be used; the message is the reason, without the path."""


class Header(NamedTuple):
    format: str
    mode: str
    width: int
    height: int
    frames: int = 1
    depth: int = 8  # bits a sample


def header(path: str | Path) -> Header:
    """What a file says it is, without decoding it. Raises BadImage."""
    with _opened(path) as image:
        width, height = _sized(image.width, image.height)
        _banded(image)
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
    with _opened(path) as image:
        _sized(image.width, image.height)
        _banded(image)
        if detail is not None and image.format == "JPEG":
            scale = detail(image.width, image.height)
            image.draft(None, (math.ceil(image.width * scale), math.ceil(image.height * scale)))
        try:
            if image.format == "PNG":
                _checked_png(path)
            deep = _deep_tiff(image)
            array = _from_tiff(path, range16) if deep else _from_pillow(image, path, range16)
        except BadImage:
            raise
        except Exception as error:  # Pillow's decoders raise nearly anything on a damaged file
            raise BadImage(_reason(error)) from None
    return torch.from_numpy(array).permute(2, 0, 1)


class _opened:
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
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+") and (kind := _tiff_kind(path)):
        return kind
    if isinstance(error, UnidentifiedImageError):
        return "not a JPEG, PNG, WebP, TIFF or BMP image, or its header is damaged"
    return _reason(error)


def _tiff_kind(path: str | Path) -> str | None:
    """What a TIFF holds that Pillow does not know."""
    try:
        with tifffile.TiffFile(path) as tiff:
            page = tiff.pages.first
            bands, kind = int(page.samplesperpixel), str(page.dtype)
    except Exception:
        return None
    if bands not in (1, 3, 4):
        return f"{bands} bands: 1, 3 or 4 (with alpha) are read"
    return f"a TIFF of {bands} x {kind}, photometric {page.photometric}: convert it to 8 or 16 bits, grey or RGB"


def _sized(width: int, height: int) -> tuple[int, int]:
    if width * height > LARGEST:
        raise BadImage(f"{width} x {height} px: more than {LARGEST:,} pixels, cut it into tiles")
    if min(width, height) < SMALLEST:
        raise BadImage(f"{width} x {height} px: the short side needs at least {SMALLEST} px")
    return width, height


def _banded(image: Any) -> None:
    """Refuses a TIFF with a band that is neither colour nor alpha (near infrared): it would be dropped in silence."""
    if image.format == "TIFF":
        bands = image.tag_v2.get(277, 1)
        colours = {2: 3, 5: 4, 6: 3, 8: 3}.get(image.tag_v2.get(262), 1)  # RGB, CMYK, YCbCr, Lab; else grey, palette
        extra = image.tag_v2.get(338, ())
        if 2 in image.tag_v2.get(339, ()) and max(image.tag_v2.get(258, (1,))) == 8:
            raise BadImage("signed 8-bit values: convert to unsigned 8 or 16 bits")
        if bands > colours + 1 or (bands == colours + 1 and tuple(extra) not in ((1,), (2,))):
            raise BadImage(f"{bands} bands, {colours} of them colour, the rest not marked as alpha: save 1 or 3 bands")


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


def _deep_tiff(image: Any) -> bool:
    """A TIFF of more than 8 bits a sample, which Pillow would cut to 8 in silence where it has colours."""
    return bool(image.format == "TIFF" and max(image.tag_v2.get(258, (1,))) > 8)


def _from_pillow(image: Any, path: str | Path, range16: Range) -> np.ndarray:
    if image.format == "PNG" and range16 != (0, 65535) and image.mode in ("RGB", "RGBA"):
        with open(path, "rb") as file:
            if file.read(25)[24] == 16:
                raise BadImage("a 16-bit colour PNG cannot be read at a declared range: convert it to TIFF")
    image = ImageOps.exif_transpose(image) if _turned(image) else image
    return as_rgb(image, range16)


def as_rgb(image: Any, range16: Range) -> np.ndarray:
    """A Pillow image as uint8 RGB [H, W, 3], with the conversions of ``decode``.

    Rows are converted some at a time: Pillow takes 4 bytes a pixel, and every whole copy as much again.
    """
    if image.mode.startswith(("I", "F")):
        return _grey(np.asarray(image), range16)
    width, height = image.size
    rows = max(1, BAND // width)
    if rows >= height:
        return _as_rgb(image)
    image.load()
    array = np.empty((height, width, 3), np.uint8)
    for y in range(0, height, rows):
        array[y : y + rows] = _as_rgb(image.crop((0, y, width, min(height, y + rows))))
    return array


def _as_rgb(image: Any) -> np.ndarray:
    if image.mode in ALPHA or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, (*NEUTRAL, 255))
        image = Image.alpha_composite(ground, image)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _turned(image: Any) -> bool:
    try:
        turn: int = image.getexif().get(0x0112, 1)
        return bool(2 <= turn <= 8)
    except Exception:  # damaged EXIF is no reason to refuse the pixels
        return False


def _from_tiff(path: str | Path, range16: Range) -> np.ndarray:
    array, orientation = _tiff_values(path)
    if array.ndim == 3 and array.shape[-1] not in (1, 3, 4):
        raise BadImage(f"{array.shape[-1]} bands: 1, 3 or 4 (with alpha) are read")
    return _upright(_grey(array, range16), orientation)


def _tiff_values(path: str | Path) -> tuple[np.ndarray, int]:
    """What a deep TIFF holds, [H, W] or [H, W, bands] with black at zero, and its orientation."""
    with open(path, "rb") as file:
        data = io.BytesIO(file.read())
    with tifffile.TiffFile(data) as tiff:
        page = tiff.pages.first
        if page.imagedepth > 1:
            raise BadImage(f"a volume of {page.imagedepth} slices: save each slice as an image")
        _sized(page.imagewidth, page.imagelength)
        array = page.asarray()
        if page.planarconfig == 2 and array.ndim == 3:
            array = np.moveaxis(array, 0, -1)
        if page.photometric == 0:  # white is zero
            array = np.iinfo(array.dtype).max - array if array.dtype.kind in "ui" else 1 - array
        orientation = page.tags.get(274)
    return array, orientation.value if orientation else 1


def values(path: str | Path) -> np.ndarray:
    """The numbers in a file as they are stored, palettes as places: any type, [H, W] or [H, W, bands]. Raises BadImage.

    Of 16-bit colour PNGs Pillow keeps the upper eight bits.
    """
    with _opened(path) as image:
        _sized(image.width, image.height)
        try:
            return _tiff_values(path)[0] if _deep_tiff(image) else np.asarray(image)
        except BadImage:
            raise
        except Exception as error:
            raise BadImage(_reason(error)) from None


def _upright(array: np.ndarray, orientation: int) -> np.ndarray:
    if orientation in (2, 4, 5, 7):  # mirrored; what is left is a rotation
        array = array[:, ::-1]
        orientation = {2: 1, 4: 3, 5: 8, 7: 6}[orientation]
    return np.ascontiguousarray(np.rot90(array, {1: 0, 3: 2, 6: -1, 8: 1}.get(orientation, 0)))


def _grey(array: np.ndarray, range16: Range) -> np.ndarray:
    """Integers of more than 8 bits or floats [H, W] or [H, W, bands] -> uint8 RGB [H, W, 3]."""
    values = array[..., None] if array.ndim == 2 else array
    if values.dtype.kind == "f":
        if not np.isfinite(values).all():
            raise BadImage("floating-point image with NaN or infinite values")
        if values.min() < 0 or values.max() > 1:
            raise BadImage(
                f"floating-point values from {values.min():.4g} to {values.max():.4g}: convert to 8 or 16 bits, "
                "or scale to 0..1"
            )
        rgb, clear = np.rint(values.astype(np.float64) * 255).astype(np.uint8), values[..., 3:].astype(np.float64)
    else:
        if values.min() < 0 or values.max() > 65535:
            raise BadImage(f"integer values from {values.min()} to {values.max()}: 0 to 65,535 are read")
        scale = np.clip((np.arange(65536.0) - range16[0]) / (range16[1] - range16[0]), 0, 1)
        rgb, clear = np.rint(scale * 255).astype(np.uint8)[values], scale[values[..., 3:]]
    if rgb.shape[-1] == 4:
        rgb = np.rint(clear * rgb[..., :3] + (1 - clear) * np.array(NEUTRAL)).astype(np.uint8)
    return np.repeat(rgb, 3, axis=-1) if rgb.shape[-1] == 1 else rgb


def _reason(error: Exception) -> str:
    text = str(error).split("\n")[0].strip()
    if "imagecodecs" in text:
        return "a compressed TIFF of more than 8 bits: install what reads it with pip install 'gtsa[tiff]'"
    return f"damaged: {text}" if text else f"damaged: {type(error).__name__}"
