"""Random numbers that follow from (seed, stream, place), never from global state."""

from __future__ import annotations

from enum import IntEnum
from functools import lru_cache

import numpy as np


class Stream(IntEnum):
    """Streams of random numbers, one for each use: none of them depends on how much another one is drawn from."""

    ORDER = 1  # of the images of an epoch
    VIEWS = 2  # crops, rotations and colours of an image
    HELD_OUT = 3  # which images are held out, and their views
    PATCH_MEMORY = 4  # which patches in-context retrieval remembers
    CLUSTERS = 5  # images and starts of k-means
    SEGMENTATION_CROPS = 6
    LINEAR_HELD_OUT = 21  # images that choose the probe's learning rate
    FINETUNE_CROPS = 31
    FINETUNE_MIXUP = 32
    HEALTH_PATCHES = 41  # which patches of an image are looked at


def generator(seed: int, stream: int, *place: int) -> np.random.Generator:
    """Random numbers as a pure function of (seed, stream, place); place has at most three numbers."""
    counter = [0, *place, *[0] * (3 - len(place))]
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=counter))


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, images: int) -> np.ndarray:
    """The order in which an epoch shows its images: a permutation of range(images)."""
    return np.argsort(generator(seed, Stream.ORDER, epoch).random(images), kind="stable")
