"""Draws sheets, tiles and captions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

Hue = tuple[int, int, int]
Box = tuple[float, float, float, float]  # x1, y1, x2, y2, px
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


def label_boxes(draw: ImageDraw.ImageDraw, labels: Iterable[tuple[str, Box, Hue]]) -> list[Box]:
    """Writes a text inside each box, where it covers no earlier text: at a corner if that is free.

    Returns:
        The area of each text.
    """
    taken: list[Box] = []
    font = ImageFont.load_default(14)
    for text, box, hue in labels:
        left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
        width, height = right - left + 4, bottom - top + 4
        area = min(_places(box, width, height), key=lambda place: sum(_shared(place, other) for other in taken))
        draw.rectangle(area, fill=hue)
        position = area[0] + 2 - left, area[1] + 2 - top
        draw.text(position, text, fill=INK if sum(hue) > 330 else PAPER, font=font)
        taken.append(area)
    return taken


def _places(box: Box, width: float, height: float) -> Iterator[Box]:
    """Areas inside a box, 4 px from its edges: its corners first."""
    x1, y1, x2, y2 = box[0] + 4, box[1] + 4, max(box[0] + 4, box[2] - 4 - width), max(box[1] + 4, box[3] - 4 - height)
    for down, right in [*product((0, 1), (0, 1)), *product((0, 0.25, 0.5, 0.75, 1), (0.25, 0.5, 0.75, 0, 1))]:
        x, y = x1 + right * (x2 - x1), y1 + down * (y2 - y1)
        yield x, y, x + width, y + height


def _shared(one: Box, other: Box) -> float:
    """The area that two boxes share."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, width) * max(0.0, height)


def squares(images: list[Tensor], side: int) -> Tensor:
    """The centre square of each uint8 [3, H, W] image, at ``side`` px: [n, 3, side, side] in [0, 1]."""
    cut = []
    for image in images:
        s = min(image.shape[-2:])
        y, x = (image.shape[-2] - s) // 2, (image.shape[-1] - s) // 2
        square = image[None, :, y : y + s, x : x + s].float() / 255
        cut.append(F.interpolate(square, (side, side), mode="bilinear", antialias=True)[0])
    return torch.stack(cut)
