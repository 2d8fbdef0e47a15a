"""The images of the explorer, and their patch features by one set of weights."""

from __future__ import annotations

import hashlib
import io
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from gtsa.core.errors import escaped
from gtsa.core.terminal import say
from gtsa.data.images.decoding import read_header
from gtsa.data.images.pixels import BadImage
from gtsa.data.sources import Source
from gtsa.data.threaded import PixelBudget
from gtsa.evaluation.explore.similarity import exact_ranks
from gtsa.evaluation.feature_cache import FeatureCache, FileDigests
from gtsa.evaluation.loading import normalised, resized
from gtsa.models.backbone import Backbone

AT_ONCE = 2**26  # pixels that all threads together decode at a time; a larger image is decoded alone
PICTURES = 2**26  # bytes of drawn pictures that are kept
RECENT = 256  # images whose computed features are kept in memory
QUALITY = 88  # of JPEGs on the page

K = TypeVar("K")
V = TypeVar("V")


class Recent(Generic[K, V]):
    """Results that were used last, up to a total size. Threads may share it.

    Args:
        size: the most that is kept.
        size_of: a result's size.
    """

    def __init__(self, size: int, size_of: Callable[[V], int] = lambda _: 1) -> None:
        self._size, self._size_of, self._total = size, size_of, 0
        self._lock, self._results = threading.Lock(), OrderedDict[K, V]()

    def get(self, key: K, make: Callable[[], V]) -> V:
        """The result for ``key``; it is made if it is not kept."""
        with self._lock:
            if key in self._results:
                self._results.move_to_end(key)
                return self._results[key]
        result = make()
        with self._lock:
            if key not in self._results:
                self._results[key] = result
                self._total += self._size_of(result)
            while self._total > self._size:
                self._total -= self._size_of(self._results.popitem(last=False)[1])
        return result


class Images:
    """Numbered images with names for the page. A file that cannot be read is left out with its reason.

    Attributes:
        names: by number; control characters are escaped.
        left_out: number and reason of the images that could not be read so far.
    """

    def __init__(self, source: Source, digests: FileDigests, salt: str) -> None:
        self.source, self.names = source, [escaped(source.name(index)) for index in range(len(source))]
        self.left_out: dict[int, str] = {}
        self._numbers = {name: index for index, name in reversed(list(enumerate(self.names)))}
        self._digests, self._salt = digests, salt
        self._known: dict[int, str] = {}
        self._budget = PixelBudget(AT_ONCE)
        self._pictures = Recent[tuple[int, int, int], bytes](PICTURES, len)

    def __len__(self) -> int:
        return len(self.names)

    def find(self, name: str) -> int | None:
        """The number of an image by its name."""
        return self._numbers.get(name)

    def digest(self, index: int) -> str:
        """Identifies the content of an image, and how it is read. Raises BadImage."""
        if index not in self._known:
            path = self.source.path(index)
            try:
                if path is None:
                    content = hashlib.sha256(self.read(index, None).numpy().tobytes()).hexdigest()
                else:
                    content = self._digests(os.path.abspath(path))
            except OSError as error:
                raise self._leave_out(index, error.strerror or str(error)) from None
            self._known[index] = hashlib.sha256(f"{content} {self._salt}".encode()).hexdigest()[:32]
        return self._known[index]

    def read(self, index: int, side: int | None) -> Tensor:
        """uint8 [3, H, W]; large JPEGs are decoded at a scale at which the long side has at least ``side`` px.

        Raises BadImage.
        """
        detail = None if side is None else lambda width, height: side / max(width, height)
        try:
            file = self.source.file(index)
            header = None if file is None else read_header(file)
            with self._budget.reserve(header.width * header.height if header else 0):
                return self.source.read(index, detail)
        except BadImage as reason:
            raise self._leave_out(index, str(reason)) from None

    def picture(self, index: int, rotation: int, side: int) -> bytes:
        """A JPEG of the whole image, rotated, whose long side has at most ``side`` px. Raises BadImage."""
        return self._pictures.get((index, rotation, side), lambda: self._draw(index, rotation, side))

    def _draw(self, index: int, rotation: int, side: int) -> bytes:
        pixels = self.read(index, side)
        height, width = pixels.shape[-2:]
        scale = min(1.0, side / max(height, width))
        pixels = resized(pixels, max(1, round(height * scale)), max(1, round(width * scale)))
        array = torch.rot90(pixels, rotation, (1, 2)).permute(1, 2, 0).contiguous().numpy()
        file = io.BytesIO()
        Image.fromarray(array).save(file, "JPEG", quality=QUALITY)
        return file.getvalue()

    def _leave_out(self, index: int, reason: str) -> BadImage:
        error = BadImage(f"{self.names[index]}: {reason}")
        if index not in self.left_out:
            self.left_out[index] = reason
            say(f"{error}; left out")
        return error


def grid_of(height: int, width: int, size: int, patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches of a whole image whose long side becomes ``size`` px.

    The aspect is kept up to half a patch: both sides are whole numbers of patches.
    """
    scale = size / max(height, width) / patch_size
    return max(1, round(height * scale)), max(1, round(width * scale))


class Network:
    """Patch features of the images by one set of weights, from the cache or computed on demand. Threads may share it.

    Args:
        size: of the long side of an image, px.
        device: of the backbone, which is moved there.

    Attributes:
        ready: numbers of the images whose features are in the cache; they can be searched.
    """

    def __init__(
        self, images: Images, backbone: Backbone, name: str, cache: FeatureCache, size: int, device: torch.device
    ) -> None:
        self.images, self.name, self.cache, self.size, self.device = images, name, cache, size, device
        self.backbone = backbone.to(device).eval()
        self.ready: list[int] = []
        self._lock, self._waiting = threading.Lock(), 0  # requests that wait for the network
        self._recent = Recent[tuple[int, int], Tensor](RECENT)

    def pixels(self, image: Tensor) -> Tensor:
        """uint8 [3, H, W] as the network sees it."""
        height, width = image.shape[-2:]
        rows, columns = grid_of(height, width, self.size, self.backbone.patch_size)
        return resized(image, rows * self.backbone.patch_size, columns * self.backbone.patch_size)

    def compute(self, pixels: Tensor, urgent: bool = False) -> Tensor:
        """Unit vectors [N, h, w, D], half precision, of images uint8 [N, 3, h * p, w * p]. Urgent calls go first."""
        if urgent:
            self._waiting += 1
        try:
            while self._waiting and not urgent:
                time.sleep(0.002)
            with self._lock, torch.inference_mode():
                patches = self.backbone(normalised(pixels, self.backbone, self.device)).patches
                return F.normalize(patches.float(), dim=-1).half().cpu()
        finally:
            if urgent:
                self._waiting -= 1

    def patches(self, index: int, rotation: int = 0) -> Tensor:
        """Unit vectors [h, w, D], half precision, of an image after ``rotation`` quarter-turns. Raises BadImage."""
        if rotation == 0 and (digest := self.images.digest(index)) in self.cache:
            return self.cache.read(digest)
        return self._recent.get((index, rotation), lambda: self._compute_one(index, rotation))

    def _compute_one(self, index: int, rotation: int) -> Tensor:
        pixels = torch.rot90(self.pixels(self.images.read(index, self.size)), rotation, (1, 2))
        return self.compute(pixels[None].contiguous(), urgent=True)[0]

    def warm_up(self) -> None:
        """Searches once, so that the first search of the user does not wait for features from the disk."""
        self.cache.maxima(torch.zeros(self.backbone.embed_dim), [self.images.digest(index) for index in self.ready])

    def nearest(self, query: Tensor, among: Sequence[int], first: int, end: int) -> list[int]:
        """Numbers of images by the largest cosine similarity of one of their patches with ``query`` [D].

        Those of the ranks from ``first`` to below ``end``, which are exact in single precision.
        """
        if not among:
            return []
        digests = [self.images.digest(index) for index in among]
        ranks = exact_ranks(
            *self.cache.maxima(query, digests), lambda place: self.cache.maximum(query, digests[place]), first, end
        )
        return [among[place] for place in ranks]
