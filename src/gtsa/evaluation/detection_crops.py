"""Training views of a detector: images cropped and resized, with their boxes and masks."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import masks_to_boxes

from gtsa.data.labels import Boxes
from gtsa.evaluation.heads.mask_rcnn import LONGEST, Target
from gtsa.evaluation.loading import resized


class View(NamedTuple):
    """A window of an image, the size that it is resized to, and whether it is then mirrored."""

    top: int
    left: int
    height: int
    width: int
    size: tuple[int, int]  # height, width
    flip: bool


def draw_view(height: int, width: int, scale: int, rng: np.random.Generator) -> View:
    """A random training view of an image. At a scale of 800 px the sizes are those for COCO.

    Resizing, cropping and resizing again are done as one crop and one resizing, which blurs less.
    """
    flip, crop = (bool(rng.random() < 0.5) for _ in range(2))
    top, left, h, w = 0, 0, height, width
    if crop:
        zoom = rng.integers(scale * 400 // 800, scale * 600 // 800, endpoint=True) / min(height, width)
        h, w = (_crop_side(side, zoom, scale, rng) for side in (height, width))
        top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
    short = int(rng.integers(scale * 480 // 800, scale, endpoint=True))
    return View(top, left, h, w, fit_size(h, w, short, round(LONGEST * scale)), flip)


def _crop_side(side: int, zoom: float, scale: int, rng: np.random.Generator) -> int:
    """A side of the crop, in px of the image."""
    least, most = scale * 384 // 800, min(scale * 600 // 800, int(side * zoom))
    return max(1, min(side, round(int(rng.integers(least, max(least, most), endpoint=True)) / zoom)))


def fit_size(height: int, width: int, short: int, longest: int) -> tuple[int, int]:
    """Height and width for a short side of ``short`` px, or less if the long side would exceed ``longest`` px."""
    zoom = min(short / min(height, width), longest / max(height, width))
    return max(1, round(height * zoom)), max(1, round(width * zoom))


def apply_view(pixels: Tensor, objects: Boxes, view: View) -> tuple[Tensor, Target]:
    """Pixels and objects in a view, without crowds and without objects of which less than a pixel remains."""
    top, left, height, width, size, flip = view
    rows, columns = slice(top, top + height), slice(left, left + width)
    keep = ~objects.crowd
    boxes = objects.boxes[keep] - torch.tensor([left, top, left, top])
    boxes = torch.stack([boxes[:, 0::2].clamp(0, width), boxes[:, 1::2].clamp(0, height)], dim=-1).flatten(1)
    target = {"labels": objects.classes[keep] + 1}
    zoom = torch.tensor([size[1] / width, size[0] / height]).repeat(2)
    if objects.masks is not None:
        masks = objects.masks[keep][:, rows, columns]
        if masks.shape[-2:] != objects.masks.shape[-2:]:  # cropping an object may shrink it more than its box
            boxes = boxes_around(masks)
        masks = masks[:, _nearest(height, size[0])][:, :, _nearest(width, size[1])].byte()
        target["masks"] = masks.flip(-1) if flip else masks
    x1, y1, x2, y2 = boxes.unbind(-1)
    target["boxes"] = torch.stack([width - x2, y1, width - x1, y2] if flip else [x1, y1, x2, y2], dim=-1) * zoom
    remaining = (target["boxes"][:, 2:] - target["boxes"][:, :2] >= 1).all(-1)
    if "masks" in target:
        remaining &= target["masks"].bool().flatten(1).any(-1)
    shown = resized(pixels[:, rows, columns], *size)
    return shown.flip(-1) if flip else shown, {name: value[remaining] for name, value in target.items()}


def _nearest(old: int, new: int) -> Tensor:
    """Nearest-neighbour resizing of ``old`` rows to ``new``: the old index of each new row."""
    return ((torch.arange(new) + 0.5) * (old / new)).long().clamp(max=old - 1)


def boxes_around(masks: Tensor) -> Tensor:
    """The boxes of masks [n, H, W]: [n, 4]; of size 0 if a mask is empty."""
    boxes = torch.zeros(len(masks), 4)
    filled = masks.flatten(1).any(-1)
    if filled.any():
        boxes[filled] = masks_to_boxes(masks[filled]) + torch.tensor([0.0, 0.0, 1.0, 1.0])
    return boxes
