"""The views of a run's images: who cuts and finishes them, what stays in memory, and which make each batch."""

from __future__ import annotations

import sys

import torch
from lightning_fabric import Fabric
from torch.utils.data import DataLoader

from gtsa.core.errors import UserError
from gtsa.core.seeds import Stream
from gtsa.core.types import Method, Views
from gtsa.data.batches.image_memory import ImageMemory, memory_for
from gtsa.data.batches.jpeg_cache import JpegCache
from gtsa.data.batches.loader import Normalisation, Readable, StepSampler, ViewSet, loader
from gtsa.data.run_images import RunImages
from gtsa.data.views import augment
from gtsa.models.backbone import Backbone
from gtsa.pretraining.settings import Pretrain


class Batches:
    """The training views of a run, as one of its processes sees them. Raises UserError (2) where --cache has no effect.

    Where a CPU trains, those who read images finish the views too: they do it beside the step, or as part of the time
    that a step waits for data. A GPU finishes them itself.
    """

    def __init__(self, settings: Pretrain, images: RunImages, method: Method, device: torch.device) -> None:
        self.settings, self.images, self.device = settings, images, device
        student = method.encoders["student"]
        assert isinstance(student, Backbone)
        self.normalisation: Normalisation = student.normalisation
        self.source: Readable = images.source
        if settings.cache:
            if len(images.source) and images.source.path(0) is None:
                raise UserError("--cache is for image files; leave it out with tar shards and datasets")
            self.source = JpegCache(images.source, settings.cache, settings.multicrop, settings.decoder)

    def prepare(self, views: Views) -> Views:
        """Brings views to the device, augmented."""
        return augment.apply(views, self.device, *self.normalisation)

    def views(self, memory: ImageMemory | None = None) -> ViewSet:
        """The views of the training images, which ``memory`` keeps once they are decoded."""
        settings, images, cuts = self.settings, self.images, self.settings.cut == "host"
        normalisation = self.normalisation if cuts and self.device.type == "cpu" else None
        return ViewSet(
            self.source, images.train, settings.multicrop, settings.seed, Stream.VIEWS, normalisation, memory, cuts
        )

    def from_step(self, start: int, fabric: Fabric) -> DataLoader[Views]:
        """Micro-batches of this process, from step ``start`` on."""
        settings, views = self.settings, self.views(self._memory())
        rank, ranks = fabric.global_rank, fabric.world_size
        sampler = StepSampler(len(views), settings.batch_size, settings.steps, start, rank, ranks, settings.accumulate)
        return loader(views, sampler, settings.workers, pin=self.device.type == "cuda")

    def _memory(self) -> ImageMemory | None:
        """Memory for the images of a small data set; None for a large one, or where each image is read once."""
        settings, images = self.settings, self.images
        forked = sys.platform == "linux" or not settings.workers
        if not forked or settings.steps * settings.batch_size <= len(images.train):
            return None
        return memory_for(images.sides(), settings.multicrop.detail, len(images.source), settings.devices)
