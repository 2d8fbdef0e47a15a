"""Memory that batches are written to and the trainer reads them from: taken once, then used in turns.

New memory for every batch would cost as much time as cutting its views on some systems: each page is cleared and
mapped, in the worker and in the trainer.
"""

from __future__ import annotations

import mmap
import multiprocessing
import sys
import weakref
from collections.abc import Callable
from itertools import count

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from gtsa.core.types import Crops, Replaced, Views

Arrange = Callable[[Tensor], list[Tensor]]  # bytes of a batch -> the pixels in them, by size of the crops
Plain = tuple[list[list[np.ndarray]], np.ndarray, list[Replaced]]  # a batch without its pixels
_MEMORIES: weakref.WeakValueDictionary[int, BatchMemory] = weakref.WeakValueDictionary()
_numbers = count()


class BatchMemory:
    """Slots of shared memory, each for a batch. Made before workers are forked, which then use the same as the trainer.

    A slot is free again when the trainer holds no tensor of its batch any more. If none is free, a batch takes memory
    of its own.

    Args:
        slots: batches that workers and trainer hold at a time.
        size: bytes of a batch.

    Raises:
        OSError: the system gives no memory.
    """

    def __init__(self, slots: int, size: int, arrange: Arrange) -> None:
        self.size, self.arrange, self.number = size, arrange, next(_numbers)
        self.bytes = np.frombuffer(mmap.mmap(-1, slots * size), np.uint8).reshape(slots, size)
        self.taken = np.frombuffer(mmap.mmap(-1, slots), np.uint8)
        self.lock = multiprocessing.get_context("fork" if sys.platform == "linux" else None).Lock()
        self.slot: int | None = None  # of the batch that this process makes
        _MEMORIES[self.number] = self

    def take(self) -> Tensor:
        """Memory for the pixels of a batch, as bytes."""
        with self.lock:
            free = np.flatnonzero(self.taken == 0)
            self.slot = int(free[0]) if len(free) else None
            if self.slot is None:
                return torch.empty(self.size, dtype=torch.uint8)
            self.taken[self.slot] = 1
        return torch.from_numpy(self.bytes[self.slot])

    def send(self, batch: Views) -> Views | _Sent:
        """What becomes of a batch that was written to memory from ``take``: a worker hands over its place only."""
        if self.slot is None:
            return batch
        groups = [[part.numpy() for part in (c.boxes, c.rotations, c.colours)] for c in batch.groups]
        sent = _Sent(self.number, self.slot, (groups, batch.images.numpy(), batch.replaced))
        return sent if get_worker_info() is not None else self.receive(sent.slot, sent.plain)

    def receive(self, slot: int, plain: Plain) -> Views:
        """The batch in a slot, which is free again when the last tensor of the batch is gone."""
        pixels = np.frombuffer(self.bytes[slot].data, np.uint8)
        weakref.finalize(pixels, self._free, slot).atexit = False
        groups, images, replaced = plain
        parts = [map(torch.from_numpy, group) for group in groups]
        made = [Crops(p, *part) for p, part in zip(self.arrange(torch.from_numpy(pixels)), parts, strict=True)]
        return Views.of(made, torch.from_numpy(images), replaced)

    def _free(self, slot: int) -> None:
        self.taken[slot] = 0


class _Sent:
    """A batch on its way from a worker: it arrives as Views."""

    def __init__(self, number: int, slot: int, plain: Plain) -> None:
        self.number, self.slot, self.plain = number, slot, plain

    def __reduce__(self) -> tuple[Callable[..., Views], tuple[int, int, Plain]]:
        return _received, (self.number, self.slot, self.plain)


def _received(number: int, slot: int, plain: Plain) -> Views:
    return _MEMORIES[number].receive(slot, plain)
