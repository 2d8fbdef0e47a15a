"""Intervals of metrics: they cover the true value as often as stated, and equal the formula of a textbook if there is one."""

import math

import numpy as np
import pytest
from scipy import stats

from gtsa.evaluation.intervals import bootstrap, estimate, mean_of, of_images, pooled, variance_of, verdict


def of(values, **options):
    """The figure that is a mean of values [seeds, images]."""
    return bootstrap(lambda seed, positions: values[seed, positions].mean(keepdims=True), *values.shape, **options)


@pytest.mark.parametrize(
    ("seeds", "images", "of_seeds", "of_images", "of_both"),
    [(5, 60, 0.3, 1.0, 1.0), (5, 60, 1.0, 0.1, 1.0), (5, 60, 0.05, 1.0, 1.0)],
)
def test_intervals_cover_the_true_difference_in_95_of_100(seeds, images, of_seeds, of_images, of_both):
    """800 comparisons of two methods whose true difference is 0.3; images are hard or easy for both alike."""
    noise, covered = np.random.default_rng(0), 0
    for number in range(800):
        hard = noise.normal(0, 2, images)
        one, other = (
            noise.normal(0, of_images, images)
            + noise.normal(0, of_seeds, (seeds, 1))
            + noise.normal(0, of_both, (seeds, images))
            for _ in range(2)
        )
        options = {"draws": 40, "seed": number}
        actual = estimate(of(one + hard + 0.3, **options) - of(other + hard, **options))
        covered += actual.low <= 0.3 <= actual.high
    assert 0.92 <= covered / 800 <= 0.98


def test_where_images_do_not_vary_it_is_students_interval_over_seeds():
    values = np.array([1.0, 3.0, 2.0, 6.0, 4.0])
    actual = estimate(of(np.repeat(values[:, None], 50, 1)))
    low, high = stats.t.interval(0.95, 4, values.mean(), stats.sem(values))
    assert (actual.mean, actual.low, actual.high) == pytest.approx((3.2, low, high))


def test_where_seeds_do_not_vary_it_is_students_interval_over_images():
    values = np.random.default_rng(0).normal(size=200)
    actual = estimate(of(np.repeat(values[None], 3, 0), draws=4000))
    low, high = stats.t.interval(0.95, 199, values.mean(), stats.sem(values))
    assert (actual.low, actual.high) == pytest.approx((low, high), abs=0.01)


def test_what_never_varies_is_sure_and_what_is_alone_is_not():
    actual = estimate(of(np.ones((3, 4))))
    assert (actual.low, actual.mean, actual.high) == (1, 1, 1)
    for shape in ((1, 9), (4, 1)):
        alone = estimate(of(np.arange(math.prod(shape), dtype=float).reshape(shape)))
        assert (alone.low, alone.high) == (-math.inf, math.inf)


def test_what_two_methods_share_falls_out_of_their_difference():
    noise = np.random.default_rng(0)
    hard, one = 10 * noise.normal(size=100), noise.normal(size=(4, 100))
    apart = estimate(of(one + hard))
    paired = estimate(of(one + hard) - of(hard[None].repeat(4, 0)))
    assert paired.high - paired.low < (apart.high - apart.low) / 4
    assert mean_of([of(one), of(one + 1)], 100).values[2].item() == pytest.approx(one[2].mean() + 0.5)


def test_groups_count_as_one_and_images_of_a_group_as_no_more():
    """30 groups of 5 equal images: the interval is Student's over the 30 groups, not over the 150 images."""
    of_groups = np.random.default_rng(0).normal(size=30)
    values, groups = of_groups.repeat(5)[None], np.arange(30).repeat(5)
    sample = of(values, draws=4000, groups=groups.tolist())
    actual = of_images(sample)
    low, high = stats.t.interval(0.95, 29, of_groups.mean(), stats.sem(of_groups))
    assert (sample.images, sample.units) == (150, 30)
    assert (actual.low, actual.high) == pytest.approx((low, high), abs=0.02)
    alone = of_images(of(values, draws=4000))
    assert (alone.high - alone.low) < (high - low) / 1.8


def test_the_mean_over_two_sets_of_images_has_half_their_independent_variance():
    values = np.random.default_rng(0).normal(size=(1, 200))
    one, other = (of(values, draws=4000, seed=seed) for seed in (0, 1))
    same = of_images(mean_of([one, one], 200))
    both = of_images(mean_of([one, other], 400))
    assert (same.high - same.low) / (both.high - both.low) == pytest.approx(2**0.5, rel=0.05)
    assert both.images == 400


def test_several_metrics_at_once():
    values = np.random.default_rng(0).normal(size=(3, 30))
    both = bootstrap(
        lambda seed, positions: np.array([values[seed, positions].mean(), values[seed, positions].max()]), 3, 30
    )
    assert estimate(both[0]) == estimate(of(values))
    assert both[1].values[:, 0].tolist() == values.max(1).tolist()


def test_an_interval_is_put_into_words():
    words = [verdict(*ends) for ends in ((0.1, 0.2), (-0.2, -0.1), (-0.1, 0.1), (0.0, 0.1), (-np.inf, np.inf))]
    assert words == ["better", "worse"] + 3 * ["not distinguishable"]


# Power


def differences(noise, seeds, images, of_seeds, of_both, true=0.0):
    """Two methods whose means over seeds and images differ by ``true``; images are hard or easy for both alike."""
    hard = noise.normal(0, 2, images)
    one, other = (
        noise.normal(0, 1, images) + noise.normal(0, of_seeds, (seeds, 1)) + noise.normal(0, of_both, (seeds, images))
        for _ in range(2)
    )
    options = {"draws": 40, "seed": int(noise.integers(10**6))}
    return of(one + hard + true, **options) - of(other + hard, **options)


@pytest.mark.parametrize(
    ("seeds", "of_seeds", "of_both"), [(3, 0.3, 1.0), (3, 0.02, 0.5), (3, 1.0, 0.1), (5, 0.3, 1.0)]
)
def test_the_smallest_difference_is_seen_in_80_of_100(seeds, of_seeds, of_both):
    """It is computed from comparisons of equal methods, then such a difference is given to others."""
    noise = np.random.default_rng(0)
    variance = pooled([variance_of(differences(noise, seeds, 60, of_seeds, of_both)) for _ in range(120)])
    true = variance.smallest_difference
    seen = 0
    for _ in range(300):
        seen += estimate(differences(noise, seeds, 60, of_seeds, of_both, true)).low > 0
    assert 0.72 <= seen / 300 <= 0.88


def test_where_images_do_not_vary_it_is_that_of_a_t_test():
    values = np.array([1.0, 3.0, 2.0])
    variance = variance_of(of(np.repeat(values[:, None], 50, 1)))
    error, bound = stats.sem(values), stats.t.ppf(0.975, 2)
    assert 1 - stats.nct.cdf(bound, 2, variance.smallest_difference / error) == pytest.approx(0.8, abs=1e-6)


def test_more_seeds_see_smaller_differences_as_they_do_when_they_are_run():
    noise = np.random.default_rng(1)
    three, twelve = (
        pooled([variance_of(differences(noise, seeds, 60, 0.5, 1.0)) for _ in range(120)]) for seeds in (3, 12)
    )
    assert three.with_seeds(12).total == pytest.approx(twelve.total, rel=0.15)
    assert three.with_seeds(12).smallest_difference < three.smallest_difference / 2
    assert three.with_seeds(3) == three
    assert variance_of(of(np.ones((3, 4)))).smallest_difference == 0
