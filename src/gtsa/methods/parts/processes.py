"""Means over all processes, for losses that are not a mean over the images of a batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as processes
from torch import Tensor

_alone = False


def count() -> int:
    """Number of processes that compute a loss together."""
    together = not _alone and processes.is_available() and processes.is_initialized()
    return processes.get_world_size() if together else 1


@contextmanager
def alone() -> Iterator[None]:
    """Within it this process computes losses by itself. For what the other processes do not do, or they would wait."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def mean(values: Tensor) -> Tensor:
    """The mean of ``values`` over all processes, which all have to call it. Gradients flow through it.

    Every process has its own loss, and the gradients of all processes are averaged (DDP, FSDP). So the gradient of
    ``values`` is the mean of all processes' gradients of the result.
    """
    if count() == 1:
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
    processes.all_reduce(total)
    return total / processes.get_world_size()
