"""The endless, reproducible stream of views: the images of each step, and the workers that cut their views."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from gtsa.core.errors import UserError
from gtsa.core.seeds import Stream, epoch_order, generator
from gtsa.core.types import Crops, Draw, Replaced, Views
from gtsa.data.multicrop import MultiCrop
from gtsa.data.pixels import SMALLEST, BadImage
from gtsa.data.sources import Detail

DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


class StepSampler(Sampler[list[Draw]]):
    """The draws of each micro-batch of this rank, from step ``start`` to ``steps``.

    The stream of images continues from epoch to epoch. Step ``s`` takes positions s * batch to (s + 1) * batch, in
    turn for each micro-batch and each rank. So every image is used, and the stream does not depend on the number of
    workers or processes.
    """

    def __init__(
        self, images: int, batch: int, steps: int, start: int = 0, rank: int = 0, ranks: int = 1, accumulate: int = 1
    ) -> None:
        if batch % (ranks * accumulate):
            raise UserError(f"--batch-size {batch} does not divide over {ranks} processes x {accumulate} micro-batches")
        self.images, self.batch, self.steps, self.start = images, batch, steps, start
        self.rank, self.ranks, self.accumulate = rank, ranks, accumulate

    def __len__(self) -> int:
        return (self.steps - self.start) * self.accumulate

    def __iter__(self) -> Iterator[list[Draw]]:
        size = self.batch // (self.ranks * self.accumulate)
        for step in range(self.start, self.steps):
            for micro in range(self.accumulate):
                first = step * self.batch + (micro * self.ranks + self.rank) * size
                yield [Draw(*divmod(position, self.images)) for position in range(first, first + size)]


class NoImageLeft(UserError):
    """No image can be read. The type alone holds code and message: torch brings back no more from a worker."""

    def __init__(self, _: str = "") -> None:
        super().__init__("no image of the run can be read any more; is the folder still there?", 3)


class Readable(Protocol):
    """The part of a source that the stream uses."""

    def read(self, index: int, detail: Detail | None = None) -> Tensor: ...


class ViewSet(Dataset[Views]):
    """Draw -> Views of one image. ``indices`` are the images of the source that are used.

    An image that cannot be read is replaced by the next one in the epoch's order, with its own views, and recorded in
    ``Views.replaced``.
    """

    def __init__(
        self, source: Readable, indices: Sequence[int], multicrop: MultiCrop, seed: int, stream: int = Stream.VIEWS
    ) -> None:
        self.source, self.indices, self.multicrop = source, np.asarray(indices), multicrop
        self.seed, self.stream = seed, stream

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, draw: Draw) -> Views:
        order = epoch_order(self.seed, draw.epoch, len(self.indices))
        failed: list[tuple[int, str]] = []
        for attempt in range(len(self.indices)):
            image = int(self.indices[order[(draw.position + attempt) % len(self.indices)]])
            try:
                pixels = self.source.read(image, self.multicrop.detail)
                if min(pixels.shape[-2:]) < SMALLEST:
                    raise BadImage(f"{pixels.shape[-1]} x {pixels.shape[-2]} px: needs at least {SMALLEST} px a side")
            except BadImage as reason:
                failed.append((image, str(reason)))
                continue
            views = self.multicrop(pixels, generator(self.seed, self.stream, attempt, image, draw.epoch))
            replaced = [Replaced(bad, why, image) for bad, why in failed]
            return Views.of(views.groups, torch.tensor([image]), replaced)
        raise NoImageLeft


def collate(views: list[Views]) -> Views:
    """Views of one image each -> Views of a batch."""
    groups = []
    for crops in zip(*(v.groups for v in views), strict=True):
        groups.append(
            Crops(
                *(torch.cat([getattr(c, part) for c in crops]) for part in ("pixels", "boxes", "rotations", "colours"))
            )
        )
    return Views.of(groups, torch.cat([v.images for v in views]), [r for v in views for r in v.replaced])


def loader(views: ViewSet, sampler: Sampler[list[Draw]], workers: int, pin: bool = False) -> DataLoader[Views]:
    """Batches of uint8 views, in order, the same for any number of workers."""
    return DataLoader(
        views,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin,
        prefetch_factor=4 if workers else None,
        generator=torch.Generator().manual_seed(0),  # else iter() draws from the global one
        timeout=600 if workers else 0,
        multiprocessing_context="fork"
        if workers and sys.platform == "linux"
        else None,  # bind_to_parent and stops rely on fork
        worker_init_fn=partial(bind_to_parent, os.getpid()),
    )


def bind_to_parent(parent: int, _: int = 0) -> None:
    """Makes a worker end whenever its parent ends, and leaves signals to the process group to the parent."""
    os.setpgid(0, 0)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended already
        os._exit(1)
