"""Workers of a run on a CPU follow from what was measured; given ones stay."""

import pytest

from gtsa.core.settings import Plan, validated
from gtsa.pretraining import plan
from gtsa.pretraining.cost import Cost
from gtsa.pretraining.settings import Pretrain


def resolved(monkeypatch, cores, loading, passing, device="cpu", workers=2, auto=True):
    monkeypatch.setattr(plan, "cores", lambda: cores)
    settings = validated(Pretrain, {"data": "x", "out": "y", "device": device, "workers": workers})
    made = Plan(settings, {"workers": "auto"} if auto else {})
    plan.resolve_measured_workers(made, Cost(loading, passing, 0.0, 0, 0))
    return made.settings.workers


@pytest.mark.parametrize(
    ("cores", "loading", "passing", "expected"),
    [(8, 0.01, 0.1, 1), (8, 0.01, 0.01, 2), (32, 0.01, 0.0025, 5), (32, 0.1, 0.001, 8), (6, 0.1, 0.001, 2)],
)
def test_as_many_as_keep_up_and_a_quarter_of_the_cores_at_most(monkeypatch, cores, loading, passing, expected):
    assert resolved(monkeypatch, cores, loading, passing) == expected


def test_given_ones_those_of_a_gpu_and_none_stay(monkeypatch):
    assert resolved(monkeypatch, 32, 0.1, 0.01, workers=3, auto=False) == 3
    assert resolved(monkeypatch, 32, 0.1, 0.01, device="cuda", workers=15) == 15
    assert resolved(monkeypatch, 2, 0.1, 0.01, workers=0) == 0
