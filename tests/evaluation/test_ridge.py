"""Ridge regression from moments: scikit-learn's result, and a strength that is chosen on other images."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from gtsa.evaluation.ridge import STRENGTHS, Fit, moments_of, predict, ridge


@pytest.mark.parametrize("strength", range(0, len(STRENGTHS), 2))
def test_the_regression_is_scikit_learns(strength, monkeypatch):
    draw = np.random.default_rng(0)
    x = draw.standard_normal((60, 5)) * [1, 2, 3, 4, 0.1] + 7
    y = x @ draw.standard_normal((5, 2)) + draw.standard_normal((60, 2))
    monkeypatch.setattr("gtsa.evaluation.ridge.STRENGTHS", STRENGTHS[strength : strength + 1])
    learn, choose = (moments_of(*(torch.from_numpy(v[part]) for v in (x, y))) for part in (slice(40), slice(40, 60)))
    alpha = float(STRENGTHS[strength]) * np.linalg.eigvalsh((x - x.mean(0)).T @ (x - x.mean(0))).mean()
    oracle = Ridge(alpha=alpha, solver="cholesky").fit(x, y)
    actual = predict(torch.from_numpy(x), ridge(learn, choose, 2))
    np.testing.assert_allclose(actual, oracle.predict(x), atol=1e-8)


def test_the_strength_is_the_one_with_the_least_error_on_held_out_images():
    draw = np.random.default_rng(1)
    x = draw.standard_normal((30, 25))
    y = x[:, :1] + 2 * draw.standard_normal((30, 1))
    first, last = slice(20), slice(20, 30)

    def alpha(part, strength):
        return strength * np.linalg.eigvalsh((x[part] - x[part].mean(0)).T @ (x[part] - x[part].mean(0))).mean()

    errors = [
        np.square(
            Ridge(alpha(first, s), solver="cholesky").fit(x[first], y[first]).predict(x[last]).reshape(-1, 1) - y[last]
        ).sum()
        for s in STRENGTHS.numpy()
    ]
    best = float(STRENGTHS[int(np.argmin(errors))])
    oracle = Ridge(alpha(slice(30), best), solver="cholesky").fit(x, y).predict(x).reshape(-1, 1)
    sums = [moments_of(torch.from_numpy(x[part]), torch.from_numpy(y[part])) for part in (first, last)]
    np.testing.assert_allclose(predict(torch.from_numpy(x), ridge(*sums, outputs=1)), oracle, atol=1e-8)


def test_images_are_added_in_batches_of_any_size():
    draw = torch.Generator().manual_seed(0)
    inputs, outputs = torch.randn(13, 6, 4, generator=draw), torch.randn(13, 6, 2, generator=draw)
    fits = []
    for sizes in ((13,), (5, 8), (1,) * 13):
        fit = Fit(torch.device("cpu"))
        for x, y in zip(inputs.split(sizes), outputs.split(sizes), strict=True):
            fit.add(x, y)
        fits.append(fit.solve())
    held_out = torch.arange(13) % 5 == 0
    expected = ridge(*(moments_of(inputs[rows], outputs[rows]) for rows in (~held_out, held_out)), 2)
    for actual in fits:
        torch.testing.assert_close(actual, expected)
