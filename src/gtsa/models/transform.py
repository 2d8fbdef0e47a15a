"""From an image to the input of a backbone: the evaluation transform of timm, as an export of ours declares it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor

from gtsa.core.errors import UserError, escaped
from gtsa.data.images.decoding import decode
from gtsa.data.images.pixels import BadImage, Range, as_rgb

INTERPOLATION, CROP_PCT, CROP_MODE = "bilinear", 1.0, "center"  # as config.json of an export says
Picture = str | os.PathLike[str] | Image.Image | Tensor
FULL_RANGE: Range = (0, 65535)
Normalisation = tuple[tuple[float, ...], tuple[float, ...]]


def input_size(sides: Sequence[int], patch: int) -> tuple[int, int]:
    """Height and width of a network's input. Raises UserError unless these are one or two multiples of the patch."""
    if len(sides) not in (1, 2) or any(side < patch or side % patch for side in sides):
        nearest = " ".join(str(max(1, round(side / patch)) * patch) for side in sides[:2])
        given = " ".join(map(str, sides))
        raise UserError(
            f"--size {given}: one side, or height and width, multiples of the patch of {patch} px; use {nearest}"
        )
    return sides[0], sides[-1]


@cache
def eval_transform(size: tuple[int, int], normalisation: Normalisation) -> Callable[[Image.Image], Tensor]:
    """timm's evaluation transform: the short side is resized, the centre is cut, and pixels are normalised.

    Args:
        size: height and width of the result, px.
        normalisation: mean and deviation a channel, of pixels in [0, 1].

    Returns:
        A function from an RGB image to floats [3, height, width].
    """
    mean, std = normalisation
    transform = create_transform(
        (3, *size),
        is_training=False,
        interpolation=INTERPOLATION,
        mean=mean,
        std=std,
        crop_pct=CROP_PCT,
        crop_mode=CROP_MODE,
    )
    return cast(Callable[[Image.Image], Tensor], transform)


def as_image(picture: Picture, range16: Range = FULL_RANGE) -> Image.Image:
    """An RGB image of a path, a PIL image, or a uint8 tensor [3, H, W].

    Files are read as in training: upright by their EXIF orientation, transparent pixels on neutral grey.

    Args:
        range16: values of 16-bit images that become black and white.

    Raises:
        UserError: it cannot be read (3), or is nothing of these (2).
    """
    if isinstance(picture, str | os.PathLike):
        try:
            return as_image(decode(Path(picture), range16=range16))
        except BadImage as reason:
            raise UserError(f"{escaped(os.fspath(picture))}: {reason}; repair it, or give another image", 3) from None
    if isinstance(picture, Image.Image):
        try:
            return Image.fromarray(as_rgb(picture, range16))
        except (BadImage, OSError) as reason:
            raise UserError(f"the image cannot be read: {reason}", 3) from None
    if isinstance(picture, Tensor) and picture.dtype == torch.uint8 and picture.shape[:-2] == (3,) and picture.numel():
        return Image.fromarray(np.ascontiguousarray(picture.permute(1, 2, 0).cpu().numpy()))
    kind = f"{picture.dtype} {tuple(picture.shape)}" if isinstance(picture, Tensor) else ""
    raise UserError(
        f"an image is a path, a PIL image or a uint8 tensor [3, H, W], not a {type(picture).__name__} {kind}".strip()
    )


# What a file states about the preparation of images


def parse_normalisation(mean: Iterable[float], std: Iterable[float]) -> Normalisation:
    """Mean and deviation as plain numbers. Raises ValueError unless both are valid for three channels."""
    both = tuple(float(value) for value in mean), tuple(float(value) for value in std)
    if not len(both[0]) == len(both[1]) == 3 or not all(map(math.isfinite, both[0])) or not min(both[1]) > 0:
        raise ValueError(f"mean {mean} and deviation {std} are not of three channels")
    return both


def parse_range16(values: Mapping[str, Any]) -> Range:
    """The range of 16-bit images in ``values``. Raises ValueError unless it is two numbers, black below white."""
    black, white = map(float, values.get("range16", FULL_RANGE))
    if not -math.inf < black < white < math.inf:
        raise ValueError(f"range16 {black:g} {white:g} is no range")
    return black, white
