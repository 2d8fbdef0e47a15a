"""What DINO and iBOT share: the head of prototypes, their number and temperatures, and centring."""

from __future__ import annotations

import math

import torch
import torch.distributed as processes
import torch.nn.functional as F
from torch import Tensor, nn

MANY = 20_000  # images from which published settings of prototypes are taken


class PrototypeHead(nn.Module):
    """DINO's head: how like each of K prototypes is a token? [..., D] -> logits [..., K], cosines.

    Three linear layers to a bottleneck, whose direction is compared with that of each prototype: a linear layer with
    weight norm, its magnitudes fixed to 1 (Caron et al. 2021, appendix C).
    """

    def __init__(
        self, width: int, num_prototypes: int = 65536, hidden_dim: int = 2048, bottleneck_dim: int = 256
    ) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.prototypes = nn.Linear(bottleneck_dim, num_prototypes, bias=False)

    def forward(self, tokens: Tensor, frozen: bool = False) -> Tensor:
        """``frozen``: no gradient reaches the prototypes."""
        return self.compared(self.directions(tokens), frozen)

    def directions(self, tokens: Tensor) -> Tensor:
        """[..., D] -> unit vectors [..., bottleneck]."""
        return F.normalize(self.mlp(tokens), dim=-1)

    def compared(self, directions: Tensor, frozen: bool = False) -> Tensor:
        """Directions [..., bottleneck] -> logits [..., K]: linear, so that the mean of logits is that of directions."""
        weight = self.prototypes.weight
        if frozen:
            weight = weight * 0 + weight.detach()  # a gradient of 0: DDP waits for one
        return F.linear(directions, F.normalize(weight, dim=-1))


def prototypes_for(images: int) -> int:
    """65,536 as published for DINO; below 20,000 images a power of two near a quarter of them, from 1,024 to 4,096."""
    return 65536 if images >= MANY else min(4096, max(1024, 2 ** round(math.log2(max(images, 1) / 4))))


def temperatures_for(images: int) -> tuple[float, float]:
    """0.04 and 0.07 as published for DINO and iBOT; below 20,000 images 0.02 throughout (LOG.md)."""
    return (0.04, 0.07) if images >= MANY else (0.02, 0.02)


class Centre(nn.Module):
    """The running mean of a teacher's logits, which is taken off them so that no prototype can win for all images.

    Published order: what a step sees is the mean of the steps before; its own logits join it once the step is done.

    Args:
        prototypes: K.
        momentum: share of the old mean that is kept in a step.
    """

    value: Tensor
    gathered: Tensor

    def __init__(self, prototypes: int, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("value", torch.zeros(prototypes))
        self.register_buffer(
            "gathered", torch.zeros(prototypes + 1), persistent=False
        )  # sum of logits, and their number

    def sharpened(self, logits: Tensor, temperature: float) -> Tensor:
        """What the teacher says, as probabilities [..., K]: logits without their centre, over the temperature."""
        return ((logits - self.value) / temperature).softmax(-1)

    @torch.no_grad()
    def gather(self, logits: Tensor, rows: int | None = None) -> None:
        """Logits [..., K] of a micro-batch; or the mean of ``rows`` of them. Looks teach nothing."""
        if not self.training:
            return
        logits = logits.flatten(0, -2).to(self.gathered.dtype)
        rows = rows or len(logits)
        self.gathered += torch.cat([logits.mean(0) * rows, logits.new_tensor([float(rows)])])

    @torch.no_grad()
    def follow(self, accepted: Tensor | float = 1.0) -> None:
        """Moves towards the mean of what all processes gathered, where ``accepted`` (0/1, on the device) is 1."""
        if processes.is_available() and processes.is_initialized():  # not in ``gather``: one alone may measure a step
            processes.all_reduce(self.gathered)
        mean = self.gathered[:-1] / self.gathered[-1].clamp(min=1)
        change = (1 - self.momentum) * (mean - self.value)
        self.value += torch.where(torch.as_tensor(accepted, device=change.device) > 0, change, 0)
        self.gathered.zero_()
