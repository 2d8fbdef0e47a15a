"""Means over all processes, for losses that are not a mean over the images of a batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gtsa.core.processes import together


def count() -> int:
    """Number of processes that compute a loss together."""
    return torch.distributed.get_world_size() if together() else 1


def mean(values: Tensor) -> Tensor:
    """The mean of ``values`` over all processes, which all have to call it. Gradients flow through it.

    Every process has its own loss, and the gradients of all processes are averaged (DDP, FSDP). So the gradient of
    ``values`` is the mean of all processes' gradients of the result. Within ``core.processes.alone``: ``values``.
    """
    if not together():
        return values
    result: Tensor = _Mean.apply(values)
    return result


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, values: Tensor) -> Tensor:
        return _mean(values)

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return _mean(gradient)


def _mean(values: Tensor) -> Tensor:
    total = values.clone(memory_format=torch.contiguous_format)
    torch.distributed.all_reduce(total)
    return total / torch.distributed.get_world_size()
