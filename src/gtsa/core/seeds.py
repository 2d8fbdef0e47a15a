"""Random numbers as a function of (seed, stream, counter), never of global state."""

from __future__ import annotations

from enum import IntEnum
from functools import lru_cache

import numpy as np


class Stream(IntEnum):
    """Streams of random numbers, one for each use. They are independent: no stream changes another.

    Three uses have NumPy's default generator with a seed of their own instead: the folds (``evaluation.folds``), the
    images of a bootstrap (``evaluation.intervals``), and the settings of a trial (``comparison.tuning``). Their
    numbers are kept, so that results can be compared with earlier ones. New uses take a stream.
    """

    ORDER = 1  # of the images of an epoch
    VIEWS = 2  # crops, rotations and colours of an image
    DETECTION_CROPS = 2  # an alias of VIEWS, with the same numbers: a number of its own would change kept results
    HELD_OUT = 3  # which images are held out, and their views
    PATCH_MEMORY = 4  # patches in the memory of in-context retrieval
    CLUSTERS = 5  # images and initial centres of k-means
    SEGMENTATION_CROPS = 6
    LINEAR_HELD_OUT = 21  # images on which the probe's learning rate is chosen
    FINETUNE_CROPS = 31
    FINETUNE_MIXUP = 32
    HEALTH_PATCHES = 41  # patches of an image that are evaluated


def generator(seed: int, stream: int, *counter: int) -> np.random.Generator:
    """Random numbers as a pure function of (seed, stream, counter). The counter has at most three numbers."""
    padded = [0, *counter, *[0] * (3 - len(counter))]
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=padded))


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, images: int) -> np.ndarray:
    """The order in which an epoch shows its images: a permutation of range(images)."""
    return np.argsort(generator(seed, Stream.ORDER, epoch).random(images), kind="stable")
