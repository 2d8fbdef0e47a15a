"""What the explorer computes from patch features: similarity maps, equivariance under rotation, PCA colours.

Features are unit vectors [rows, columns, D], so that a scalar product is a cosine similarity. Rotations are
quarter-turns counter-clockwise, as in ``torch.rot90``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gtsa.evaluation.feature_maps import paint, scale_of

Patch = tuple[int, int]  # row, column
SAMPLE = 20_000  # patches at most from which a basis is computed


def similarity_map(patches: Tensor, query: Tensor) -> Tensor:
    """Cosine similarity of each patch [h, w, D] with ``query`` [D]: [h, w]."""
    return patches.float() @ query.float()


def patch_at(y: float, x: float, grid: tuple[int, int]) -> Patch:
    """The patch at a point of the image; y and x in [0, 1]."""
    return min(grid[0] - 1, int(y * grid[0])), min(grid[1] - 1, int(x * grid[1]))


def rotated_patch(patch: Patch, grid: tuple[int, int], rotation: int) -> Patch:
    """Where a patch of an upright image with ``grid`` lies after ``rotation`` quarter-turns counter-clockwise."""
    (row, column), (height, width) = patch, grid
    for _ in range(rotation % 4):
        row, column, height, width = width - 1 - column, row, width, height
    return row, column


@dataclass(frozen=True)
class Equivariance:
    """How the features of an image follow its rotation.

    Attributes:
        same_place: cosine similarity of each patch before and after the rotation, where it lies in the rotated image.
        here: the same of the chosen patch.
        mean: the same over all patches.
        elsewhere: mean cosine similarity of patches before and after the rotation that show different places.
        found_again: share of patches whose most similar patch in the rotated image shows the same place.
        agreement: Pearson correlation of the chosen patch's similarity maps before and after; None for a flat map.
    """

    same_place: Tensor
    here: float
    mean: float
    elsewhere: float
    found_again: float
    agreement: float | None


def equivariance(upright: Tensor, rotated: Tensor, rotation: int, patch: Patch) -> Equivariance:
    """Compares the features of an image [h, w, D] with those of the rotated image."""
    back = torch.rot90(rotated.float(), -rotation, (0, 1))
    upright = upright.float()
    all_pairs = upright.flatten(0, 1) @ back.flatten(0, 1).T
    same = all_pairs.diagonal()
    n = len(same)
    maps = torch.stack([similarity_map(features, features[patch]).flatten() for features in (upright, back)])
    agreement = float(torch.corrcoef(maps)[0, 1]) if n > 1 else float("nan")
    grid = upright.shape[0], upright.shape[1]
    return Equivariance(
        same_place=torch.rot90(same.reshape(grid), rotation, (0, 1)),
        here=float(same.reshape(grid)[patch]),
        mean=float(same.mean()),
        elsewhere=float((all_pairs.sum() - same.sum()) / max(1, n * n - n)),
        found_again=float((all_pairs.argmax(1) == torch.arange(n)).float().mean()),
        agreement=None if agreement != agreement else agreement,
    )


def exact_ranks(
    approximate: np.ndarray, error: np.ndarray, exact: Callable[[int], float], first: int, end: int
) -> list[int]:
    """Places of the values of the ranks from ``first`` to below ``end``, largest first; equal ones by their place.

    Few exact values are computed: of those that may have these ranks.

    Args:
        approximate: [n] values.
        error: [n] how far each may be from its exact value.
        exact: the exact value at a place.
    """
    end = min(end, len(approximate))
    if first >= end:
        return []
    low, high = approximate - error, approximate + error
    at_first, at_end = np.sort(high)[::-1][first], np.sort(low)[::-1][end - 1]
    before = low > at_first  # fewer than ``first`` values can be larger than such a one
    places = np.flatnonzero(~before & (high >= at_end))
    values = np.array([exact(place) for place in places.tolist()])
    if (np.abs(values - approximate[places]) > error[places]).any():  # this machine computes less exactly than expected
        places, before = np.arange(len(approximate)), np.zeros(len(approximate), bool)
        values = np.array([exact(place) for place in places.tolist()])
    skipped, order = int(before.sum()), np.argsort(-values, kind="stable")
    ranked: list[int] = places[order].tolist()
    return ranked[first - skipped : end - skipped]


def principal_colours(patches: Tensor) -> tuple[Tensor, float]:
    """The first three principal components of patches [N, D] as colours [N, 3] in [0, 1], and their share of variance.

    The colours are those of feature maps. The sign of a component is arbitrary; here its largest weight is positive.
    """
    values = patches.float()
    sample = values[:: max(1, len(values) // SAMPLE)]
    mean = sample.mean(0)
    centred = (sample - mean).double()
    variances, directions = torch.linalg.eigh(centred.T @ centred)
    basis = directions[:, -3:].flip(1)
    basis = basis * basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign()
    components = (values - mean) @ basis.float()
    scale = scale_of(components[:: max(1, len(values) // SAMPLE)])
    return paint(components / scale), float(variances[-3:].sum() / variances.sum().clamp(min=1e-12))
