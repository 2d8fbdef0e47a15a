"""The simple feature pyramid: from a ViT's maps, which all have one stride, to maps at four strides for dense heads."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class Pyramid(nn.Module):
    """Four maps at the patch's stride -> four maps at strides patch / 4, patch / 2, patch and 2 patch.

    Two transposed convolutions, one, none, and max pooling change the strides; then a 1x1 and a 3x3 convolution, each
    with a norm, change the channels (ViTDet, arXiv 2203.16527, section 3; there all four come from the last block).

    Args:
        width: channels of the input maps.
        out: channels of the output maps.
        flat: all four keep the patch's stride.
    """

    def __init__(self, width: int, out: int = 256, flat: bool = False) -> None:
        super().__init__()
        scaled = [(nn.Identity(), width)] * 4 if flat else _scaled(width)
        self.levels = nn.ModuleList(
            nn.Sequential(
                scale,
                nn.Conv2d(channels, out, 1, bias=False),
                ChannelNorm(out),
                nn.Conv2d(out, out, 3, padding=1, bias=False),
                ChannelNorm(out),
            )
            for scale, channels in scaled
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Four [N, width, h, w], shallow to deep -> [N, out, H, W] with (H, W) of (4 h, 4 w), (2 h, 2 w), (h, w) and
        half of that, rounded up; or four times (h, w) if flat."""
        return [level(x) for level, x in zip(self.levels, maps, strict=True)]


class ChannelNorm(nn.Module):
    """Layer norm over the channels at each position: [N, C, H, W] -> the same shape."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=1e-6)

    def forward(self, maps: Tensor) -> Tensor:
        normed: Tensor = self.norm(maps.permute(0, 2, 3, 1))
        return normed.permute(0, 3, 1, 2)


class _Half(nn.Module):
    """Max pooling to half the size, rounded up."""

    def forward(self, maps: Tensor) -> Tensor:
        return F.max_pool2d(maps, 2, ceil_mode=True)


def _scaled(width: int) -> list[tuple[nn.Module, int]]:
    """Layers from the patch's stride to each of the four strides, and their output channels."""
    half, quarter = width // 2, width // 4
    quadruple = nn.Sequential(
        nn.ConvTranspose2d(width, half, 2, stride=2), ChannelNorm(half), nn.GELU(),
        nn.ConvTranspose2d(half, quarter, 2, stride=2),
    )  # fmt: skip
    return [
        (quadruple, quarter),
        (nn.ConvTranspose2d(width, half, 2, stride=2), half),
        (nn.Identity(), width),
        (_Half(), width),
    ]
