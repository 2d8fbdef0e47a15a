"""Networks see the crops of a batch as rows; losses see them by image and view."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gtsa.core.types import Crops


def by_view(rows: Tensor, crops: Crops) -> Tensor:
    """Rows of the crops of one size: [B * V, ...] -> [B, V, ...]."""
    return rows.reshape(*crops.rotations.shape, *rows.shape[1:])


def by_size(rows: Tensor, groups: Sequence[Crops]) -> list[Tensor]:
    """Rows of the crops of all sizes -> [B, V, ...] for each size."""
    parts = torch.split(rows, [crops.rotations.numel() for crops in groups])
    return [by_view(part, crops) for part, crops in zip(parts, groups, strict=True)]
