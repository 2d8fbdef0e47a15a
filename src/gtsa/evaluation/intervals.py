"""95 % intervals over seeds and images together, for metrics of any kind and for their differences.

A metric varies because another seed trains another network, and because other images could be evaluated. The first
variance is estimated from the seeds, the second by a bootstrap over images (a metric such as mean IoU is no mean over
images); what both contain is counted once. With five seeds, quantiles of a bootstrap over seeds would be too narrow, so
the interval is Student's, with Satterthwaite's degrees of freedom.
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
Metrics = Callable[[int, np.ndarray], np.ndarray]  # (seed index, image indices, which may repeat) -> metrics [F]


@dataclass(frozen=True)
class Bootstrap:
    """F metrics of S networks on all images, and on D random choices of as many of them, with repeats.

    Sums and differences pair equal seeds and equal choices of images, so the variance that two methods share cancels.
    """

    values: np.ndarray  # [S, F]
    drawn: np.ndarray  # [D, S, F]
    images: int

    def __sub__(self, other: Bootstrap) -> Bootstrap:
        return Bootstrap(self.values - other.values, self.drawn - other.drawn, self.images)

    def of_seeds(self, indices: list[int]) -> Bootstrap:
        """Of the seeds with these indices, which may repeat."""
        return Bootstrap(self.values[indices], self.drawn[:, indices], self.images)

    def __getitem__(self, metric: int) -> Bootstrap:
        """One of the metrics, F = 1."""
        return Bootstrap(self.values[:, metric, None], self.drawn[..., metric, None], self.images)


def bootstrap(metrics: Metrics, seeds: int, images: int, draws: int | None = None, seed: int = 0) -> Bootstrap:
    """Computes the metrics of every seed's network; the choices of images depend on ``seed`` and ``images`` alone.

    Args:
        draws: number of choices of images; None: ``DRAWS``.
    """
    choices = np.random.default_rng(seed).integers(images, size=(draws or DRAWS, images))
    values = np.array([metrics(s, np.arange(images)) for s in range(seeds)])
    return Bootstrap(values, np.array([[metrics(s, chosen) for s in range(seeds)] for chosen in choices]), images)


def mean_of(parts: list[Bootstrap]) -> Bootstrap:
    """The mean of metrics on the same images."""
    assert len({part.images for part in parts}) == 1
    return Bootstrap(
        np.mean([part.values for part in parts], axis=0), np.mean([p.drawn for p in parts], axis=0), parts[0].images
    )


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95 % interval; infinite for a single seed or image, which shows no variance."""

    mean: float
    low: float
    high: float
    seeds: int
    images: int


def verdict(low: float, high: float) -> Literal["better", "worse", "not distinguishable"]:
    """What a 95 % interval of a difference shows, if higher is better. Infinite ends show nothing."""
    return "better" if low > 0 else "worse" if high < 0 else "not distinguishable"


def of_images(sample: Bootstrap) -> Estimate:
    """One metric of one network with its interval over images. The interval does not include the variance of seeds."""
    (value,), images = sample.values[:, 0], sample.images
    drawn = sample.drawn[:, 0, 0]
    drawn = drawn[np.isfinite(drawn)]
    if images < 2 or len(drawn) < 2:
        return Estimate(float(value), -inf, inf, 1, images)
    half = float(stdtrit(images - 1, 0.975)) * sqrt(drawn.var(ddof=1) * images / (images - 1))
    return Estimate(float(value), float(value) - half, float(value) + half, 1, images)


def estimate(sample: Bootstrap) -> Estimate:
    """The mean of one metric over seeds, with its interval."""
    assert sample.values.shape[1] == 1
    values, drawn, images = sample.values[:, 0], sample.drawn[..., 0], sample.images
    mean, seeds = float(values.mean()), len(values)
    drawn = np.where(np.isfinite(drawn), drawn, values)  # choices of images for which the metric is undefined
    if seeds < 2 or images < 2:
        return Estimate(mean, -inf, inf, seeds, images)
    correction = images / (images - 1)  # a bootstrap's variance is too small by this factor
    of_seeds = values.var(ddof=1) / seeds
    over_images = drawn.mean(1).var(ddof=1) * correction
    one_seed = drawn.var(0, ddof=1).mean() * correction  # over images, for one seed
    both = max(0.0, (one_seed - over_images) / (seeds - 1))  # contained in both, over seeds x images
    variance = max(of_seeds + over_images - both, of_seeds, over_images)
    if variance == 0:
        return Estimate(mean, mean, mean, seeds, images)
    freedom = variance**2 / (of_seeds**2 / (seeds - 1) + over_images**2 / (images - 1))
    half = float(stdtrit(min(freedom, seeds + images), 0.975)) * sqrt(variance)
    return Estimate(mean, mean - half, mean + half, seeds, images)


def interval(values: Tensor) -> tuple[float, float, float]:
    """Mean of independent values and its 95 % interval (Student's t)."""
    n, mean = len(values), float(values.mean())
    if n < 2:
        return mean, float("-inf"), float("inf")
    half = float(stdtrit(n - 1, 0.975)) * float(values.std()) / n**0.5
    return mean, mean - half, mean + half
