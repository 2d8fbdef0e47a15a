"""Pictures of a report: maps above an image, marked patches, tiles with captions."""

from __future__ import annotations

import io

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from gtsa.core import html
from gtsa.core.drawing import to_image
from gtsa.core.html import Markup

SIDE = 256  # of a picture, px
HEAT = torch.tensor([[0.20, 0.05, 0.35], [0.75, 0.20, 0.35], [0.98, 0.60, 0.15], [1.0, 0.98, 0.65]])  # from 0 to 1


def contrasting(gallery: Tensor, grid: int) -> list[tuple[int, int]]:
    """The cell (row, column) of each image with the largest contrast, away from the border."""
    grey = gallery.mean(1, keepdim=True)
    mean, square = (F.adaptive_avg_pool2d(values, grid) for values in (grey, grey**2))
    contrast = F.avg_pool2d(square - mean**2, 3, 1, 1)[:, 0]
    edge = max(1, grid // 8)
    inner = torch.zeros_like(contrast)
    inner[:, edge:-edge, edge:-edge] = contrast[:, edge:-edge, edge:-edge] + 1e-9
    return [divmod(int(index), grid) for index in inner.flatten(1).argmax(1)]


def heated(image: Tensor, heat: Tensor) -> Image.Image:
    """A grey image [3, s, s] with a map [h, w] above it: at 0 and below transparent, at 1 yellow."""
    grey = F.interpolate(image.mean(0)[None, None], (SIDE, SIDE), mode="bilinear", antialias=True)[0, 0]
    smooth = F.interpolate(heat[None, None].float(), (SIDE, SIDE), mode="bicubic")[0, 0].clamp(0, 1)
    position = smooth * (len(HEAT) - 1)
    low = position.floor().long().clamp(max=len(HEAT) - 2)
    colour = torch.lerp(HEAT[low], HEAT[low + 1], (position - low)[..., None])
    alpha = (smooth * 1.2).clamp(max=0.9)[..., None]
    return to_image((1 - alpha) * (0.75 * grey[..., None]).expand(-1, -1, 3) + alpha * colour)


def framed(picture: Image.Image, cell: tuple[int, int], grid: int, chosen: bool) -> Image.Image:
    """A square around a cell; a thick one around the chosen patch."""
    (row, column), size = cell, SIDE / grid
    box = [column * size - size / 2, row * size - size / 2, (column + 1) * size + size / 2, (row + 1) * size + size / 2]
    pen = ImageDraw.Draw(picture)
    for grow, colour, width in ((2, (0, 0, 0), 2), (0, (255, 255, 255), 4 if chosen else 2)):
        pen.rectangle((box[0] - grow, box[1] - grow, box[2] + grow, box[3] + grow), outline=colour, width=width)
    return picture


def tile(picture: Tensor | Image.Image, alt: str, caption: html.Text) -> Markup:
    drawn = to_image(picture.cpu()) if isinstance(picture, Tensor) else picture
    return html.figure(tile_image(drawn, alt, SIDE), caption)


def tile_image(picture: Image.Image, alt: str, most: int) -> Markup:
    picture.thumbnail((most, most))
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=88, subsampling=0, optimize=True)
    return html.image(data.getvalue(), alt, picture.size)
