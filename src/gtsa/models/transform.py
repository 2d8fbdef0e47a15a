"""From an image to the input of a backbone: the evaluation transform of timm, as an export of ours declares it."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import cast

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor

from gtsa.core.errors import UserError, escaped
from gtsa.data.decoding import decode
from gtsa.data.pixels import BadImage, as_rgb

INTERPOLATION, CROP_PCT, CROP_MODE = "bilinear", 1.0, "center"  # as config.json of an export says
Picture = str | os.PathLike[str] | Image.Image | Tensor
Normalisation = tuple[tuple[float, ...], tuple[float, ...]]


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


def as_image(picture: Picture) -> Image.Image:
    """An RGB image of a path, a PIL image, or a uint8 tensor [3, H, W].

    Files are read as in training: upright by their EXIF orientation, transparent pixels on neutral grey.

    Raises:
        UserError: it cannot be read (3), or is nothing of these (2).
    """
    if isinstance(picture, str | os.PathLike):
        try:
            return as_image(decode(Path(picture)))
        except BadImage as reason:
            raise UserError(f"{escaped(os.fspath(picture))}: {reason}; repair it, or give another image", 3) from None
    if isinstance(picture, Image.Image):
        try:
            return Image.fromarray(as_rgb(picture, (0, 65535)))
        except (BadImage, OSError) as reason:
            raise UserError(f"the image cannot be read: {reason}", 3) from None
    if isinstance(picture, Tensor) and picture.dtype == torch.uint8 and picture.ndim == 3 and picture.shape[0] == 3:
        return Image.fromarray(np.ascontiguousarray(picture.permute(1, 2, 0).cpu().numpy()))
    kind = f"{picture.dtype} {tuple(picture.shape)}" if isinstance(picture, Tensor) else ""
    raise UserError(
        f"an image is a path, a PIL image or a uint8 tensor [3, H, W], not a {type(picture).__name__} {kind}".strip()
    )
