"""Cross-fitting: every image is judged once, by what was learnt from the other folds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations

import numpy as np
import torch

from gtsa.evaluation.evaluator import PerImage


def folds_of(images: int, folds: int, seed: int) -> Iterator[tuple[list[int], list[int]]]:
    """(training, judged) places for each fold: a random partition that follows from the seed."""
    order = np.random.default_rng(seed).permutation(images)
    for fold in range(folds):
        judged = np.sort(order[fold::folds])
        yield np.setdiff1d(order, judged).tolist(), judged.tolist()


def pairs_of(images: int, folds: int, seed: int) -> Iterator[tuple[list[int], list[int]]]:
    """(training, judged) places for each pair of folds: both are judged, and the others learnt from.

    These are the inner folds of every fold: what judges it must not choose, so for the first of six a choice is made
    by the others' images, each judged by what learnt from four folds. One probe serves both folds of a pair.
    """
    parts = [judged for _, judged in folds_of(images, folds, seed)]
    for one, other in combinations(parts, 2):
        judged = one + other
        yield np.setdiff1d(np.arange(images), judged).tolist(), judged


def joined(parts: Sequence[PerImage]) -> PerImage:
    """PerImage of several sets of images as one; what only some of them have is left out."""
    names = [name for name in parts[0] if all(name in part for part in parts)]
    return {
        name: torch.cat([part[name] for part in parts])
        if isinstance(parts[0][name], torch.Tensor)
        else [entry for part in parts for entry in part[name]]
        for name in names
    }


def some(per_image: PerImage, places: np.ndarray) -> PerImage:
    """PerImage of the images at these places, which may repeat."""
    chosen = torch.from_numpy(places)
    return {
        name: values[chosen] if isinstance(values, torch.Tensor) else [values[i] for i in places]
        for name, values in per_image.items()
    }
