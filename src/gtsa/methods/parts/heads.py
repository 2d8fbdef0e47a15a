"""GTSA's heads on top of an encoder. Maps are [N, h, w, C] throughout, so that a norm needs no copy of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gtsa.core.compilation import compilable


class ConvBlock(nn.Module):
    """3x3 convolution, LayerNorm over channels without affine, GELU: [N, h, w, C] -> [N, h, w, D]."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width_in, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 stays so; statistics are in float32
            return F.gelu(F.layer_norm(x, x.shape[-1:], eps=1e-5))


class GridProjector(nn.Module):
    """Projector U: two blocks, with a residual connection where the widths agree, then a 1x1 convolution."""

    def __init__(self, width_in: int, hidden: int = 384, out: int = 768) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([ConvBlock(width_in, hidden), ConvBlock(hidden, hidden)])
        self.proj = nn.Conv2d(hidden, out, 1)
        self.apply(_initialise)

    @compilable
    def forward(self, maps: Tensor) -> Tensor:
        """[N, h, w, D] -> [N, h, w, out]"""
        x = maps
        for block in self.blocks:
            y = block(x)
            x = x + y if y.shape == x.shape else y
        return _pointwise(self.proj, x)


class GridPredictor(nn.Module):
    """Predictor H (student only): one block without a residual connection, then a 1x1 convolution."""

    def __init__(self, width: int = 768, hidden: int = 768) -> None:
        super().__init__()
        self.block = ConvBlock(width, hidden)
        self.proj = nn.Conv2d(hidden, width, 1)
        self.apply(_initialise)

    @compilable
    def forward(self, maps: Tensor) -> Tensor:
        """[N, h, w, C] -> [N, h, w, C]"""
        return _pointwise(self.proj, self.block(maps))


class RotationHead(nn.Sequential):
    """Head P predicts the rotation of a view: [N, D] mean patch tokens -> [N, 4] logits."""

    def __init__(self, width: int, hidden: int = 768, bottleneck: int = 128) -> None:
        super().__init__(
            nn.Linear(width, hidden),
            nn.LayerNorm(hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.LayerNorm(hidden),
            nn.GELU(),
            nn.Linear(hidden, bottleneck),
            nn.LayerNorm(bottleneck),
            nn.Linear(bottleneck, 4),
        )


def _pointwise(conv: nn.Conv2d, maps: Tensor) -> Tensor:
    """A 1x1 convolution as a matrix product: [N, h, w, C] -> [N, h, w, D]."""
    return F.linear(maps, conv.weight.flatten(1), conv.bias)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
