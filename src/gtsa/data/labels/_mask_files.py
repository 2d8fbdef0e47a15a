"""Reads PNG masks as numbers."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np

from gtsa.data.images import decoding
from gtsa.data.images.pixels import BadImage

COLOURS = "colours or transparency, not numbers of classes: convert it to grey values or a palette"


class Mask(NamedTuple):
    """What a mask holds, without its pixels."""

    size: tuple[int, int]  # width, height
    values: tuple[int, ...]  # that occur
    pixels: tuple[int, ...]  # number of pixels of each value
    digest: str


def read_mask(path: str) -> Mask | str:
    """A mask, or the reason why it cannot be read."""
    try:
        array = read_values(path)
    except BadImage as reason:
        return str(reason)
    counts = np.bincount(array.ravel())
    values = np.flatnonzero(counts)
    digest = hashlib.sha256(array.astype("<u2").tobytes()).hexdigest()
    return Mask((array.shape[1], array.shape[0]), tuple(values.tolist()), tuple(counts[values].tolist()), digest)


def read_values(path: str) -> np.ndarray:
    """The numbers in a PNG mask, uint8 or uint16 [H, W]. Raises BadImage with the reason."""
    form = decoding.read_header(path).format
    if form != "PNG":
        raise BadImage(f"a {form} image, which does not keep numbers exactly: save masks as PNG")
    with open(path, "rb") as file:
        depth, colours = file.read(26)[24:26]
    if colours not in (0, 3) and depth > 8:
        raise BadImage(COLOURS)
    with decoding.open_image(path) as image:
        try:
            array = np.asarray(image)
        except Exception as error:  # Pillow's decoders raise nearly anything on a damaged file
            raise BadImage(f"damaged: {error}") from None
    if colours == 2 and (array == array[..., :1]).all():
        array = array[..., 0]
    elif colours not in (0, 3):
        raise BadImage(COLOURS)
    if colours == 0 and depth in (2, 4):  # Pillow scales them to 255
        array = array // (255 // (2**depth - 1))
    return array.astype(np.uint16 if depth == 16 else np.uint8)


def black_values(path: str) -> set[int]:
    """The indices of a mask's palette that are black, if it has other colours."""
    with decoding.open_image(path) as image:
        colours = image.getpalette("RGB") if image.mode == "P" else None
    triples = [tuple(colours[i : i + 3]) for i in range(0, len(colours or ()), 3)] if colours else []
    last = max((index for index, colour in enumerate(triples) if any(colour)), default=-1)
    return {index for index, colour in enumerate(triples[: last + 2]) if not any(colour)}
