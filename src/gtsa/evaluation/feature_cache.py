"""Patch features of images on disk, in half precision, memory-mapped, by the digest of the image.

The features of one network lie in one folder of shards. A shard is written whole or not at all and never changed, so a
process may be killed at any moment, and several may write to one folder. What was written is not computed again.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from gtsa.core import files

ROUNDING = 1.1 * 2**-11  # of a product in half precision, as a share of it
LENGTH = 1.01  # of a unit vector in half precision, at most
TINY = 1e-5  # of products near 0
PATTERN = "*.safetensors"


class _Entry(NamedTuple):
    """Where the features of an image are."""

    number: int  # of all images in the folder
    shard: int
    first: int  # row of its shard
    grid: tuple[int, int]  # rows and columns of patches


class FeatureCache:
    """Patch features of images by the digest of the image. Threads may share it.

    Args:
        folder: of the shards; it is made if it does not exist.

    Attributes:
        removed: names of shards that were damaged and have been removed; their images are computed again.

    Raises:
        OSError: the folder cannot be made or read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.removed = folder, list[str]()
        self._lock = threading.Lock()
        self._shards: list[Tensor] = []  # [rows, D] each, half precision
        self._starts: list[np.ndarray] = []  # of each shard: the first row of each image
        self._numbers: list[int] = []  # of each shard: the number of its first image
        self._entries: dict[str, _Entry] = {}
        self._count = 0  # images in all shards; an image may be in two
        folder.mkdir(parents=True, exist_ok=True)
        files.clear_drafts(folder, PATTERN)
        for file in sorted(folder.glob(PATTERN)):
            if not file.name.startswith("."):
                self._open(file)

    def __contains__(self, digest: str) -> bool:
        return digest in self._entries

    def read(self, digest: str) -> Tensor:
        """Features of an image, [rows, columns, D], half precision, memory-mapped."""
        entry = self._entries[digest]
        height, width = entry.grid
        return self._shards[entry.shard][entry.first : entry.first + height * width].reshape(height, width, -1)

    def add(self, features: Mapping[str, Tensor]) -> None:
        """Writes a shard of features [rows, columns, D], by digest. Raises OSError; then nothing is written."""
        if not features:
            return
        images = [[digest, *patches.shape[:2]] for digest, patches in features.items()]
        rows = torch.cat([patches.flatten(0, 1).half() for patches in features.values()])
        name = hashlib.sha256("".join(features).encode()).hexdigest()[:16]
        file = self.folder / f"{name}.safetensors"
        files.store(file, safetensors.torch.save({"patches": rows}, {"images": json.dumps(images)}))
        self._open(file)

    def maxima(self, query: Tensor, digests: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The largest cosine similarity of each image's patches with ``query`` [D], and how far it may be wrong.

        All of them are unit vectors.

        Both are float32 [images]. The products are rounded to half precision, which halves the time of a search: it is
        bound by the memory.
        """
        entries = [self._entries[digest] for digest in digests]
        half = query.half()
        best = np.empty(self._count, np.float32)

        def search(shard: int) -> None:
            starts, first = self._starts[shard], self._numbers[shard]
            products = torch.mv(self._shards[shard], half).float().numpy()
            best[first : first + len(starts)] = np.maximum.reduceat(products, starts)

        with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:  # products of a shard fill no core for long
            list(pool.map(search, {entry.shard for entry in entries}))
        chosen = best[[entry.number for entry in entries]]
        rounded = float(torch.linalg.vector_norm(query.double() - half.double()))
        return chosen, ROUNDING * np.abs(chosen) + LENGTH * rounded + TINY

    def maximum(self, query: Tensor, digest: str) -> float:
        """The largest cosine similarity of an image's patches with ``query`` [D], in single precision."""
        return float((self.read(digest).float() @ query.float()).max())

    def _open(self, file: Path) -> None:
        """Adds a shard. A damaged one is removed: its features can be computed again."""
        try:
            with safetensors.safe_open(file, framework="pt") as content:
                rows = content.get_tensor("patches")
                images = [(str(digest), (int(h), int(w))) for digest, h, w in json.loads(content.metadata()["images"])]
            sizes = [h * w for _, (h, w) in images]
            if rows.dtype != torch.float16 or rows.ndim != 2 or len(rows) != sum(sizes) or min(sizes) < 1:
                raise ValueError
        except (safetensors.SafetensorError, ValueError, KeyError, TypeError):
            file.unlink()
            self.removed.append(file.name)
            return
        starts = np.cumsum([0, *sizes[:-1]])
        with self._lock:
            self._shards.append(rows)
            self._starts.append(starts)
            self._numbers.append(self._count)
            for number, (digest, grid) in enumerate(images):
                entry = _Entry(self._count + number, len(self._shards) - 1, int(starts[number]), grid)
                self._entries.setdefault(digest, entry)
            self._count += len(images)


class FileDigests:
    """SHA-256 of files. A file whose size and time have not changed is not read again.

    Args:
        file: JSON in which they are kept between two starts.
    """

    def __init__(self, file: Path) -> None:
        self.file, self._changed = file, False
        try:
            known = json.loads(file.read_bytes())
            self._known = {str(path): (int(size), int(time), str(value)) for path, (size, time, value) in known.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            self._known = {}

    def __call__(self, path: str) -> str:
        """Raises OSError."""
        status = os.stat(path)
        size, time, value = self._known.get(path, (-1, -1, ""))
        if (size, time) != (status.st_size, status.st_mtime_ns):
            value = files.digest(Path(path))
            self._known[path] = status.st_size, status.st_mtime_ns, value
            self._changed = True
        return value

    def save(self) -> None:
        """Raises OSError."""
        if self._changed:
            self._changed = False
            files.store(self.file, json.dumps(dict(self._known)).encode())
