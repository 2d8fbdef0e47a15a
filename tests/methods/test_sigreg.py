"""SIGReg, against loops over knots and SciPy's integration, and by its properties; over two processes."""

import cmath
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad

from forking import Forked
from gtsa.core.compilation import compiling
from gtsa.core.processes import alone
from gtsa.methods.parts import processes
from gtsa.methods.parts.sigreg import NORMAL, draw_directions, sigreg

few = settings(deadline=None, max_examples=30)
seeds = st.integers(0, 999)


def normal(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def squared_distance(sample, t):
    """Of the empirical characteristic function at ``t`` from that of the standard normal."""
    phi = sum(cmath.exp(1j * t * x) for x in sample) / len(sample)
    return abs(phi - math.exp(-t * t / 2)) ** 2


def published(sample):
    """The statistic of one projection as published: 17 knots in [-5, 5], trapezoidal rule, Gaussian window."""
    knots = np.linspace(-5, 5, 17)
    return len(sample) * np.trapezoid([squared_distance(sample, t) * math.exp(-t * t / 2) for t in knots], knots)


def orthogonal(seed, width):
    return torch.linalg.qr(normal(seed, width, width)).Q


@few
@given(st.integers(1, 7), st.integers(1, 4), st.integers(1, 3), st.floats(0, 3), seeds)
def test_equals_the_published_sum_over_knots(count, width, slices, scale, seed):
    vectors, directions = scale * normal(seed, count, width), draw_directions(width, slices, 0.5).double()
    expected = np.mean([published((vectors @ directions[:, m]).tolist()) for m in range(slices)])
    assert sigreg(vectors, directions).item() == pytest.approx(expected, rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("sample", [[0.0], [0.3, -1.2, 0.8], [2.0, 2.0], [-1.5, -0.5, 0.5, 1.5]])
def test_equals_the_integral(sample):
    """17 knots are enough for vectors of unit variance."""
    integral, _ = quad(lambda t: squared_distance(sample, t) * math.exp(-t * t / 2), -math.inf, math.inf)
    value = sigreg(torch.tensor(sample, dtype=torch.float64)[:, None], torch.ones(1, 1))
    assert value.item() == pytest.approx(len(sample) * integral, rel=2e-3)


def test_many_distributions_count_alike():
    vectors, directions = normal(0, 2, 3, 5, 4), draw_directions(4, 6, 0.1)
    each = [sigreg(part, directions).item() for part in vectors.flatten(0, 1)]
    assert sigreg(vectors, directions).item() == pytest.approx(np.mean(each), rel=1e-12)


@pytest.mark.parametrize("count", [4, 64])
def test_a_standard_normal_sample_has_its_expectation_at_any_size(count):
    assert pytest.approx(math.sqrt(2 * math.pi) - math.sqrt(2 * math.pi / 3), abs=5e-5) == NORMAL
    samples = normal(0, 8000, count, 1)
    statistics = torch.stack([sigreg(sample, torch.ones(1, 1)) for sample in samples.split(80)])  # means of 80
    error = statistics.std().item() / math.sqrt(len(statistics))
    assert abs(statistics.mean().item() - NORMAL) < 4 * error < 0.1


@few
@given(seeds)
def test_it_grows_with_collapse(seed):
    """Whole collapse, collapse of all dimensions but one, and a shift of the mean."""
    vectors, directions = normal(seed, 256, 8), draw_directions(8, 64, 0.2)
    healthy = sigreg(vectors, directions).item()
    shrunk = [sigreg(vectors * scale, directions).item() for scale in (0.8, 0.5, 0.2, 0.0)]
    assert [healthy, *shrunk] == sorted([healthy, *shrunk])
    assert shrunk[-1] == pytest.approx(0.409 * 256, rel=1e-2)
    line = torch.cat([vectors[:, :1], torch.zeros(256, 7, dtype=torch.float64)], 1)
    assert sigreg(line, directions).item() > 10 * healthy
    assert sigreg(vectors + 1, directions).item() > 10 * healthy


@few
@given(st.integers(1, 6), seeds)
def test_a_rotation_of_vectors_and_directions_changes_nothing(width, seed):
    vectors, directions, turn = normal(seed, 9, width), draw_directions(width, 5, 0.3).double(), orthogonal(seed, width)
    torch.testing.assert_close(sigreg(vectors @ turn, turn.T @ directions), sigreg(vectors, directions))
    torch.testing.assert_close(sigreg(vectors, -directions), sigreg(vectors, directions))  # the integrand is even


def test_gradients_are_right_and_lead_to_the_standard_normal():
    vectors, directions = normal(3, 5, 3).requires_grad_(), draw_directions(3, 4, 0.3).double()
    assert torch.autograd.gradcheck(lambda v: sigreg(v, directions), (vectors,))
    moved = (0.1 * normal(0, 64, 2) + 2).requires_grad_()
    for step in range(300):
        (gradient,) = torch.autograd.grad(sigreg(moved, draw_directions(2, 16, step / 300)), moved)
        moved = (moved - 0.5 * gradient).detach().requires_grad_()
    assert sigreg(moved, draw_directions(2, 64, 1.0)).item() < NORMAL


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    vectors, directions = normal(0, 100, 8).to(dtype), draw_directions(8, 32, 0.4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = sigreg(vectors, directions)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(sigreg(vectors.double(), directions).item(), rel=1e-4)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo
def test_it_is_compiled_in_one_piece():
    vectors, directions = normal(0, 20, 8), draw_directions(8, 32, 0.4)
    expected = sigreg(vectors, directions)
    torch._dynamo.reset()
    with compiling(True, pytest.fail, backend="aot_eager"):
        torch.testing.assert_close(sigreg(vectors, directions), expected)
    torch._dynamo.reset()


# Directions


def test_directions_are_unit_vectors_and_a_function_of_time():
    one, same, other = (draw_directions(16, 200, time) for time in (0.5, 0.5, 0.25))
    torch.testing.assert_close(one.norm(dim=0), torch.ones(200))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert (one @ one.T / 200 - torch.eye(16) / 16).abs().max() < 0.03  # no axis is preferred


def test_directions_of_all_steps_of_a_run_differ():
    for steps in (1000, 1024):
        drawn = {tuple(draw_directions(2, 1, step / steps).flatten().tolist()) for step in range(steps)}
        assert len(drawn) == steps


# Several processes


def half_of(folder, rank):
    """What one of two processes does with its half of the vectors."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    vectors = normal(5, 2, 8, 4)[:, 4 * rank : 4 * rank + 4].clone().requires_grad_()
    loss = sigreg(vectors, draw_directions(4, 16, 0.5)) + (1 + rank) * processes.mean(vectors.sum())
    loss.backward()
    torch.save((loss.detach(), vectors.grad), folder / f"{rank}.pt")
    with alone():  # the other one does not do this
        if rank == 0:
            torch.save(sigreg(vectors.detach(), draw_directions(4, 16, 0.5)), folder / "alone.pt")
    torch.distributed.barrier()


def test_two_processes_have_the_value_and_the_gradient_of_one(tmp_path):
    both = [Forked(half_of, tmp_path, rank) for rank in range(2)]
    for process in both:
        _, err = process.communicate()
        assert process.returncode == 0, err
    vectors, directions = normal(5, 2, 8, 4).requires_grad_(), draw_directions(4, 16, 0.5)
    value = sigreg(vectors, directions)
    sums = vectors.sum() / 2  # the mean over the processes
    (value + 1.5 * sums).backward()  # as the losses of both, averaged
    losses, gradients = zip(*(torch.load(tmp_path / f"{rank}.pt") for rank in range(2)), strict=True)
    for rank, loss in enumerate(losses):
        torch.testing.assert_close(loss, (value + (1 + rank) * sums).detach())
    torch.testing.assert_close(torch.cat(gradients, 1) / 2, vectors.grad)  # DDP divides by the processes
    alone = sigreg(vectors.detach()[:, :4], directions)
    torch.testing.assert_close(torch.load(tmp_path / "alone.pt"), alone)
