"""95 % intervals over seeds and images together, for metrics of any kind and for their differences.

A metric varies because another seed trains another network, and because other images could be evaluated. The first
variance is estimated from the seeds, the second by a bootstrap over images (a metric such as mean IoU is no mean over
images); what both contain is counted once. With five seeds, quantiles of a bootstrap over seeds would be too narrow, so
the interval is Student's, with Satterthwaite's degrees of freedom.

Images of one group (a place, a flight, a patient) are not independent: then the bootstrap draws whole groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import inf, sqrt
from typing import Literal

import numpy as np
from scipy.special import nctdtrinc, stdtrit
from torch import Tensor

DRAWS = 400
POWER = 0.8  # with which the smallest difference is seen
Metrics = Callable[[int, np.ndarray], np.ndarray]  # (seed index, image indices, which may repeat) -> metrics [F]


@dataclass(frozen=True)
class Bootstrap:
    """F metrics of S networks on all images, and on D random choices of as many of them, with repeats.

    Sums and differences pair equal seeds and equal choices of images, so the variance that two methods share cancels.
    """

    values: np.ndarray  # [S, F]
    drawn: np.ndarray  # [D, S, F], about ``values`` with the variance of independent choices
    images: int
    units: int  # that are drawn: images, or groups of them; of several sets of images those of the smallest

    def __sub__(self, other: Bootstrap) -> Bootstrap:
        return replace(self, values=self.values - other.values, drawn=self.drawn - other.drawn)

    def of_seeds(self, indices: list[int]) -> Bootstrap:
        """Of the seeds with these indices, which may repeat."""
        return replace(self, values=self.values[indices], drawn=self.drawn[:, indices])

    def __getitem__(self, metric: int) -> Bootstrap:
        """One of the metrics, F = 1."""
        return replace(self, values=self.values[:, metric, None], drawn=self.drawn[..., metric, None])


def bootstrap(
    metrics: Metrics,
    seeds: int,
    images: int,
    draws: int | None = None,
    seed: int = 0,
    groups: Sequence[int] | None = None,
) -> Bootstrap:
    """Computes the metrics of every seed's network; the choices depend on ``seed``, ``images`` and ``groups`` alone.

    Args:
        draws: number of choices of images; None: ``DRAWS``.
        seed: of the choices. Sets of images with different seeds are chosen independently.
        groups: the group of each image, if whole groups are drawn.
    """
    members = [np.array([i]) for i in range(images)] if groups is None else _members(groups)
    units = len(members)
    choices = np.random.default_rng(seed).integers(units, size=(draws or DRAWS, units))
    values = np.array([metrics(s, np.arange(images)) for s in range(seeds)])
    rows = (np.concatenate([members[unit] for unit in chosen]) for chosen in choices)
    drawn = np.array([[metrics(s, chosen) for s in range(seeds)] for chosen in rows])
    correction = sqrt(units / (units - 1)) if units > 1 else 1.0  # a bootstrap's variance is too small by its square
    return Bootstrap(values, values + (drawn - values) * correction, images, units)


def _members(groups: Sequence[int]) -> list[np.ndarray]:
    """The images of each group, groups in the order of their first image."""
    members: dict[int, list[int]] = {}
    for image, group in enumerate(groups):
        members.setdefault(group, []).append(image)
    return [np.array(of_group) for of_group in members.values()]


def mean_of(parts: Sequence[Bootstrap], images: int) -> Bootstrap:
    """The mean of metrics, on ``images`` images in all. Of one set of images they have the same choices."""
    return Bootstrap(
        np.mean([part.values for part in parts], axis=0),
        np.mean([part.drawn for part in parts], axis=0),
        images,
        min(part.units for part in parts),
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
    if sample.units < 2 or len(drawn) < 2:
        return Estimate(float(value), -inf, inf, 1, images)
    half = float(stdtrit(sample.units - 1, 0.975)) * sqrt(drawn.var(ddof=1))
    return Estimate(float(value), float(value) - half, float(value) + half, 1, images)


def estimate(sample: Bootstrap) -> Estimate:
    """The mean of one metric over seeds, with its interval."""
    assert sample.values.shape[1] == 1
    mean, seeds, images = float(sample.values.mean()), len(sample.values), sample.images
    if seeds < 2 or sample.units < 2:
        return Estimate(mean, -inf, inf, seeds, images)
    half = variance_of(sample).half_width
    return Estimate(mean, mean - half, mean + half, seeds, images)


@dataclass(frozen=True)
class Variance:
    """The variance of a mean over S seeds: its parts, and what both parts contain."""

    of_seeds: float
    over_images: float
    both: float
    seeds: int
    units: int

    @property
    def total(self) -> float:
        return max(self.of_seeds + self.over_images - self.both, self.of_seeds, self.over_images)

    @property
    def freedom(self) -> float:
        """Satterthwaite's degrees of freedom."""
        parts = self.of_seeds**2 / (self.seeds - 1) + self.over_images**2 / (self.units - 1)
        return min(self.total**2 / parts, self.seeds + self.units)

    @property
    def half_width(self) -> float:
        """Of the 95 % interval."""
        return float(stdtrit(self.freedom, 0.975)) * sqrt(self.total) if self.total else 0.0

    @property
    def smallest_difference(self) -> float:
        """The true difference that an interval of this variance excludes 0 for, with a probability of 80 %.

        The test statistic has a noncentral t distribution: the difference is its noncentrality, in standard errors, at
        which 80 % of it lie above the quantile of the two-sided test at 5 % (J. Cohen, Statistical Power Analysis for
        the Behavioral Sciences, 1988; H. Bloom, Minimum Detectable Effects, Evaluation Review 1995, for large samples).
        """
        if not self.total:
            return 0.0
        bound = float(stdtrit(self.freedom, 0.975))
        return float(nctdtrinc(self.freedom, 1 - POWER, bound)) * sqrt(self.total)

    def with_seeds(self, seeds: int) -> Variance:
        """What is to be expected of another number of seeds."""
        less = self.seeds / seeds
        images = self.over_images - self.both + self.both * less
        return replace(self, of_seeds=self.of_seeds * less, over_images=images, both=self.both * less, seeds=seeds)


def variance_of(sample: Bootstrap) -> Variance:
    """The variance of one metric's mean over at least two seeds, on at least two images or groups."""
    values, drawn, seeds = sample.values[:, 0], sample.drawn[..., 0], len(sample.values)
    drawn = np.where(np.isfinite(drawn), drawn, values)  # choices of images for which the metric is undefined
    over_images = float(drawn.mean(1).var(ddof=1))
    one_seed = float(drawn.var(0, ddof=1).mean())  # over images, for one seed
    both = max(0.0, (one_seed - over_images) / (seeds - 1))  # over seeds x images
    return Variance(float(values.var(ddof=1)) / seeds, over_images, both, seeds, sample.units)


def pooled(variances: Sequence[Variance]) -> Variance:
    """The mean of several variances, which have the same number of seeds."""
    assert len({each.seeds for each in variances}) == 1
    of_seeds, over_images, both = (
        float(np.mean([getattr(each, name) for each in variances])) for name in ("of_seeds", "over_images", "both")
    )
    return Variance(of_seeds, over_images, both, variances[0].seeds, min(each.units for each in variances))


def interval(values: Tensor) -> tuple[float, float, float]:
    """Mean of independent values and its 95 % interval (Student's t)."""
    n, mean = len(values), float(values.mean())
    if n < 2:
        return mean, float("-inf"), float("inf")
    half = float(stdtrit(n - 1, 0.975)) * float(values.std()) / n**0.5
    return mean, mean - half, mean + half
