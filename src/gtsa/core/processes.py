"""Statistics of a batch that is spread over several processes, and the times at which one process works alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed

_alone = False


@contextmanager
def alone() -> Iterator[None]:
    """Within it this process computes without the others: a collective operation would wait for them for ever."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def together() -> bool:
    """Whether several processes compute one batch, and so reduce its statistics together."""
    if _alone or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False
    return torch.distributed.get_world_size() > 1
