"""SIGReg: vectors are to be distributed as a standard normal (LeJEPA, Balestriero and LeCun 2025, arXiv 2511.08544).

A distribution is the standard normal if all of its projections on unit vectors are. Each projection is tested with the
statistic of Epps and Pulley (1983), which compares characteristic functions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gtsa.core.compilation import compilable
from gtsa.methods.parts import processes

LARGEST, KNOTS = 5.0, 17  # as published: the integral is taken over [-5, 5], at 17 points
NORMAL = 1.0594  # value for a standard normal sample, on average, of any size: sqrt(2 pi) - sqrt(2 pi / 3)


def sigreg(vectors: Tensor, directions: Tensor) -> Tensor:
    """How far the distribution of ``vectors`` is from the standard normal: ``NORMAL`` on average if it is one.

        x = vectors @ directions                                # projections, [N, M]
        phi(t) = mean_n exp(i t x)                              # empirical characteristic function, [M]
        T = N * integral abs(phi(t) - exp(-t^2 / 2))^2 exp(-t^2 / 2) dt    # Epps-Pulley, trapezoidal rule
        result = mean(T)                                        # over directions

    The published code integrates over [-5, 5]. The integrand is even, so here [0, 5] counts twice. Of several
    processes, N and phi are of the vectors of all: each has to have as many vectors, and the same directions.

    Args:
        vectors: [..., N, D], N vectors of each of any number of distributions (e.g. one for each view of an image).
        directions: [D, M] with unit columns.

    Returns:
        A scalar, at least float32: the mean over distributions and directions. If all vectors are 0 it is 0.41 N.
    """
    phi = processes.mean(_characteristic(vectors, directions))
    return _distance(phi, vectors.shape[-2] * processes.count())


def draw_directions(width: int, count: int, time: float, device: torch.device | str = "cpu") -> Tensor:
    """Random unit vectors as the columns of [width, count]: a function of ``time``, so that all processes draw alike.

    The published code seeds them with the number of the step. They are drawn on the CPU: the same for all devices.
    """
    seed = round(time * 2**53) % 4294967291  # a prime: the generator uses 32 bits, and times have few in common places
    normal = torch.randn(width, count, generator=torch.Generator().manual_seed(seed))
    directions: Tensor = normal / normal.norm(dim=0)
    return directions.to(device)


@compilable
def _characteristic(vectors: Tensor, directions: Tensor) -> Tensor:
    """Real and imaginary part of the empirical characteristic function at the knots: [2, ..., M, T]."""
    dtype = torch.promote_types(vectors.dtype, torch.float32)
    with torch.autocast(vectors.device.type, enabled=False):
        x = vectors.to(dtype) @ directions.to(dtype)  # [..., N, M]
    angles = x[..., None] * _knots(x)
    return torch.stack([angles.cos().mean(-3), angles.sin().mean(-3)])


@compilable
def _distance(phi: Tensor, count: int) -> Tensor:
    """``count`` times the mean weighted distance of [2, ..., M, T] from the standard normal."""
    t = _knots(phi)
    normal = torch.exp(-t.square() / 2)
    weight = normal * (2 * LARGEST / (KNOTS - 1)) * torch.where((t == 0) | (t == LARGEST), 1.0, 2.0)
    error = (phi[0] - normal).square() + phi[1].square()
    return count * (error * weight).sum(-1).mean()  # not a matrix product: autocast would make it bfloat16


def _knots(like: Tensor) -> Tensor:
    """The knots that are not negative, [T]; the others follow by symmetry."""
    return torch.linspace(0, LARGEST, KNOTS // 2 + 1, dtype=like.dtype, device=like.device)
