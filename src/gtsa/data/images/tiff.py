"""TIFFs with depths and bands that Pillow reduces or drops."""

from __future__ import annotations

import io

import numpy as np
import tifffile
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from gtsa.data.images.blobs import File, open_file
from gtsa.data.images.pixels import BadImage, Range, check_size, to_8_bits, upright


def describe(path: File) -> str | None:
    """The content of a TIFF that Pillow cannot read; None if tifffile cannot read it either."""
    try:
        with open_file(path) as file, tifffile.TiffFile(file) as tiff:
            page = tiff.pages.first
            bands, kind = int(page.samplesperpixel), str(page.dtype)
    except Exception:
        return None
    if bands not in (1, 3, 4):
        return f"{bands} bands: 1, 3 or 4 (with alpha) are read"
    return f"a TIFF of {bands} x {kind}, photometric {page.photometric}: convert it to 8 or 16 bits, grey or RGB"


def refuse_bands(image: Image.Image) -> None:
    """Refuses a TIFF with a band that is neither colour nor alpha (near infrared): Pillow drops it silently."""
    if isinstance(image, TiffImageFile):
        bands = image.tag_v2.get(277, 1)
        colours = {2: 3, 5: 4, 6: 3, 8: 3}.get(image.tag_v2.get(262, 0), 1)  # RGB, CMYK, YCbCr, Lab; else grey, palette
        extra = image.tag_v2.get(338, ())
        if 2 in image.tag_v2.get(339, ()) and max(image.tag_v2.get(258, (1,))) == 8:
            raise BadImage("signed 8-bit values: convert to unsigned 8 or 16 bits")
        if bands > colours + 1 or (bands == colours + 1 and tuple(extra) not in ((1,), (2,))):
            raise BadImage(f"{bands} bands, {colours} of them colour, the rest not marked as alpha: save 1 or 3 bands")


def is_deep(image: Image.Image) -> bool:
    """Whether it is a TIFF of more than 8 bits a sample. Pillow reduces colours to 8 bits without a message."""
    return bool(isinstance(image, TiffImageFile) and max(image.tag_v2.get(258, (1,))) > 8)


def read(path: File, range16: Range) -> np.ndarray:
    array, orientation = read_values(path)
    if array.ndim == 3 and array.shape[-1] not in (1, 3, 4):
        raise BadImage(f"{array.shape[-1]} bands: 1, 3 or 4 (with alpha) are read")
    return upright(to_8_bits(array, range16), orientation)


def read_values(path: File) -> tuple[np.ndarray, int]:
    """The values of a deep TIFF, [H, W] or [H, W, bands] with black at zero, and its orientation."""
    with open_file(path) as file:
        data = io.BytesIO(file.read())
    with tifffile.TiffFile(data) as tiff:
        page = tiff.pages.first
        if page.imagedepth > 1:
            raise BadImage(f"a volume of {page.imagedepth} slices: save each slice as an image")
        check_size(page.imagewidth, page.imagelength)
        array = page.asarray()
        if page.planarconfig == 2 and array.ndim == 3:
            array = np.moveaxis(array, 0, -1)
        if page.photometric == 0:  # white is zero
            array = np.iinfo(array.dtype).max - array if array.dtype.kind in "ui" else 1 - array
        orientation = page.tags.get(274)
    return array, orientation.value if orientation else 1
