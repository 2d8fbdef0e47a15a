"""Decoded images of a small data set in memory, which all workers share, so that no epoch decodes them again."""

from __future__ import annotations

import math
import mmap
import multiprocessing
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import Tensor

SHARE = 0.25  # of the free memory, at most
CGROUP = Path("/sys/fs/cgroup")  # a container's limit
EMPTY, WRITING, READY = range(3)


class ImageMemory:
    """Images by number, each kept as it was decoded: uint8 [3, H, W] with the same strides.

    It works in this process and in workers that are forked from it. The memory is taken as images come.

    Args:
        images: number of images of the source.
        capacity: bytes; an image for which there is no room is not kept.

    Raises:
        OSError: the system gives no memory.
    """

    def __init__(self, images: int, capacity: int) -> None:
        self.capacity = capacity
        self.pixels = np.frombuffer(mmap.mmap(-1, max(1, capacity)), np.uint8)
        table = np.frombuffer(mmap.mmap(-1, 8 * (5 * images + 1)), np.int64)
        self.used, self.places = table[:1], table[1:].reshape(images, 5)  # state, start, height, width, channels last
        self.lock = multiprocessing.get_context("fork" if sys.platform == "linux" else None).Lock()

    def get(self, index: int) -> Tensor | None:
        """The image, or None if it is not kept. It must not be changed."""
        with self.lock:
            state, start, height, width, channels_last = self.places[index].tolist()
        if state != READY:
            return None
        values = torch.from_numpy(self.pixels[start : start + 3 * height * width])
        return values.view(height, width, 3).movedim(-1, 0) if channels_last else values.view(3, height, width)

    def put(self, index: int, image: Tensor) -> None:
        """Keeps an image if there is room."""
        channels_last = not image.is_contiguous()
        values = image.movedim(0, -1) if channels_last else image
        if not values.is_contiguous():
            return  # none of our decoders makes such an image
        with self.lock:
            start = int(self.used[0])
            if self.places[index, 0] != EMPTY or start + image.numel() > self.capacity:
                return
            self.places[index] = WRITING, start, *image.shape[1:], channels_last
            self.used[0] += image.numel()
        self.pixels[start : start + image.numel()] = values.numpy().reshape(-1)
        with self.lock:
            self.places[index, 0] = READY


def memory_for(
    files: Iterable[tuple[str, int, int]], detail: Callable[[int, int], float], images: int, processes: int = 1
) -> ImageMemory | None:
    """Memory for all these files of ``images`` in all; None where they do not fit, or where a size is not known.

    Args:
        files: name, width and height of each image that is used.
        detail: see ``decoding.decode``.
        processes: processes of this machine that keep all images.
    """
    allowed, needed = SHARE * free_memory() / processes, 0
    for name, width, height in files:
        if not width:
            return None
        needed += decoded_bytes(name, width, height, detail)
        if needed > allowed:
            return None
    with suppress(OSError):
        return ImageMemory(images, needed)
    return None


def decoded_bytes(name: str, width: int, height: int, detail: Callable[[int, int], float]) -> int:
    """Bytes of a decoded file. JPEGs are decoded at 1, 1/2, 1/4 or 1/8, as ``decoding.decode`` asks Pillow for."""
    scale = detail(width, height) if name.lower().endswith((".jpg", ".jpeg")) else 1.0
    fits = min(width // math.ceil(width * scale), height // math.ceil(height * scale))
    part = next(part for part in (8, 4, 2, 1) if fits >= part or part == 1)
    return 3 * -(-width // part) * -(-height // part)


def free_memory() -> int:
    """Bytes of memory that this process could take; no more than the limit of its container leaves."""
    free = int(psutil.virtual_memory().available)
    with suppress(OSError, ValueError):  # no container, or no limit
        limit, used = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        with suppress(OSError):  # files that the kernel keeps in memory as long as nobody else needs it
            stat = (CGROUP / "memory.stat").read_text()
            used -= sum(int(line.split()[1]) for line in stat.splitlines() if line.startswith("inactive_file "))
        free = min(free, max(0, limit - used))
    return free
