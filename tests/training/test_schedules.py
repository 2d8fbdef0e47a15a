"""Schedules, by hand-computed values."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gtsa.training.schedules import After, Constant, Cosine, Ramp, Warmup, warmup_then

few = settings(deadline=None, max_examples=100)


def close(value):
    return pytest.approx(value, rel=1e-12, abs=1e-15)


def test_constant():
    assert [Constant(3.0)(t) for t in (0, 0.5, 1)] == [3, 3, 3]


def test_cosine_by_hand():
    half = Cosine(2.0, 4.0)
    times = (0, 1 / 3, 0.5, 2 / 3, 1)
    assert [half(t) for t in times] == [close(v) for v in (2, 2.5, 3, 3.5, 4)]
    assert half(0.25) == close(3 - math.sqrt(0.5))


@few
@given(st.floats(-5, 5), st.floats(-5, 5), st.floats(1, 1e9))
def test_cosine_holds_its_end(start, end, late):
    assert Cosine(start, end)(1.0) == Cosine(start, end)(late) == end
    assert Cosine(start, end)(0.0) == pytest.approx(start, abs=1e-12)


@few
@given(st.floats(0, 1), st.floats(0, 1))
def test_cosine_is_monotonous(a, b):
    rising = Cosine(0.0, 1.0)
    assert (rising(min(a, b)) <= rising(max(a, b))) and 0 <= rising(a) <= 1


def test_after_switches_on_at_its_start():
    after = After(0.11, 0.5)
    assert [after(t) for t in (0, 0.10999, 0.11, 1)] == [0, 0, 0.5, 0.5]


@few
@given(st.integers(2, 500), st.data())
def test_last_warm_up_step_is_at_the_peak_and_the_next_starts_the_cosine(steps, data):
    warm = data.draw(st.integers(1, steps - 1))
    rate = warmup_then(Cosine(3.0, 1e-6), warm / steps, steps)
    assert rate((warm - 1) / steps) == close(3)
    assert rate(warm / steps) == close(3)
    for step in range(warm):
        assert rate(step / steps) == close(3.0 * (step / (warm - 1) if warm > 1 else 1))
    rest = steps - warm
    for step in range(warm, steps + 1):
        angle = math.pi * (step - warm) / rest
        assert rate(step / steps) == pytest.approx(1e-6 + (3 - 1e-6) * (1 + math.cos(angle)) / 2, rel=1e-9)
    assert rate(1.0) == close(1e-6)


def test_eight_steps_with_three_of_warm_up_by_hand():
    rate = warmup_then(Cosine(1.0, 0.0), 3 / 8, 8)
    tail = [(1 + math.cos(math.pi * k / 5)) / 2 for k in range(6)]
    assert [rate(s / 8) for s in range(9)] == [close(v) for v in (0, 0.5, 1, *tail)]


def test_no_warm_up_is_the_schedule_itself():
    assert warmup_then(Cosine(1.0, 0.0), 0.0, 100) == Cosine(1.0, 0.0)
    assert warmup_then(Cosine(1.0, 0.0), 0.004, 100)(0.0) == 1


def test_one_step_of_warm_up_starts_at_the_peak():
    rate = warmup_then(Cosine(1.0, 0.0), 0.01, 100)
    assert rate(0.0) == rate(0.01) == 1
    assert rate(0.02) < 1


def test_warm_up_over_the_whole_run_ends_at_the_peak():
    rate = warmup_then(Cosine(1.0, 0.25), 1.0, 10)
    assert rate(0.9) == close(1)
    assert rate(1.0) == 0.25


def test_warm_up_takes_any_schedule():
    rate = Warmup(0.2, 0.25, Constant(7.0))
    assert [rate(t) for t in (0, 0.1, 0.2, 0.24, 0.25, 1)] == [close(v) for v in (0, 3.5, 7, 7, 7, 7)]


@few
@given(st.floats(0, 1), st.integers(1, 40), st.integers(2, 50))
def test_short_and_long_runs_mean_the_same(time, warm, factor):
    short, long = (warmup_then(Cosine(1.0, 0.0), warm / 100, 100 * n) for n in (1, factor))
    most = 1 / (warm - 1) if warm > 1 else 1  # warm-up ends a step early: that step is all they differ by
    assert abs(short(time) - long(time)) <= most + 1e-9
    if time >= warm / 100:
        assert short(time) == close(long(time))


def test_a_ramp_may_begin_later():
    ramp = Ramp(0.0, 0.1, until=0.4, since=0.2)
    assert [ramp(t) for t in (0, 0.19, 0.2, 0.3, 0.4, 1)] == pytest.approx([0, 0, 0, 0.05, 0.1, 0.1])
