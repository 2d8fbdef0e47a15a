"""How sure is a figure? Intervals over seeds and images together, for figures of any kind and their differences.

A figure varies because another seed would have trained another network, and because other images could be judged.
The first is read off the seeds' own variance, the second off a bootstrap over images (figures such as a mean IoU are no
means over images); what both contain is counted once. With five seeds quantiles of a bootstrap over seeds would be too
narrow, so the interval is Student's, with Satterthwaite's degrees of freedom.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf, nan, sqrt

import numpy as np
from scipy.special import stdtrit

DRAWS = 400
Figure = Callable[[int, np.ndarray], float]  # of a seed's network, on the images at these places (with repeats)


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95 % interval; infinite where one seed or one image says nothing of the others."""

    mean: float
    low: float
    high: float
    seeds: int
    images: int


def estimate(figure: Figure, seeds: int, images: int, draws: int = DRAWS, seed: int = 0) -> Estimate:
    """The mean figure over ``seeds`` networks, all judged by the same ``images`` images."""
    every = np.arange(images)
    values = np.array([figure(s, every) for s in range(seeds)])
    mean = float(values.mean())
    if seeds < 2 or images < 2:
        return Estimate(mean, -inf, inf, seeds, images)
    rng = np.random.default_rng(seed)
    drawn = np.array(
        [[figure(s, places) for s in range(seeds)] for places in rng.integers(images, size=(draws, images))]
    )
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


def difference(one: Figure, other: Figure) -> Figure:
    """``one`` less ``other``, of the same seed and on the same images: what they share falls out."""

    def figure(seed: int, places: np.ndarray) -> float:
        return one(seed, places) - other(seed, places)

    return figure


def mean_of(*figures: Figure) -> Figure:
    """The mean of several figures."""

    def figure(seed: int, places: np.ndarray) -> float:
        return float(np.mean([each(seed, places) for each in figures])) if figures else nan

    return figure
