"""Controls: features without any training, which a method has to beat. Evaluations use them like backbones."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gtsa.core.types import Tokens
from gtsa.models.backbone import IMAGENET, Encoder

BINS = 9  # of unsigned gradient orientations


class Control(Encoder):
    """Patch features computed by a formula. They are the output of every block; there are no prefix tokens."""

    num_prefix_tokens, patch_size = 0, 0
    normalisation, fingerprint = IMAGENET, "none"

    def __init__(self, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.nothing = nn.Parameter(torch.zeros(0), requires_grad=False)  # empty; it holds the device

    def compute_patches(self, images: Tensor) -> Tensor:
        """Normalised images [N, 3, H, W] -> features of patches [N, h, w, D]."""
        raise NotImplementedError

    @property
    def embed_dim(self) -> int:
        side = 2 * self.patch_size
        return self.compute_patches(torch.zeros(1, 3, side, side, device=self.nothing.device)).shape[-1]

    def forward(self, images: Tensor) -> Tokens:
        return self.blocks(images)[-1]

    def blocks(self, images: Tensor, which: Sequence[int] = (), norm: bool = True) -> list[Tokens]:
        patches = self.compute_patches(images.float())
        return [Tokens(patches, patches.new_zeros(len(patches), 0, patches.shape[-1]))] * max(1, len(which))


class ColourAndEdges(Control):
    """Mean colour and histogram of oriented gradients (Dalal and Triggs 2005) of each quarter of a patch.

    The histograms have nine unsigned orientations, weighted by magnitude; those of a patch together have unit length.
    """

    def compute_patches(self, images: Tensor) -> Tensor:
        mean, std = (torch.tensor(v, device=images.device)[:, None, None] for v in self.normalisation)
        pixels = images * std + mean
        grey = pixels.mean(1, keepdim=True)
        padded_x = F.pad(grey, (1, 1, 0, 0), mode="replicate")
        padded_y = F.pad(grey, (0, 0, 1, 1), mode="replicate")
        dx, dy = padded_x[..., 2:] - padded_x[..., :-2], padded_y[..., 2:, :] - padded_y[..., :-2, :]
        magnitude = (dx.square() + dy.square()).sqrt()
        angle = torch.remainder(torch.atan2(dy, dx), math.pi) * (BINS / math.pi)  # in bins
        bins = torch.arange(BINS, device=images.device)[:, None, None]
        distance = (angle - bins - 0.5).abs()
        distance = torch.minimum(distance, BINS - distance)
        histograms = (1 - distance).clamp(min=0) * magnitude  # linear interpolation between neighbouring bins
        edges = F.normalize(self._average_quarters(histograms), dim=-1)
        return torch.cat([self._average_quarters(pixels) - 0.5, edges], dim=-1)

    def _average_quarters(self, maps: Tensor) -> Tensor:
        """Means over the four quarters of each patch: [N, C, H, W] -> [N, h, w, 4 C]."""
        half = self.patch_size // 2
        means = F.avg_pool2d(maps, half, half)
        h, w = maps.shape[-2] // self.patch_size, maps.shape[-1] // self.patch_size
        means = means[..., : 2 * h, : 2 * w].unflatten(-2, (h, 2)).unflatten(-1, (w, 2))  # type: ignore[no-untyped-call]
        return means.permute(0, 2, 4, 3, 5, 1).flatten(3)  # type: ignore[no-any-return]


class Position(Control):
    """Position of a patch, without its content: sines and cosines of row and column, half a period to four."""

    def compute_patches(self, images: Tensor) -> Tensor:
        h, w = images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size
        rows, columns = ((torch.arange(n, device=images.device) + 0.5) / n for n in (h, w))
        frequencies = 2 * math.pi * torch.tensor([0.5, 1, 2, 4], device=images.device)
        of_rows, of_columns = (
            torch.cat([(p[:, None] * frequencies).sin(), (p[:, None] * frequencies).cos()], dim=1)
            for p in (rows, columns)
        )
        positions = torch.cat([of_rows[:, None].expand(h, w, -1), of_columns[None].expand(h, w, -1)], dim=-1)
        return positions.expand(len(images), h, w, -1)


CONTROLS: dict[str, type[Control]] = {"colour": ColourAndEdges, "position": Position}
