"""Sheets, tiles and captions of pictures."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

Hue = tuple[int, int, int]

INK, PAPER = (40, 40, 40), (255, 255, 255)


def to_image(pixels: Tensor) -> Image.Image:
    """[H, W, 3], uint8 or in [0, 1]."""
    array = pixels.numpy() if pixels.dtype == torch.uint8 else np.rint(pixels.numpy() * 255).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(array))


def new_sheet(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), PAPER)


def write(sheet: Image.Image, place: tuple[float, float], text: str) -> None:
    ImageDraw.Draw(sheet).text(place, text, fill=INK, font=ImageFont.load_default(14))


def label(draw: ImageDraw.ImageDraw, place: tuple[float, float], text: str, hue: Hue) -> None:
    font = ImageFont.load_default(14)
    x1, y1, x2, y2 = draw.textbbox(place, text, font=font)
    draw.rectangle((x1 - 2, y1 - 2, x2 + 2, y2 + 2), fill=hue)
    draw.text(place, text, fill=INK if sum(hue) > 330 else PAPER, font=font)
