"""The teacher: a copy of the student that follows it slowly."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
import torch.distributed as processes
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def copy_of(student: M) -> M:
    """A teacher that starts as the student: no gradients, in evaluation mode (so without drop path)."""
    return copy.deepcopy(student).requires_grad_(False).eval()


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, momentum: float, accepted: Tensor | float = 1.0) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student, where ``accepted`` (0/1, on the device) is 1."""
    mine, theirs = ([p.detach() for p in network.parameters()] for network in (teacher, student))
    assert len(mine) == len(theirs)
    change = list(torch._foreach_sub(theirs, mine))
    torch._foreach_mul_(change, torch.as_tensor((1 - momentum) * accepted, dtype=mine[0].dtype, device=mine[0].device))
    torch._foreach_add_(mine, change)


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
