"""Cross-fitting: every image is evaluated once, by a model trained on the other folds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations

import numpy as np
import torch

from gtsa.evaluation.evaluator import PerImage

Splits = Iterator[tuple[list[int], list[int]]]


def folds_of(images: int, folds: int, seed: int, groups: Sequence[int] = ()) -> Splits:
    """(training, evaluation) indices of each fold: a random partition that depends on the seed alone.

    Args:
        groups: the group of each image; no group is split. Without them every image is a group.
    """
    of_image = np.asarray(groups, dtype=int) if groups else np.arange(images)
    order = np.random.default_rng(seed).permutation(len(set(groups)) if groups else images)
    for fold in range(folds):
        in_fold = np.isin(of_image, order[fold::folds])
        yield np.flatnonzero(~in_fold).tolist(), np.flatnonzero(in_fold).tolist()


def pairs_of(images: int, folds: int, seed: int, groups: Sequence[int] = ()) -> Splits:
    """(training, evaluation) indices of each pair of folds: both are evaluated, the other folds are trained on.

    These are the inner folds of nested cross-validation: the images of a fold must not choose the settings that it is
    evaluated with. With six folds, the settings for the first are chosen on the images of the other five, each
    evaluated by a model trained on four folds. One model serves both folds of a pair.
    """
    parts = [val for _, val in folds_of(images, folds, seed, groups)]
    for one, other in combinations(parts, 2):
        val = one + other
        yield np.setdiff1d(np.arange(images), val).tolist(), val


def joined(parts: Sequence[PerImage]) -> PerImage:
    """PerImage of several sets of images as one; results that only some of them have are left out."""
    names = [name for name in parts[0] if all(name in part for part in parts)]
    return {
        name: torch.cat([part[name] for part in parts])
        if isinstance(parts[0][name], torch.Tensor)
        else [entry for part in parts for entry in part[name]]
        for name in names
    }


def selected(per_image: PerImage, indices: np.ndarray) -> PerImage:
    """PerImage of the images with these indices, which may repeat."""
    rows = torch.from_numpy(indices)
    return {
        name: values[rows] if isinstance(values, torch.Tensor) else [values[i] for i in indices]
        for name, values in per_image.items()
    }
