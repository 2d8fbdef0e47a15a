"""Regularisers against collapse, against numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gtsa.methods.parts import regularizers
from gtsa.methods.parts.regularizers import regularize, variance_covariance
from gtsa.methods.parts.sigreg import NORMAL, draw_directions, sigreg

few = settings(deadline=None, max_examples=30)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@few
@given(st.integers(2, 9), st.integers(1, 5), st.floats(0.01, 4), st.integers(0, 99))
def test_variance_and_covariance_by_hand(count, width, scale, seed):
    vectors = normal(count, width, seed=seed) * scale + 3
    covariance = np.atleast_2d(np.cov(vectors.numpy(), rowvar=False))
    variance = np.mean([max(0.0, 1 - np.sqrt(covariance[j, j] + 1e-4)) for j in range(width)])
    off = sum(covariance[i, j] ** 2 for i in range(width) for j in range(width) if i != j) / width
    assert variance_covariance(vectors).item() == pytest.approx(variance + off / 25, rel=1e-9, abs=1e-12)


def test_it_is_0_at_best_and_high_for_one_vector_or_one_direction():
    white = torch.eye(4, dtype=torch.float64).repeat(50, 1)
    white = torch.cat([white, -white]) * 4
    assert variance_covariance(white).item() == pytest.approx(0, abs=1e-9)
    assert variance_covariance(torch.ones(9, 4)).item() == pytest.approx(0.99, abs=1e-6)  # all vectors are one
    line = normal(200, 1) * torch.ones(1, 4)
    assert variance_covariance(line).item() > 0.1


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_statistics_are_in_float32(precision):
    vectors = normal(64, 8).float()
    with torch.autocast("cpu", torch.bfloat16):
        actual = variance_covariance(vectors.to(precision))
    assert actual.dtype == torch.float32
    assert actual.item() == pytest.approx(variance_covariance(vectors).item(), rel=2e-2)


def test_all_vectors_are_used_where_there_are_few():
    maps = [normal(2, 3, 3, 5), normal(2, 2, 2, 5, seed=1)]
    vectors = torch.cat([each.flatten(0, -2) for each in maps])
    assert regularize("vicreg", maps, 0.5).item() == pytest.approx(variance_covariance(vectors).item())
    directions = draw_directions(5, regularizers.DIRECTIONS, 0.5)
    assert regularize("sigreg", maps, 0.5).item() == pytest.approx(sigreg(vectors, directions).item())
    assert regularize("sigreg", maps, 0.25) != regularize("sigreg", maps, 0.5)  # other directions


def test_a_sample_of_all_maps_is_used_where_there_are_many(monkeypatch):
    monkeypatch.setattr(regularizers, "VECTORS", 50)
    maps = [normal(4, 6, 6, 3).requires_grad_(), normal(8, 5, 5, 3, seed=1).requires_grad_()]
    torch.manual_seed(0)
    regularize("vicreg", maps, 0.5).backward()
    used = [int((each.grad.abs().sum(-1) > 0).sum()) for each in maps]
    assert sum(used) == 50 and min(used) > 5


def test_normal_vectors_are_at_rest_and_collapsed_ones_are_not():
    values = {
        name: regularize("sigreg", [normal(16, 8, 8, 64) * scale], 0.5).item()
        for name, scale in (("normal", 1.0), ("collapsed", 0.0))
    }
    assert values["normal"] == pytest.approx(NORMAL, rel=0.5)  # of one sample
    assert values["collapsed"] > 300 * NORMAL
