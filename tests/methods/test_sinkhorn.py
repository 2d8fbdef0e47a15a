"""Sinkhorn-Knopp against plain loops in float64; and over two processes that hold parts of a batch."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from forking import Forked
from gtsa.core import processes
from gtsa.methods.parts.sinkhorn import sinkhorn


def by_hand(scores, temperature, iterations):
    """The published loop (SwAV's listing): exponentials, sums, quotients, number by number."""
    rows, columns = range(len(scores)), range(len(scores[0]))
    q = [[math.exp(value / temperature) for value in row] for row in scores]
    total = sum(map(sum, q))
    q = [[value / total for value in row] for row in q]
    for _ in range(iterations):
        for k in columns:
            used = sum(q[n][k] for n in rows)
            for n in rows:
                q[n][k] /= used * len(columns)
        for n in rows:
            used = sum(q[n])
            for k in columns:
                q[n][k] /= used * len(rows)
    return [[value * len(rows) for value in row] for row in q]


def scores_of(seed, rows, columns, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)
    return (torch.rand(rows, columns, generator=draw, dtype=torch.float64) * 2 - 1).to(dtype)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 99), st.integers(1, 9), st.integers(1, 7), st.floats(0.03, 2), st.integers(1, 5))
def test_it_is_the_published_loop(seed, rows, columns, temperature, iterations):
    scores = scores_of(seed, rows, columns)
    before = scores.clone()
    actual = sinkhorn(scores, temperature, iterations)
    expected = torch.tensor(by_hand(scores.tolist(), temperature, iterations), dtype=torch.float64)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)
    assert torch.equal(scores, before)


def test_with_many_iterations_all_prototypes_are_used_alike():
    assignments = sinkhorn(scores_of(3, 12, 4), 0.2, 200)
    torch.testing.assert_close(assignments.sum(1), torch.ones(12, dtype=torch.float64))
    torch.testing.assert_close(assignments.sum(0), torch.full((4,), 3.0, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_temperature_overflows_or_divides_by_zero(dtype):
    """exp(60 / 0.001) is infinite in float64 too. One prototype is far from all rows."""
    scores = scores_of(5, 16, 8, dtype) * 60
    scores[:, 3] = -60
    assignments = sinkhorn(scores, 0.001)
    assert assignments.dtype == torch.float32 and torch.isfinite(assignments).all()
    torch.testing.assert_close(assignments.sum(1), torch.ones(16))


def test_no_rows_have_no_assignments():
    assert sinkhorn(torch.zeros(0, 4), 0.1).shape == (0, 4)  # a batch of iBOT without masks


def test_no_gradient_reaches_the_scores():
    assert not sinkhorn(scores_of(0, 4, 3).requires_grad_(), 0.1).requires_grad


def test_a_prototype_that_all_rows_prefer_does_not_win():
    """What softmax would do: the collapse that Sinkhorn prevents."""
    scores = scores_of(1, 32, 4) * 0.1
    scores[:, 0] += 1
    assert (scores / 0.05).softmax(1)[:, 0].min() > 0.99
    assert sinkhorn(scores, 0.05)[:, 0].mean() == pytest.approx(0.25, abs=0.02)


PARTS = (5, 0, 3)  # rows of each process: masked patches differ in number, too


def one_part(folder: Path, rank: int) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=len(PARTS))
    rows = scores_of(7, sum(PARTS), 6).split(PARTS)[rank]
    result = {"together": sinkhorn(rows, 0.05)}
    if rank == 0:
        with processes.alone():
            result["alone"] = sinkhorn(rows, 0.05)
    torch.save(result, folder / f"{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_several_processes_have_the_assignments_of_one(tmp_path):
    all_ = [Forked(one_part, tmp_path, rank) for rank in range(len(PARTS))]
    for process in all_:
        _, err = process.communicate()
        assert process.returncode == 0, err
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(len(PARTS))]
    scores = scores_of(7, sum(PARTS), 6)
    torch.testing.assert_close(torch.cat([result["together"] for result in results]), sinkhorn(scores, 0.05))
    torch.testing.assert_close(results[0]["alone"], sinkhorn(scores[: PARTS[0]], 0.05))
