"""Multinomial logistic regression with soft labels, by L-BFGS to convergence."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

ROWS = 2**14  # whose scores are held at once
CORRECTIONS = 20  # pairs of steps and gradients that L-BFGS remembers


@dataclass(frozen=True)
class Logistic:
    """A linear classifier and how its training ended.

    Attributes:
        loss: at the end, with the penalty.
        gradient: largest absolute entry of its gradient.
        iterations: of L-BFGS.
    """

    weight: Tensor  # [D, C]
    bias: Tensor  # [C]
    loss: float
    gradient: float
    iterations: int

    def __call__(self, inputs: Tensor) -> Tensor:
        """Scores [..., C] of inputs [..., D]."""
        return inputs @ self.weight + self.bias


def fit(inputs: Tensor, counts: Tensor, l2: float, tolerance: float, most: int) -> Logistic:
    """Minimises the mean cross-entropy plus ``l2`` / 2 times the squared weights; the bias has no penalty.

    The inputs are standardised for it: the penalty is that of the weights of standardised inputs. The problem is
    convex, and L-BFGS starts from zero, so there is one result; it needs no seed. This is scikit-learn's
    LogisticRegression with ``solver="lbfgs"`` and C = 1 / (l2 * weight of all samples); for two classes, where it keeps
    only their difference, C is twice that.

    Args:
        inputs: [N, D]; they are standardised in place.
        counts: weight of every class in each sample [N, C], e.g. its pixels. Samples weigh as much as they have.
        tolerance: the largest absolute entry of the gradient at which it ends.
        most: iterations at most.
    """
    mean, deviation = _standardise(inputs)
    total = float(counts.sum(dtype=torch.float64))
    width, classes = inputs.shape[1], counts.shape[1]
    parts = [  # classes first: several times as fast as [rows, classes], whose rows are short
        (rows, truth.T.contiguous(), truth.sum(1))
        for rows, truth in zip(torch.split(inputs, ROWS), torch.split(counts, ROWS), strict=True)
    ]

    def evaluate(values: np.ndarray) -> tuple[float, np.ndarray]:
        """Loss and gradient at weights and biases, [C * (D + 1)]."""
        flat = torch.from_numpy(values).view(classes, width + 1)
        parameters = flat.to(inputs.device, inputs.dtype)
        loss, gradient = 0.0, torch.zeros_like(flat)
        for rows, truth, weight in parts:
            logs = (parameters[:, :-1] @ rows.T + parameters[:, -1:]).log_softmax(0)
            loss -= float((truth * logs).sum(dtype=torch.float64))
            excess = logs.exp_() * weight - truth
            gradient[:, :-1] += (excess @ rows).cpu().double()
            gradient[:, -1] += excess.sum(1, dtype=torch.float64).cpu()
        gradient /= total
        gradient[:, :-1] += l2 * flat[:, :-1]
        return loss / total + l2 / 2 * float(flat[:, :-1].square().sum()), gradient.flatten().numpy()

    found = minimize(
        evaluate,
        np.zeros(classes * (width + 1)),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": most, "maxfun": 2 * most, "gtol": tolerance, "ftol": 0.0, "maxcor": CORRECTIONS},
    )
    result = torch.from_numpy(found.x).view(classes, width + 1).T
    weight = result[:-1] / deviation.cpu().double()[:, None]
    bias = result[-1] - mean.cpu().double() @ weight
    weight, bias = (value.to(inputs.device, inputs.dtype) for value in (weight, bias))
    return Logistic(weight, bias, float(found.fun), float(np.abs(found.jac).max()), int(found.nit))


def _standardise(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Mean 0 and deviation 1 in each column that varies; returns their mean and deviation before."""
    mean = inputs.mean(0, dtype=torch.float64).to(inputs.dtype)
    inputs -= mean
    deviation = torch.linalg.vector_norm(inputs, dim=0) / len(inputs) ** 0.5
    deviation = deviation.where(deviation > 1e-6 * mean.abs() + 1e-12, 1.0)
    inputs /= deviation
    return mean, deviation
