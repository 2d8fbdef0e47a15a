"""Which patches are masked. Draws come from torch's global generator, which the loop seeds."""

from __future__ import annotations

import math

import torch
from torch import Tensor

ROUNDS = 20  # rectangles that are tried for each map


def blocks(shares: Tensor, side: int, smallest: float = 1 / 9, aspect: float = 0.3) -> Tensor:
    """Masks of rectangles, which are added as long as they fit (BEiT, section 2.2; iBOT, appendix).

    Args:
        shares: [N] largest share of each map to mask.
        side: side of the maps, in patches.
        smallest: smallest share of the map that a rectangle has, unless less is left to mask.
        aspect: smallest ratio of height to width; the largest is its inverse. Drawn log-uniformly.

    Returns:
        bool [N, side, side], True where masked.
    """
    target = (shares.cpu() * side**2).floor()
    masked = torch.zeros(len(shares), side, side, dtype=torch.bool)
    cells = torch.arange(side)
    for draw in torch.rand(ROUNDS, 4, len(shares)):
        left = target - masked.sum((1, 2))
        low = torch.full_like(left, smallest * side**2).minimum(left)
        area, ratio = low + draw[0] * (left - low), torch.exp((2 * draw[1] - 1) * -math.log(aspect))
        height, width = ((area * r).sqrt().round().clamp(1, side) for r in (ratio, 1 / ratio))
        top, start = (draw[2] * (side - height + 1)).floor(), (draw[3] * (side - width + 1)).floor()
        rows, columns = (
            (cells >= first[:, None]) & (cells < (first + length)[:, None])
            for first, length in ((top, height), (start, width))
        )
        block = rows[:, :, None] & columns[:, None]
        fits = ((block & ~masked).sum((1, 2)) <= left) & (left > 0)
        masked |= block & fits[:, None, None]
    return masked


def random_order(count: int, patches: int) -> Tensor:
    """A random permutation of the patches for each of ``count`` images: int64 [count, patches]."""
    return torch.rand(count, patches).argsort(dim=1)
