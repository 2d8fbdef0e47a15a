"""Draws sheets, tiles and captions."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

Hue = tuple[int, int, int]
GAP = 12  # px between pictures

INK, PAPER = (40, 40, 40), (255, 255, 255)


def to_image(pixels: Tensor) -> Image.Image:
    """An image from pixels [H, W, 3], uint8 or in [0, 1]."""
    array = pixels.numpy() if pixels.dtype == torch.uint8 else np.rint(pixels.numpy() * 255).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(array))


def new_sheet(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), PAPER)


def write(sheet: Image.Image, position: tuple[float, float], text: str) -> None:
    ImageDraw.Draw(sheet).text(position, text, fill=INK, font=ImageFont.load_default(14))


def label(draw: ImageDraw.ImageDraw, position: tuple[float, float], text: str, hue: Hue) -> None:
    font = ImageFont.load_default(14)
    x1, y1, x2, y2 = draw.textbbox(position, text, font=font)
    draw.rectangle((x1 - 2, y1 - 2, x2 + 2, y2 + 2), fill=hue)
    draw.text(position, text, fill=INK if sum(hue) > 330 else PAPER, font=font)


def squares(images: list[Tensor], side: int) -> Tensor:
    """The centre square of each uint8 [3, H, W] image, at ``side`` px: [n, 3, side, side] in [0, 1]."""
    cut = []
    for image in images:
        s = min(image.shape[-2:])
        y, x = (image.shape[-2] - s) // 2, (image.shape[-1] - s) // 2
        square = image[None, :, y : y + s, x : x + s].float() / 255
        cut.append(F.interpolate(square, (side, side), mode="bilinear", antialias=True)[0])
    return torch.stack(cut)
