"""Semantic FPN: segmentation on a pyramid of patch tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gtsa.core.compilation import compilable
from gtsa.evaluation.heads.feature_pyramid import Pyramid
from gtsa.models.backbone import Backbone


class SemanticFPN(nn.Module):
    """Normalised pixels [N, 3, H, W] -> scores [N, classes, h, w], cells of a quarter patch (one patch if flat).

    Four blocks, at a quarter, half, three quarters and all of the depth, give a pyramid of 256 channels. Its levels go
    through convolutions of 128 channels, each followed by upsampling to the next level, and are summed (Panoptic
    Feature Pyramid Networks, arXiv 1901.02446, section 3.1).
    """

    def __init__(self, backbone: Backbone, classes: int, flat: bool) -> None:
        super().__init__()
        self.backbone = backbone.requires_grad_()
        for block in backbone.vit.blocks:
            block.forward = partial(_run, type(block).forward, block)
        self.which = [math.ceil(len(backbone.vit.blocks) * quarter / 4) - 1 for quarter in (1, 2, 3, 4)]
        self.pyramid = Pyramid(backbone.embed_dim, 256, flat)
        self.levels = nn.ModuleList(
            nn.ModuleList(_convolution(128 if deep else 256, 128) for deep in range(max(1, level)))
            for level in range(4)
        )
        self.drop = nn.Dropout2d(0.1)
        self.classify = nn.Conv2d(128, classes, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        blocks = self.backbone.blocks(pixels, self.which)
        total = self.fused([tokens.patches.permute(0, 3, 1, 2) for tokens in blocks])
        return self.classify(self.drop(total))  # type: ignore[no-any-return]

    @compilable
    def fused(self, blocks: list[Tensor]) -> Tensor:
        """Maps of the four blocks [N, D, h, w] -> the sum of the pyramid's levels [N, 128, 4 h, 4 w], or of h x w."""
        maps = self.pyramid(blocks)
        total = torch.zeros_like(maps[0][:, :1])
        for level, (convolutions, x) in enumerate(zip(self.levels, maps, strict=True)):
            for done, convolution in enumerate(cast(nn.ModuleList, convolutions)):
                above = maps[max(0, level - 1 - done)].shape[-2:]
                x = F.interpolate(convolution(x), above, mode="bilinear", align_corners=False)
            total = total + x
        return total


@compilable
def _run(forward: Callable[..., Tensor], block: nn.Module, *arguments: Any, **options: Any) -> Tensor:
    """timm's own forward pass of a block, which is part of its pass for tokens of several blocks."""
    return forward(block, *arguments, **options)


def _convolution(width: int, out: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(width, out, 3, padding=1, bias=False), nn.GroupNorm(32, out), nn.ReLU())
