"""Tensors that are spread over processes (--shard), and what of them this process holds."""

from __future__ import annotations

from torch import Tensor


def own(tensor: Tensor) -> Tensor:
    """The part that this process holds, in the same memory: a shard (it may be empty), or the tensor itself.

    Operations that treat every number alike, as the optimiser and the EMA do, need no communication on it.
    """
    to_local = getattr(tensor.detach(), "to_local", None)
    return tensor if to_local is None else to_local()
