"""The EMA teacher: a copy of the student, whose weights are a moving average of the student's."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from gtsa.core.shards import own

M = TypeVar("M", bound=nn.Module)


def copy_of(student: M) -> M:
    """A copy of the student as its teacher: no gradients, in evaluation mode (so without drop path)."""
    return copy.deepcopy(student).requires_grad_(False).eval()


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, momentum: float, accepted: Tensor | float = 1.0) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student, where ``accepted`` (0/1, on the device) is 1."""
    averages, weights = ([own(p.detach()) for p in network.parameters()] for network in (teacher, student))
    assert len(averages) == len(weights)
    change = list(torch._foreach_sub(weights, averages))
    factor = torch.as_tensor((1 - momentum) * accepted, dtype=averages[0].dtype, device=averages[0].device)
    torch._foreach_mul_(change, factor)
    torch._foreach_add_(averages, change)
