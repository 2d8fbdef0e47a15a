"""What DINO and iBOT share: the head of prototypes, the teacher's targets, presets, checks of settings, and metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gtsa.core import processes
from gtsa.core.compilation import compilable
from gtsa.core.errors import UserError
from gtsa.methods.parts import losses
from gtsa.methods.parts.sinkhorn import sinkhorn

MANY = 20_000  # images from which the published settings of prototypes are used


class PrototypeHead(nn.Module):
    """DINO's head: cosine similarities of a token with K prototypes, [..., D] -> logits [..., K].

    Three linear layers lead to a bottleneck, whose direction is compared with that of each prototype: a linear layer
    with weight norm, its magnitudes fixed to 1 (Caron et al. 2021, appendix C).
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

    @compilable
    def forward(self, tokens: Tensor, frozen: bool = False) -> Tensor:
        """``frozen``: no gradient reaches the prototypes."""
        return self.compare(self.directions(tokens), frozen)

    def directions(self, tokens: Tensor) -> Tensor:
        """[..., D] -> unit vectors [..., bottleneck]."""
        return F.normalize(self.mlp(tokens), dim=-1)

    def compare(self, directions: Tensor, frozen: bool = False) -> Tensor:
        """Directions [..., bottleneck] -> logits [..., K]. This is linear: the mean direction gives the mean logits."""
        weight = self.prototypes.weight
        if frozen:
            weight = weight * 0 + weight.detach()  # a gradient of 0: DDP waits for one
        return F.linear(directions, F.normalize(weight, dim=-1))


class Centre(nn.Module):
    """Makes targets of a teacher's logits, such that no prototype wins for all images: by centring, or by Sinkhorn.

    Centring subtracts the running mean of the logits. Published order: a step uses the mean of the steps before it. Its
    own logits are added once the step is done.

    Args:
        prototypes: K.
        momentum: share of the old mean that is kept in a step.
        targets: centering (DINO), or sinkhorn (DINOv2), which keeps no mean.
    """

    value: Tensor
    accumulated: Tensor

    def __init__(
        self, prototypes: int, momentum: float = 0.9, targets: Literal["centering", "sinkhorn"] = "centering"
    ) -> None:
        super().__init__()
        self.momentum, self.targets = momentum, targets
        self.register_buffer("value", torch.zeros(prototypes))
        sums = torch.zeros(prototypes + 1)  # sum of logits, and their number
        self.register_buffer("accumulated", sums, persistent=False)

    def sharpened(self, logits: Tensor, temperature: float) -> Tensor:
        """The teacher's probabilities [..., K]: softmax of centred logits over the temperature, or Sinkhorn."""
        if self.targets == "sinkhorn":
            return sinkhorn(logits.flatten(0, -2), temperature).reshape(logits.shape)
        return ((logits - self.value) / temperature).softmax(-1)

    @torch.no_grad()
    def accumulate(self, logits: Tensor, rows: int | None = None) -> None:
        """Adds logits [..., K] of a micro-batch, or the mean of ``rows`` logits. Does nothing in evaluation mode."""
        if not self.training or self.targets == "sinkhorn":
            return
        logits = logits.flatten(0, -2).to(self.accumulated.dtype)
        rows = rows or len(logits)
        self.accumulated += torch.cat([logits.mean(0) * rows, logits.new_tensor([float(rows)])])

    @torch.no_grad()
    def update(self, accepted: Tensor | float = 1.0) -> None:
        """Moves towards the mean of the accumulated logits, where ``accepted`` (0/1, on the device) is 1."""
        mean = self.accumulated[:-1] / self.accumulated[-1].clamp(min=1)
        change = (1 - self.momentum) * (mean - self.value)
        self.value += torch.where(torch.as_tensor(accepted, device=change.device) > 0, change, 0)
        self.accumulated.zero_()


def update_centres(centres: Sequence[Centre], accepted: Tensor | float = 1.0) -> None:
    """``Centre.update`` of each, with the logits of all processes: one all-reduce for all centres."""
    centres = [centre for centre in centres if centre.targets == "centering"]
    if centres and processes.together():
        sums = torch.cat([centre.accumulated for centre in centres])
        torch.distributed.all_reduce(sums)
        parts = torch.split(sums, [len(centre.accumulated) for centre in centres])
        for centre, total in zip(centres, parts, strict=True):
            centre.accumulated.copy_(total)
    for centre in centres:
        centre.update(accepted)


# Presets from the number of images


def prototypes_for(images: int) -> int:
    """65,536 as published for DINO; below 20,000 images a power of two near a quarter of them, from 1,024 to 4,096."""
    return 65536 if images >= MANY else min(4096, max(1024, 2 ** round(math.log2(max(images, 1) / 4))))


def temperatures_for(images: int) -> tuple[float, float]:
    """0.04 and 0.07 as published for DINO and iBOT; below 20,000 images 0.02 throughout (LOG.md)."""
    return (0.04, 0.07) if images >= MANY else (0.02, 0.02)


# Checks of settings


def check_head(method: str, sizes: Sequence[int], temperatures: Sequence[float], model: str, prefix: int) -> None:
    """Raises UserError where the head cannot be built, or the encoder has no CLS token.

    Args:
        sizes: numbers of prototypes and widths.
        temperatures: of student and teacher.
        model: name of the encoder's model.
        prefix: number of its tokens before the patches.
    """
    if min(sizes) < 1:
        raise UserError(f"{method}: num_prototypes, hidden_dim and bottleneck_dim must be at least 1")
    if min(temperatures) <= 0:
        raise UserError(f"{method}: temperatures must be above 0; published are 0.1, and 0.04 to 0.07")
    if not prefix:
        raise UserError(f"{method} reads the CLS token, and {model} has none; choose a model that has one")


def check_shares(method: str, **shares: float) -> None:
    """Raises UserError where a share, a probability or a time is not in [0, 1]."""
    if not all(0 <= share <= 1 for share in shares.values()):
        raise UserError(f"{method}: {', '.join(shares)}: from 0 to 1")


# Metrics of held-out views


def diagnose(students: Sequence[Tensor], teacher: Tensor, centre: Centre, temperature: float) -> dict[str, Tensor]:
    """Metrics of CLS logits, per image: {name: [B]}.

    ``image_score`` is ``losses.view_matching``: the student's output for a view against the teacher's output for
    another view. ``teacher_information`` is ``losses.mutual_information`` of the teacher's assignments.

    Args:
        students: logits [B, V, K] for each size of views.
        teacher: logits [B, G, K].
        temperature: of the teacher's softmax.
    """
    return {
        "image_score": losses.view_matching(students, teacher),
        "teacher_information": losses.mutual_information(centre.sharpened(teacher, temperature)),
    }
