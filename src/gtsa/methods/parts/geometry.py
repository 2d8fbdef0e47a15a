"""Boxes, quarter-turns and pooling: exact, batched, and differentiable in the maps.

Boxes are (x1, y1, x2, y2) in pixels with x to the right and y down; quarter-turns are counter-clockwise.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gtsa.core.compilation import compilable
from gtsa.core.types import Crops


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """Intersection of boxes ``a`` and ``b`` [..., 4] (broadcast), both in one frame.

    The intersection of disjoint boxes has a negative width or height.
    """
    return torch.cat([torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])], dim=-1)


def inside(boxes: Tensor, crops: Tensor, side: int) -> Tensor:
    """Image boxes [..., 4] in the pixel frame of ``crops`` [..., 4], each resized to a square of ``side`` px."""
    corner = [0, 1, 0, 1]
    scale = side / (crops[..., 2:] - crops[..., :2])
    return (boxes - crops[..., corner]) * scale[..., corner]


def rotate_boxes(boxes: Tensor, rotations: Tensor, side: float) -> Tensor:
    """Boxes [..., 4] in a square of ``side`` after its rotation by ``rotations`` [...] quarter-turns."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    rotated = torch.stack(
        [
            boxes,
            torch.stack([y1, side - x2, y2, side - x1], dim=-1),
            torch.stack([side - x2, side - y2, side - x1, side - y1], dim=-1),
            torch.stack([side - y2, x1, side - y1, x2], dim=-1),
        ],
        dim=-2,
    )
    index = (rotations % 4).expand(boxes.shape[:-1])[..., None, None].expand(*boxes.shape[:-1], 1, 4)
    return rotated.gather(-2, index).squeeze(-2)


def patch_centres(crops: Tensor, rotations: Tensor, side: float, grid: int) -> Tensor:
    """Positions in the image of the centres of a crop's ``grid`` x ``grid`` patches, in the order of its tokens.

    Args:
        crops: [..., 4] in the image, px, each resized to a square of ``side`` px.
        rotations: [...] quarter-turns counter-clockwise of that square.

    Returns:
        [..., grid * grid, 2]: x and y in the image, px.
    """
    centre = (torch.arange(grid, device=crops.device, dtype=crops.dtype) + 0.5) * (side / grid)
    y, x = (values.flatten() for values in torch.meshgrid(centre, centre, indexing="ij"))
    points = torch.stack([x, y, x, y], dim=-1).expand(*rotations.shape, grid * grid, 4)
    upright = rotate_boxes(points, -rotations[..., None], side)[..., :2]
    corner, opposite = crops[..., None, :2], crops[..., None, 2:]
    return corner + upright * ((opposite - corner) / side)


@compilable
def rotate_maps(maps: Tensor, rotations: Tensor) -> Tensor:
    """Square maps [..., s, s, C] rotated by ``rotations`` [...] quarter-turns: exact, no interpolation."""
    side = maps.shape[-2]
    indices = torch.arange(side * side, device=maps.device).reshape(side, side)
    source = torch.stack([torch.rot90(indices, k).flatten() for k in range(4)])  # [4, s*s]
    index = source[rotations % 4][..., None].expand(*rotations.shape, side * side, maps.shape[-1])
    return maps.flatten(-3, -2).gather(-2, index).reshape(maps.shape)


@compilable
def pool(maps: Tensor, boxes: Tensor, cells: int) -> Tensor:
    """RoIAlign (half-pixel aligned, adaptive sampling): every box of every map, as two matrix products.

    RoIAlign is separable, so ``pooled = Wy F Wx^T``. The backward pass has no scatter, so the result is deterministic.
    Equals ``torchvision.ops.roi_align(aligned=True, sampling_ratio=-1)``.

    Args:
        maps: [..., h, w, C].
        boxes: [..., n, 4] in units of map cells: ``n`` boxes for each map.
        cells: the output has cells x cells bins.

    Returns:
        [..., n, cells, cells, C]
    """
    height, width = maps.shape[-3:-1]
    wy = _weights(boxes[..., 1], boxes[..., 3], cells, height).to(maps.dtype)  # [..., n, i, h]
    wx = _weights(boxes[..., 0], boxes[..., 2], cells, width).to(maps.dtype)  # [..., n, j, w]
    rows = torch.einsum("...nih,...hwc->...niwc", wy, maps)
    return torch.einsum("...njw,...niwc->...nijc", wx, rows)


def _weights(low: Tensor, high: Tensor, cells: int, length: int) -> Tensor:
    """The interpolation matrix of RoIAlign along one axis: [..., cells, length] for intervals [low, high)."""
    extent = high - low
    most = max(1, math.ceil(length / cells))  # also where rounding makes a box longer than its map
    samples = torch.ceil(extent / cells).clamp(1, most)  # points a bin
    bin_ = torch.arange(cells, device=low.device)[:, None]
    point = torch.arange(most, device=low.device)
    offset = bin_ + (point + 0.5) / samples[..., None, None]  # [..., cells, most] in bins
    position = low[..., None, None] - 0.5 + offset * (extent / cells)[..., None, None]
    used = (point < samples[..., None, None]) & (position >= -1) & (position <= length)
    position = position.clamp(0, length - 1)
    grid = torch.arange(length, device=low.device)
    hat = (1 - (position[..., None] - grid).abs()).clamp(min=0) * used[..., None]
    return hat.sum(-2) / samples[..., None, None]


def pairs_of(size: int, views: int, seen: int) -> tuple[Tensor, Tensor]:
    """The pairs (view, teacher's crop) of one image that are compared: all but a global crop with itself.

    Args:
        size: 0 for global views, 1 for local ones.
        views: number of these views.
        seen: number of the teacher's crops.

    Returns:
        Two index tensors [pairs].
    """
    apart = torch.ones(views, seen, dtype=torch.bool)
    if size == 0:
        apart.fill_diagonal_(False)
    v, g = apart.nonzero(as_tuple=True)
    return v, g


def regions(view: Crops, seen: Crops) -> tuple[Tensor, Tensor]:
    """The overlap of each view with each teacher's crop, in the pixel frames of both after their rotations.

    Returns:
        Boxes [B, V, G, 4] in the views and [B, G, V, 4] in the teacher's crops.
    """
    common = overlap(view.boxes[:, :, None], seen.boxes[:, None])  # [B, V, G, 4] in the image
    in_view = rotate_boxes(inside(common, view.boxes[:, :, None], view.side), view.rotations[:, :, None], view.side)
    in_seen = rotate_boxes(inside(common, seen.boxes[:, None], seen.side), seen.rotations[:, None], seen.side)
    return in_view, in_seen.transpose(1, 2)


def align(student: Tensor, teacher: Tensor, view: Crops, seen: Crops, cells: int) -> tuple[Tensor, Tensor]:
    """Both maps pooled over the region that a view and a teacher's crop share, in the view's orientation.

    Args:
        student: [B, V, h, w, C] maps of the crops ``view``.
        teacher: [B, G, h, w, D] maps of the crops ``seen``.
        cells: the region is pooled to cells x cells.

    Returns:
        [B, V, G, cells, cells, C] and [B, V, G, cells, cells, D].
    """
    boxes, seen_boxes = regions(view, seen)
    pooled = pool(student, boxes * (student.shape[2] / view.side), cells)
    target = pool(teacher, seen_boxes * (teacher.shape[2] / seen.side), cells)  # [B, G, V, ...]
    rotations = view.rotations[:, None] - seen.rotations[:, :, None]  # [B, G, V]
    return pooled, rotate_maps(target, rotations).transpose(1, 2)
