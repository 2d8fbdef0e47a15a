"""How sure is a figure? Intervals over seeds and images together, for figures of any kind and their differences.

A figure varies because another seed would have trained another network, and because other images could be judged.
The first is read off the seeds' own variance, the second off a bootstrap over images (figures such as a mean IoU are no
means over images); what both contain is counted once. With five seeds quantiles of a bootstrap over seeds would be too
narrow, so the interval is Student's, with Satterthwaite's degrees of freedom.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf, sqrt
from typing import Literal

import numpy as np
from scipy.special import stdtrit
from torch import Tensor

DRAWS = 400
Metrics = Callable[[int, np.ndarray], np.ndarray]  # [F] of a seed's network, on the images at these places (may repeat)


@dataclass(frozen=True)
class Drawn:
    """Figures of S networks on all images, and on D random choices of as many of them, with repeats.

    Sums and differences are of the same seeds and the same choices of images, so what two methods share falls out.
    """

    values: np.ndarray  # [S, F]
    drawn: np.ndarray  # [D, S, F]
    images: int

    def __sub__(self, other: Drawn) -> Drawn:
        return Drawn(self.values - other.values, self.drawn - other.drawn, self.images)

    def of_seeds(self, places: list[int]) -> Drawn:
        """Of the seeds at these places, which may repeat."""
        return Drawn(self.values[places], self.drawn[:, places], self.images)

    def __getitem__(self, figure: int) -> Drawn:
        """One figure of them, F = 1."""
        return Drawn(self.values[:, figure, None], self.drawn[..., figure, None], self.images)


def draw(metrics: Metrics, seeds: int, images: int, draws: int = DRAWS, seed: int = 0) -> Drawn:
    """Asks for the figures of every seed's network; the choices of images follow from ``seed`` and their number."""
    chosen = np.random.default_rng(seed).integers(images, size=(draws, images))
    values = np.array([metrics(s, np.arange(images)) for s in range(seeds)])
    return Drawn(values, np.array([[metrics(s, places) for s in range(seeds)] for places in chosen]), images)


def mean_of(parts: list[Drawn]) -> Drawn:
    """The mean of figures of the same images."""
    assert len({part.images for part in parts}) == 1
    return Drawn(
        np.mean([part.values for part in parts], axis=0), np.mean([p.drawn for p in parts], axis=0), parts[0].images
    )


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95 % interval; infinite where one seed or one image says nothing of the others."""

    mean: float
    low: float
    high: float
    seeds: int
    images: int


def verdict(low: float, high: float) -> Literal["better", "worse", "not distinguishable"]:
    """What a 95 % interval of a difference says, where more is better; infinite ends say nothing."""
    return "better" if low > 0 else "worse" if high < 0 else "not distinguishable"


def of_images(found: Drawn) -> Estimate:
    """One figure of one network, and how sure it is, for other images could be judged. It says nothing of seeds."""
    (value,), images = found.values[:, 0], found.images
    drawn = found.drawn[:, 0, 0]
    drawn = drawn[np.isfinite(drawn)]
    if images < 2 or len(drawn) < 2:
        return Estimate(float(value), -inf, inf, 1, images)
    half = float(stdtrit(images - 1, 0.975)) * sqrt(drawn.var(ddof=1) * images / (images - 1))
    return Estimate(float(value), float(value) - half, float(value) + half, 1, images)


def estimate(found: Drawn) -> Estimate:
    """The mean of one figure over seeds, and how sure it is."""
    assert found.values.shape[1] == 1
    values, drawn, images = found.values[:, 0], found.drawn[..., 0], found.images
    mean, seeds = float(values.mean()), len(values)
    drawn = np.where(np.isfinite(drawn), drawn, values)  # a choice of images that a figure says nothing of
    if seeds < 2 or images < 2:
        return Estimate(mean, -inf, inf, seeds, images)
    grow = images / (images - 1)  # a bootstrap's variance is too small by this
    of_seeds = values.var(ddof=1) / seeds
    of_images = drawn.mean(1).var(ddof=1) * grow
    each = drawn.var(0, ddof=1).mean() * grow  # of the images, for one seed
    both = max(0.0, (each - of_images) / (seeds - 1))  # what seeds and images contain together, over seeds x images
    variance = max(of_seeds + of_images - both, of_seeds, of_images)
    if variance == 0:
        return Estimate(mean, mean, mean, seeds, images)
    freedom = variance**2 / (of_seeds**2 / (seeds - 1) + of_images**2 / (images - 1))
    half = float(stdtrit(min(freedom, seeds + images), 0.975)) * sqrt(variance)
    return Estimate(mean, mean - half, mean + half, seeds, images)


def interval(values: Tensor) -> tuple[float, float, float]:
    """Mean of independent values and its 95 % interval (Student's t)."""
    n, mean = len(values), float(values.mean())
    if n < 2:
        return mean, float("-inf"), float("inf")
    half = float(stdtrit(n - 1, 0.975)) * float(values.std()) / n**0.5
    return mean, mean - half, mean + half
