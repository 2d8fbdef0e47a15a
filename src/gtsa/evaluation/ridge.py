"""Ridge regression in closed form, in bounded memory: a linear map from tokens to what they may tell."""

from __future__ import annotations

import torch
from torch import Tensor

STRENGTHS = 10.0 ** torch.arange(-8, 3, dtype=torch.float64)  # of the ridge penalty, times the mean eigenvalue
HELD_OUT = 5  # every fifth training image is for the choice of the strength


class Fit:
    """Collects samples image by image, then fits a linear map whose strength is chosen on a fifth of the images."""

    def __init__(self, device: torch.device) -> None:
        zero = torch.zeros((), dtype=torch.float64, device=device)
        self._moments, self._images, self._outputs = [zero, zero], 0, 0

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """Adds the samples of B images: [B, ..., D] and [B, ..., k]."""
        indices = torch.arange(self._images, self._images + len(inputs), device=inputs.device)
        held_out = indices % HELD_OUT == 0
        for part, rows in enumerate((~held_out, held_out)):
            self._moments[part] = self._moments[part] + moments_of(inputs[rows], outputs[rows])
        self._images, self._outputs = self._images + len(inputs), outputs.shape[-1]

    def solve(self) -> Tensor:
        """Weights and bias [D + 1, k], for ``predict``. At least two images were added."""
        return ridge(self._moments[0], self._moments[1], self._outputs)


def moments_of(inputs: Tensor, outputs: Tensor) -> Tensor:
    """All products of (inputs, 1, outputs) [..., D], [..., k], summed over samples: float64 [D + 1 + k] squared.

    A least-squares fit and its error follow from them, in bounded memory.
    """
    ones = torch.ones_like(inputs[..., :1])
    rows = torch.cat([inputs.double(), ones.double(), outputs.double()], dim=-1).flatten(0, -2)
    return rows.T @ rows


def ridge(train: Tensor, held_out: Tensor, outputs: int) -> Tensor:
    """Weights and bias [D + 1, k] of a ridge regression on all samples.

    The strength is the one whose fit to ``train`` has the least error on ``held_out``; both are moments.
    """
    maps = _solutions(train, outputs)
    tied = -torch.eye(outputs, dtype=maps.dtype, device=maps.device).expand(len(maps), outputs, outputs)
    difference = torch.cat([maps, tied], dim=1)
    errors = torch.einsum("sij,ik,skj->s", difference, held_out, difference)
    return _solutions(train + held_out, outputs)[errors.argmin()]


def _solutions(moments: Tensor, outputs: int) -> Tensor:
    """Weights and bias for every strength, [strengths, D + 1, k]; the bias is not penalised."""
    one = len(moments) - outputs - 1
    count, sums = moments[one, one], moments[one]
    centred = moments - sums[:, None] * sums / count
    values, vectors = torch.linalg.eigh(centred[:one, :one])
    penalty = STRENGTHS.to(moments.device)[:, None] * values.mean().clamp(min=1e-30) + values.clamp(min=0)
    weights = vectors @ ((vectors.T @ centred[:one, one + 1 :]) / penalty[..., None])
    bias = (sums[one + 1 :] - sums[:one] @ weights) / count
    return torch.cat([weights, bias[:, None]], dim=1)


def predict(inputs: Tensor, weights: Tensor) -> Tensor:
    return inputs.double() @ weights[:-1] + weights[-1]
