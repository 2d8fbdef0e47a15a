"""The teacher: a copy that follows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gtsa.methods.parts.teacher import copy_of, follow


def network(seed, dtype=torch.float64):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Dropout(0.5), nn.Linear(4, 2)).to(dtype)


def values(module):
    return torch.nn.utils.parameters_to_vector(module.parameters()).detach().clone()


@settings(deadline=None, max_examples=40)
@given(st.floats(0, 1), st.integers(0, 99))
def test_follow_is_the_moving_average(momentum, seed):
    student, teacher = network(seed), network(seed + 1)
    expected = [
        momentum * t + (1 - momentum) * s for t, s in zip(values(teacher).tolist(), values(student), strict=True)
    ]
    before = values(student)
    follow(teacher, student, momentum)
    assert values(teacher).tolist() == [pytest.approx(float(v), rel=1e-12, abs=1e-14) for v in expected]
    assert torch.equal(values(student), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_skipped_step_leaves_every_bit(dtype):
    student, teacher = network(0, dtype), network(1, dtype)
    before = values(teacher)
    follow(teacher, student, 0.5, accepted=torch.tensor(0.0))
    assert torch.equal(values(teacher), before)
    follow(teacher, student, 0.5, accepted=torch.tensor(1.0))
    assert not torch.equal(values(teacher), before)


def test_momentum_of_one_leaves_every_bit_and_of_zero_copies():
    student, teacher = network(0), network(1)
    before = values(teacher)
    follow(teacher, student, 1.0)
    assert torch.equal(values(teacher), before)
    follow(teacher, student, 0.0)
    assert torch.allclose(values(teacher), values(student), rtol=1e-12, atol=1e-15)


def test_copy_is_equal_apart_without_gradients_and_in_evaluation_mode():
    student = network(0).train()
    teacher = copy_of(student)
    assert torch.equal(values(teacher), values(student))
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not any(m.training for m in teacher.modules())
    assert all(m.training for m in student.modules())
    assert all(p.requires_grad for p in student.parameters())
    follow(teacher, network(1), 0.0)
    assert not torch.equal(values(teacher), values(student))


def test_follow_builds_no_graph():
    student, teacher = network(0), copy_of(network(1))
    follow(teacher, student, 0.5)
    assert all(p.grad_fn is None and p.is_leaf for p in teacher.parameters())


def test_networks_of_different_length_are_refused():
    with pytest.raises(AssertionError):
        follow(network(0), nn.Linear(3, 4), 0.5)
