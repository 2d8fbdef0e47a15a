"""Computes the features of all images in a thread of its own, while the page is in use."""

from __future__ import annotations

import threading
import time

import torch
from torch import Tensor

from gtsa.core.terminal import Count, say
from gtsa.data.images.pixels import BadImage
from gtsa.data.threaded import map_in_order
from gtsa.evaluation.explore.gallery import Images, Network
from gtsa.evaluation.feature_cache import FileDigests

BATCH = {"cpu": 4, "cuda": 32}  # images a forward pass; on a CPU few, because a click waits for the pass in progress
COMMIT = 5.0  # seconds of work that a kill loses at most
SAVE_DIGESTS = 60.0  # seconds

Prepared = tuple[int, list[Tensor | None]]  # number of an image; its pixels for each network that needs them


class Extraction(threading.Thread):
    """Computes what the caches do not have, in the order of the images.

    Attributes:
        finished: whether the features of all images that can be read are in the caches.
        error: why it had to stop; empty if it did not.
    """

    def __init__(self, images: Images, networks: list[Network], digests: FileDigests) -> None:
        super().__init__(name="gtsa-extraction", daemon=True)
        self.images, self.networks, self.digests = images, networks, digests
        self.finished, self.error = False, ""
        self._stopping = threading.Event()
        self._batches: dict[tuple[int, torch.Size], list[tuple[int, Tensor]]] = {}
        self._computed: list[dict[int, Tensor]] = [{} for _ in networks]
        self._committed = self._saved = time.monotonic()

    def run(self) -> None:
        try:
            self._extract()
        except (OSError, RuntimeError, MemoryError) as error:  # RuntimeError: memory of a GPU
            reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
            self.error = f"features are not computed any more: {reason}"
            say(f"explore: {self.error}. The page shows the features computed so far")

    def stop(self) -> None:
        """Stops after the batch in progress and keeps what was computed."""
        self._stopping.set()
        if self.is_alive():
            self.join()

    def _extract(self) -> None:
        with Count("images with features", len(self.images)) as count:
            for done, (index, needed) in enumerate(map_in_order(self._prepare, range(len(self.images))), 1):
                if self._stopping.is_set():
                    break
                for number, pixels in enumerate(needed):
                    if pixels is not None:
                        self._add(number, index, pixels)
                count(done, f"{len(self.images.left_out):,} left out" if self.images.left_out else "")
                if time.monotonic() - self._committed > COMMIT:
                    self._commit()
        for number, shape in list(self._batches):
            self._forward(number, shape)
        self._commit()
        self.digests.save()
        if not self._stopping.is_set():
            for network in self.networks:
                network.warm_up()
            self.finished = True

    def _prepare(self, index: int) -> Prepared:
        """Decodes an image that a network needs. A bad one is left out."""
        nothing: list[Tensor | None] = [None] * len(self.networks)
        if self._stopping.is_set():
            return index, nothing
        try:
            digest = self.images.digest(index)
            missing = [network for network in self.networks if digest not in network.cache]
            image = self.images.read(index, max(network.size for network in missing)) if missing else None
        except BadImage:  # it has been reported
            return index, nothing
        for network in self.networks:
            if network not in missing:
                network.ready.append(index)
        if image is None:
            return index, nothing
        return index, [network.pixels(image) if network in missing else None for network in self.networks]

    def _add(self, number: int, index: int, pixels: Tensor) -> None:
        batch = self._batches.setdefault((number, pixels.shape), [])
        batch.append((index, pixels))
        if len(batch) == BATCH[self.networks[number].device.type]:
            self._forward(number, pixels.shape)

    def _forward(self, number: int, shape: torch.Size) -> None:
        batch = self._batches.pop((number, shape))
        patches = self.networks[number].compute(torch.stack([pixels for _, pixels in batch]))
        self._computed[number] |= {index: one for (index, _), one in zip(batch, patches, strict=True)}

    def _commit(self) -> None:
        """Writes the features computed since the last time. Then they can be searched."""
        for number, network in enumerate(self.networks):
            computed, self._computed[number] = self._computed[number], {}
            network.cache.add({self.images.digest(index): patches for index, patches in computed.items()})
            network.ready.extend(computed)
        self._committed = time.monotonic()
        if self._committed - self._saved > SAVE_DIGESTS:
            self.digests.save()
            self._saved = self._committed
