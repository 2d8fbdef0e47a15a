"""The endless, reproducible stream of views: the images of each step, and the workers that cut their views."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from gtsa.core.errors import UserError
from gtsa.core.seeds import Stream, epoch_order, generator
from gtsa.core.types import Crops, Draw, Replaced, Uncut, Views
from gtsa.data.batches.batch_memory import BatchMemory
from gtsa.data.batches.image_memory import ImageMemory
from gtsa.data.images.pixels import SMALLEST, BadImage
from gtsa.data.sources import Detail
from gtsa.data.views import augment_crop, device_cut
from gtsa.data.views.multicrop import MultiCrop

Normalisation = tuple[tuple[float, ...], tuple[float, ...]]  # mean and standard deviation of each channel, in [0, 1]
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
        for step in range(self.start, self.steps):
            for micro in range(self.accumulate):
                first = step * self.batch + (micro * self.ranks + self.rank) * self.size
                yield [Draw(*divmod(position, self.images)) for position in range(first, first + self.size)]

    @property
    def size(self) -> int:
        """Images of a micro-batch of a rank."""
        return self.batch // (self.ranks * self.accumulate)


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

    Args:
        normalisation: mean and standard deviation of each channel. Views are then floats after ``augment``, else uint8
            as cut.
        memory: keeps decoded images; None: every epoch decodes them again.
        cuts: False leaves the cutting to ``augment.apply``.
    """

    def __init__(
        self,
        source: Readable,
        indices: Sequence[int],
        multicrop: MultiCrop,
        seed: int,
        stream: int = Stream.VIEWS,
        normalisation: Normalisation | None = None,
        memory: ImageMemory | None = None,
        cuts: bool = True,
    ) -> None:
        assert cuts or normalisation is None
        self.source, self.indices, self.multicrop = source, np.asarray(indices), multicrop
        self.seed, self.stream, self.normalisation = seed, stream, normalisation
        self.memory, self.cuts = memory, cuts

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, draw: Draw) -> Views:
        return self.batch([draw])

    def batch(self, draws: Sequence[Draw], memory: Tensor | None = None) -> Views:
        """The views of several draws. Crops are written where they stay: in ``memory``, ``bytes(len(draws))`` of it."""
        if not self.cuts:
            return collate([self._uncut(draw) for draw in draws])
        if memory is None:
            memory = torch.empty(self.bytes(len(draws)), dtype=torch.uint8)
        pixels, parts = self.arrange(memory), []
        cut = self.multicrop.memory(1)  # where crops are finished they stay in the processor's cache until then
        for row, draw in enumerate(draws):
            image, rng, replaced, index = self._read(draw)
            targets = [group[row : row + 1] for group in pixels]
            views = self.multicrop(image, rng, cut if self.normalisation else targets)
            if self.normalisation:
                for crops, target in zip(views.groups, targets, strict=True):
                    augment_crop.finish(crops, *self.normalisation, out=target)
            parts.append(Views.of(views.groups, torch.tensor([index]), replaced))
        return _joined(parts, pixels)

    def _uncut(self, draw: Draw) -> Views:
        image, rng, replaced, index = self._read(draw)
        crops, mirrored = self.multicrop.draw(image.shape[-1], image.shape[-2], rng)
        return Views.of(crops, torch.tensor([index]), replaced, Uncut(image.movedim(0, -1)[None], mirrored))

    def bytes(self, images: int) -> int:
        """Bytes of the pixels of a batch."""
        return images * sum(self._bytes_by_size)

    @property
    def _bytes_by_size(self) -> list[int]:
        """Bytes of an image's crops."""
        return [(4 if self.normalisation else 1) * 3 * n * side**2 for n, side in self.multicrop.shapes]

    def arrange(self, memory: Tensor) -> list[Tensor]:
        """The pixels of a batch by size, [B, n, 3, S, S], in ``memory``."""
        images, kind = len(memory) // self.bytes(1), torch.float32 if self.normalisation else torch.uint8
        parts = torch.split(memory, [images * size for size in self._bytes_by_size])
        shapes = [(images, n, 3, side, side) for n, side in self.multicrop.shapes]
        return [part.view(kind).view(shape) for part, shape in zip(parts, shapes, strict=True)]

    def _read(self, draw: Draw) -> tuple[Tensor, np.random.Generator, list[Replaced], int]:
        """The image of a draw, or of the next one that can be read: pixels, random numbers, replacements, its index."""
        order = epoch_order(self.seed, draw.epoch, len(self.indices))
        failed: list[tuple[int, str]] = []
        for attempt in range(len(self.indices)):
            image = int(self.indices[order[(draw.position + attempt) % len(self.indices)]])
            try:
                pixels = self._decoded(image)
            except BadImage as reason:
                failed.append((image, str(reason)))
                continue
            rng = generator(self.seed, self.stream, attempt, image, draw.epoch)
            return pixels, rng, [Replaced(bad, why, image) for bad, why in failed], image
        raise NoImageLeft

    def _decoded(self, image: int) -> Tensor:
        """An image of the source, from memory if it is there. Raises BadImage."""
        pixels = self.memory.get(image) if self.memory else None
        if pixels is None:
            pixels = self.source.read(image, self.multicrop.detail)
            if min(pixels.shape[-2:]) < SMALLEST:
                raise BadImage(f"{pixels.shape[-1]} x {pixels.shape[-2]} px: needs at least {SMALLEST} px a side")
            if self.memory:
                self.memory.put(image, pixels)
        return pixels


def collate(views: list[Views]) -> Views:
    """Views of one image each -> Views of a batch."""
    return _joined(
        views, [torch.cat([c.pixels for c in crops]) for crops in zip(*(v.groups for v in views), strict=True)]
    )


def _joined(views: list[Views], pixels: Sequence[Tensor]) -> Views:
    """A batch of views whose pixels, by size, lie in ``pixels`` already."""
    groups = []
    for batch, crops in zip(pixels, zip(*(v.groups for v in views), strict=True), strict=True):
        parts = (torch.cat([getattr(c, part) for c in crops]) for part in ("boxes", "rotations", "colours"))
        groups.append(Crops(batch, *parts))
    replaced = [r for v in views for r in v.replaced]
    return Views.of(groups, torch.cat([v.images for v in views]), replaced, device_cut.joined(views))


class _Batches(Dataset[Views]):
    """Draws of a batch -> its Views, in memory that is used in turns."""

    def __init__(self, views: ViewSet, memory: BatchMemory | None) -> None:
        self.views, self.memory = views, memory

    def __len__(self) -> int:
        return len(self.views)

    def __getitems__(self, draws: list[Draw]) -> Views:
        return self.views.batch(draws, self.memory.take() if self.memory else None)

    def send(self, batch: Any) -> Any:
        """The collate function of the DataLoader; the batch is whole already."""
        return self.memory.send(batch) if self.memory else batch


def loader(views: ViewSet, sampler: StepSampler, workers: int, pin: bool = False) -> DataLoader[Views]:
    """Batches of views, in order, the same for any number of workers."""
    ahead = 4 if views.normalisation is None else 2  # batches of a worker; floats are four times as large
    forked = workers > 0 and sys.platform == "linux"
    memory = None
    if views.cuts and (forked or not workers):
        with suppress(OSError):
            memory = BatchMemory(workers * ahead + sampler.accumulate + 2, views.bytes(sampler.size), views.arrange)
    batches = _Batches(views, memory)
    return DataLoader(
        batches,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=batches.send,
        pin_memory=pin,
        prefetch_factor=ahead if workers else None,
        generator=torch.Generator().manual_seed(0),  # else iter() draws from the global one
        timeout=600 if workers else 0,
        multiprocessing_context="fork" if forked else None,  # bind_to_parent and stops rely on fork
        worker_init_fn=partial(bind_to_parent, os.getpid()),
    )


def bind_to_parent(parent: int, _: int = 0) -> None:
    """Makes a worker end whenever its parent ends, and leaves signals to the process group to the parent."""
    os.setpgid(0, 0)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended already
        os._exit(1)
