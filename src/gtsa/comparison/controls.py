"""Features that nothing was learnt for: what a method has to beat. They look like backbones to an evaluation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gtsa.core.types import Tokens
from gtsa.models.backbone import IMAGENET, Encoder

BINS = 9  # of unsigned edge orientations


class Control(Encoder):
    """``see`` makes patch tokens of images; every block says the same, and there is no token beside the patches."""

    num_prefix_tokens, patch_size = 0, 0
    normalisation, fingerprint = IMAGENET, "none"

    def __init__(self, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.nothing = nn.Parameter(torch.zeros(0), requires_grad=False)  # says where it lies

    def see(self, images: Tensor) -> Tensor:
        """Normalised images [N, 3, H, W] -> [N, h, w, width]."""
        raise NotImplementedError

    @property
    def embed_dim(self) -> int:
        return self.see(torch.zeros(1, 3, 2 * self.patch_size, 2 * self.patch_size, device=self.nothing.device)).shape[
            -1
        ]

    def forward(self, images: Tensor) -> Tokens:
        return self.blocks(images)[-1]

    def blocks(self, images: Tensor, which: Sequence[int] = (), norm: bool = True) -> list[Tokens]:
        patches = self.see(images.float())
        return [Tokens(patches, patches.new_zeros(len(patches), 0, patches.shape[-1]))] * max(1, len(which))


class ColourAndEdges(Control):
    """Mean colours of each quarter of a patch, and of each quarter a histogram of oriented gradients (Dalal and Triggs
    2005): nine unsigned orientations, weighed by magnitude, each patch of unit length.
    """

    def see(self, images: Tensor) -> Tensor:
        half = self.patch_size // 2
        mean, std = (torch.tensor(v, device=images.device)[:, None, None] for v in self.normalisation)
        pixels = images * std + mean
        grey = pixels.mean(1, keepdim=True)
        across = F.pad(grey, (1, 1, 0, 0), mode="replicate")
        down = F.pad(grey, (0, 0, 1, 1), mode="replicate")
        x, y = across[..., 2:] - across[..., :-2], down[..., 2:, :] - down[..., :-2, :]
        size, angle = (x.square() + y.square()).sqrt(), torch.remainder(torch.atan2(y, x), math.pi) * (BINS / math.pi)
        bins = torch.arange(BINS, device=images.device)[:, None, None]
        apart = (angle - bins - 0.5).abs()
        share = (1 - torch.minimum(apart, BINS - apart)).clamp(min=0) * size  # shared between neighbouring bins
        edges = F.normalize(self._quarters(share, half), dim=-1)
        return torch.cat([self._quarters(pixels, half) - 0.5, edges], dim=-1)

    def _quarters(self, maps: Tensor, half: int) -> Tensor:
        """Means over the four quarters of each patch: [N, C, H, W] -> [N, h, w, 4 C]."""
        cells = F.avg_pool2d(maps, half, half)
        h, w = maps.shape[-2] // self.patch_size, maps.shape[-1] // self.patch_size
        cells = cells[..., : 2 * h, : 2 * w].unflatten(-2, (h, 2)).unflatten(-1, (w, 2))  # type: ignore[no-untyped-call]
        return cells.permute(0, 2, 4, 3, 5, 1).flatten(3)  # type: ignore[no-any-return]


class Position(Control):
    """Where a patch lies, and nothing of what it shows: sines and cosines of row and column, from one turn to eight."""

    def see(self, images: Tensor) -> Tensor:
        h, w = images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size
        rows, columns = ((torch.arange(n, device=images.device) + 0.5) / n for n in (h, w))
        turns = 2 * math.pi * torch.tensor([0.5, 1, 2, 4], device=images.device)
        down, across = (
            torch.cat([(p[:, None] * turns).sin(), (p[:, None] * turns).cos()], dim=1) for p in (rows, columns)
        )
        found = torch.cat([down[:, None].expand(h, w, -1), across[None].expand(h, w, -1)], dim=-1)
        return found.expand(len(images), h, w, -1)


CONTROLS: dict[str, type[Control]] = {"colour": ColourAndEdges, "position": Position}
