"""What a detector is trained on: images cut and resized, with their boxes and masks."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import masks_to_boxes

from gtsa.data.labels import Boxes
from gtsa.evaluation.features import resized
from gtsa.evaluation.heads.mask_rcnn import LONGEST, Target


class View(NamedTuple):
    """A window of an image, the size that it is brought to, and whether it is then mirrored."""

    top: int
    left: int
    height: int
    width: int
    size: tuple[int, int]  # height, width
    flip: bool


def draw(height: int, width: int, scale: int, rng: np.random.Generator) -> View:
    """The view of an image in training. Sizes are those of COCO at a scale of 800 px.

    Resizing, cropping and resizing again are done as one crop and one resizing, which blurs less.
    """
    flip, crop = (bool(rng.random() < 0.5) for _ in range(2))
    top, left, h, w = 0, 0, height, width
    if crop:
        zoom = rng.integers(scale * 400 // 800, scale * 600 // 800, endpoint=True) / min(height, width)
        h, w = (_cut(side, zoom, scale, rng) for side in (height, width))
        top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
    short = int(rng.integers(scale * 480 // 800, scale, endpoint=True))
    return View(top, left, h, w, fitted(h, w, short, round(LONGEST * scale)), flip)


def _cut(side: int, zoom: float, scale: int, rng: np.random.Generator) -> int:
    """A side of the crop, in px of the image."""
    least, most = scale * 384 // 800, min(scale * 600 // 800, int(side * zoom))
    return max(1, min(side, round(int(rng.integers(least, max(least, most), endpoint=True)) / zoom)))


def fitted(height: int, width: int, short: int, longest: int) -> tuple[int, int]:
    """Height and width with a short side of ``short``, or less where the long side would pass ``longest``."""
    zoom = min(short / min(height, width), longest / max(height, width))
    return max(1, round(height * zoom)), max(1, round(width * zoom))


def seen(pixels: Tensor, things: Boxes, view: View) -> tuple[Tensor, Target]:
    """Pixels and things as a view shows them; crowds, and things of which less than a pixel is left, are not in it."""
    top, left, height, width, size, flip = view
    rows, columns = slice(top, top + height), slice(left, left + width)
    keep = ~things.crowd
    boxes = things.boxes[keep] - torch.tensor([left, top, left, top])
    boxes = torch.stack([boxes[:, 0::2].clamp(0, width), boxes[:, 1::2].clamp(0, height)], dim=-1).flatten(1)
    target = {"labels": things.classes[keep] + 1}
    zoom = torch.tensor([size[1] / width, size[0] / height]).repeat(2)
    if things.masks is not None:
        masks = things.masks[keep][:, rows, columns]
        if masks.shape[-2:] != things.masks.shape[-2:]:  # what is left of a thing may be less than its box's part
            boxes = around(masks)
        masks = masks[:, _nearest(height, size[0])][:, :, _nearest(width, size[1])].byte()
        target["masks"] = masks.flip(-1) if flip else masks
    x1, y1, x2, y2 = boxes.unbind(-1)
    target["boxes"] = torch.stack([width - x2, y1, width - x1, y2] if flip else [x1, y1, x2, y2], dim=-1) * zoom
    left_over = (target["boxes"][:, 2:] - target["boxes"][:, :2] >= 1).all(-1)
    if "masks" in target:
        left_over &= target["masks"].bool().flatten(1).any(-1)
    shown = resized(pixels[:, rows, columns], *size)
    return shown.flip(-1) if flip else shown, {name: value[left_over] for name, value in target.items()}


def _nearest(given: int, wanted: int) -> Tensor:
    """Which of ``given`` rows lies nearest to each of ``wanted``."""
    return ((torch.arange(wanted) + 0.5) * (given / wanted)).long().clamp(max=given - 1)


def around(masks: Tensor) -> Tensor:
    """The boxes of masks [n, H, W]: [n, 4]; of no size where a mask is empty."""
    boxes = torch.zeros(len(masks), 4)
    there = masks.flatten(1).any(-1)
    if there.any():
        boxes[there] = masks_to_boxes(masks[there]) + torch.tensor([0.0, 0.0, 1.0, 1.0])
    return boxes
