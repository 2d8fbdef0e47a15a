"""Pixels: limits of size, value ranges, and conversion to 8-bit RGB."""

from __future__ import annotations

import numpy as np
from PIL import Image

LARGEST = 2**27  # pixels; larger images are refused by their header
SMALLEST = 16  # px of the short side: one patch
NEUTRAL = (124, 116, 104)  # background of transparent pixels: ImageNet's mean, which normalises to 0
ALPHA = {"RGBA", "LA", "PA", "La", "RGBa"}
BAND = 2**22  # pixels that are converted at a time

Range = tuple[float, float]  # values of 16-bit images that become black and white


class BadImage(Exception):
    """An image that cannot be used; the message is the reason, without the path."""


def check_size(width: int, height: int) -> tuple[int, int]:
    """Raises BadImage for an image that is too large or too small."""
    if width * height > LARGEST:
        raise BadImage(f"{width} x {height} px: more than {LARGEST:,} pixels, cut it into tiles")
    if min(width, height) < SMALLEST:
        raise BadImage(f"{width} x {height} px: the short side needs at least {SMALLEST} px")
    return width, height


def as_rgb(image: Image.Image, range16: Range) -> np.ndarray:
    """A Pillow image as uint8 RGB [H, W, 3], with the conversions of ``decode``; it may be read-only.

    Rows are converted in bands to save memory: Pillow takes 4 bytes a pixel, and every copy as much again.
    """
    if image.mode.startswith(("I", "F")):
        return to_8_bits(np.asarray(image), range16)
    width, height = image.size
    rows = max(1, BAND // width)
    if rows >= height:
        return _as_rgb(image)
    image.load()
    array = np.empty((height, width, 3), np.uint8)
    for y in range(0, height, rows):
        array[y : y + rows] = _as_rgb(image.crop((0, y, width, min(height, y + rows))))
    return array


def _as_rgb(image: Image.Image) -> np.ndarray:
    if image.mode in ALPHA or "transparency" in image.info:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, (*NEUTRAL, 255))
        image = Image.alpha_composite(background, image)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def upright(array: np.ndarray, orientation: int) -> np.ndarray:
    """The array rotated and mirrored by an EXIF orientation."""
    if orientation in (2, 4, 5, 7):  # undo the mirroring; a rotation remains
        array = array[:, ::-1]
        orientation = {2: 1, 4: 3, 5: 8, 7: 6}[orientation]
    return np.ascontiguousarray(np.rot90(array, {1: 0, 3: 2, 6: -1, 8: 1}.get(orientation, 0)))


def to_8_bits(array: np.ndarray, range16: Range) -> np.ndarray:
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
        rgb, alpha = np.rint(values.astype(np.float64) * 255).astype(np.uint8), values[..., 3:].astype(np.float64)
    else:
        if values.min() < 0 or values.max() > 65535:
            raise BadImage(f"integer values from {values.min()} to {values.max()}: 0 to 65,535 are read")
        scale = np.clip((np.arange(65536.0) - range16[0]) / (range16[1] - range16[0]), 0, 1)
        rgb, alpha = np.rint(scale * 255).astype(np.uint8)[values], scale[values[..., 3:]]
    if rgb.shape[-1] == 4:
        rgb = np.rint(alpha * rgb[..., :3] + (1 - alpha) * np.array(NEUTRAL)).astype(np.uint8)
    return np.repeat(rgb, 3, axis=-1) if rgb.shape[-1] == 1 else rgb
