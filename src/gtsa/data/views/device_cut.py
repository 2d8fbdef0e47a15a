"""Crops cut on the training device: workers only decode, and whole images travel.

Resizing the box of a crop with antialiased bilinear interpolation is two matrix products, one an axis. The crops equal
those of ``MultiCrop`` to one grey level: the CPU rounds after either axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gtsa.core.types import Crops, Uncut, Views

LARGEST = 2**26  # numbers that are computed at a time


def padded(images: Sequence[Tensor]) -> Tensor:
    """Images uint8 [3, H, W] of any sizes -> [B, H, W, 3] of the largest; boxes lie within the images."""
    height, width = (max(image.shape[axis] for image in images) for axis in (-2, -1))
    out = torch.zeros(len(images), height, width, 3, dtype=torch.uint8)
    for image, target in zip(images, out, strict=True):
        target[: image.shape[-2], : image.shape[-1]] = image.movedim(0, -1)
    return out


def cut(views: Views, device: torch.device) -> Views:
    """Views whose crops are still to be cut -> views with uint8 crops on ``device``."""
    uncut = views.uncut
    assert uncut is not None
    pixels = uncut.pixels.to(device, non_blocking=True)
    groups = [
        replace(crops, pixels=_cut(pixels, crops, mirrored))
        for crops, mirrored in zip(views.groups, uncut.mirrored, strict=True)
    ]
    return Views.of(groups, views.images, views.replaced)


def _cut(images: Tensor, crops: Crops, mirrored: Tensor) -> Tensor:
    """Crops of one size: [B, n, 3, S, S]."""
    (_, height, width, _), side, n = images.shape, crops.side, crops.count
    boxes = crops.boxes.to(images.device, torch.float32, non_blocking=True)
    mirrored = mirrored.to(images.device, non_blocking=True)
    at_once = max(1, LARGEST // (3 * n * side * max(height, width)))
    parts = []
    for first in range(0, len(images), at_once):
        some, box, flip = (tensor[first : first + at_once] for tensor in (images, boxes, mirrored))
        rows = _weights(box[..., 1], box[..., 3], side, height)
        columns = _weights(box[..., 0], box[..., 2], side, width)
        columns = torch.where(flip[..., None, None], columns.flip(-2), columns)
        lines = some.movedim(-1, 2).float().flatten(2)  # [b, H, 3 W]
        lines = torch.bmm(rows.flatten(1, 2), lines).view(-1, side * 3, width)  # [b n, S 3, W]
        values = torch.bmm(lines, columns.flatten(0, 1).mT).round_().clamp_(0, 255)
        parts.append(values.to(torch.uint8).view(-1, n, side, 3, side).movedim(3, 2))
    return torch.cat(parts)


def _weights(first: Tensor, last: Tensor, side: int, length: int) -> Tensor:
    """Weights of the pixels of an axis in those of crops from ``first`` to ``last`` [b, n]: [b, n, side, length]."""
    scale = ((last - first) / side)[..., None, None]
    places = torch.arange(length, device=first.device) + 0.5
    centres = first[..., None, None] + scale * (torch.arange(side, device=first.device) + 0.5)[:, None]
    weights = (1 - (places - centres).abs() / scale.clamp(min=1)).clamp(min=0)
    weights = weights * ((places > first[..., None, None]) & (places < last[..., None, None]))
    return weights / weights.sum(-1, keepdim=True)


def joined(views: Sequence[Views]) -> Uncut | None:
    """What is still to be cut of several views; None where they are cut."""
    parts = [view.uncut for view in views if view.uncut is not None]
    if not parts:
        return None
    images = [image.movedim(-1, 0) for part in parts for image in part.pixels]
    return Uncut(padded(images), [torch.cat(same) for same in zip(*(part.mirrored for part in parts), strict=True)])
