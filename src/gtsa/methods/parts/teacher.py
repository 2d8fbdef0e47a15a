"""The teacher: a copy of the student that follows it slowly."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
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
