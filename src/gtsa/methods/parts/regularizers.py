"""Regularisers against collapse: they ask that projected patches fill their space. See also ``sigreg``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gtsa.core.compilation import compilable
from gtsa.methods.parts.sigreg import draw_directions, sigreg

VECTORS = 1024  # that are drawn from the maps of a micro-batch, so that the cost does not grow with it
DIRECTIONS = 256  # of SIGReg
# Relative to the region loss. VICReg's is as published. LeJEPA has 0.05 for batches of 128 images on; SIGReg grows with
# the number of vectors, which is higher here.
WEIGHTS = {"none": 0.0, "sigreg": 0.01, "vicreg": 1.0}


def regularize(kind: str, maps: Sequence[Tensor], time: float) -> Tensor:
    """The regulariser ``kind`` (sigreg or vicreg) of vectors that are drawn from all maps: a scalar.

    Statistics of sigreg are those of all processes, of vicreg those of one. The vectors are drawn anew at every call.

    Args:
        maps: [..., C] projected maps for each size of views.
        time: of the step; the directions of SIGReg follow from it.
    """
    vectors = torch.cat([each.flatten(0, -2) for each in maps])
    vectors = vectors[torch.randperm(len(vectors), device=vectors.device)[:VECTORS]]
    if kind == "vicreg":
        return variance_covariance(vectors)
    return sigreg(vectors, draw_directions(vectors.shape[-1], DIRECTIONS, time, vectors.device))


@compilable
def variance_covariance(vectors: Tensor) -> Tensor:
    """Variance and covariance terms of VICReg (Bardes, Ponce and LeCun 2022, arXiv 2105.04906, section 4.1).

        v = mean_j max(0, 1 - sqrt(var(z_j) + 1e-4))     # every channel is to vary
        c = sum_{i != j} cov(z_i, z_j)^2 / D             # no two channels are to vary together
        loss = v + c / 25                                # published weights: 25 v + c, beside 25 times the agreement

    Args:
        vectors: [N, D], N at least 2.

    Returns:
        A scalar, float32 at least; 0 at best.
    """
    with torch.autocast(vectors.device.type, enabled=False):
        lifted = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
        centred = lifted - lifted.mean(0)
        covariance = centred.T @ centred / (len(centred) - 1)
        variance = covariance.diagonal()
        spread = (1 - (variance + 1e-4).sqrt()).clamp(min=0).mean()
        squares = (covariance.square().sum() - variance.square().sum()) / len(variance)
        return spread + squares / 25
