"""The three losses, against plain loops over numbers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gtsa.methods.parts import losses

few = settings(deadline=None, max_examples=40)
small = st.integers(1, 6)
seeds = st.integers(0, 999)


def normal(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def cosine(a, b):
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))


def slow_region(student, target):
    cells = [
        cosine(a, b) for r, s in zip(student.tolist(), target.tolist(), strict=True) for a, b in zip(r, s, strict=True)
    ]
    return -sum(cells) / len(cells)


def slow_patch(student, teacher, matches):
    table = [[cosine(a, b) for b in teacher.tolist()] for a in student.tolist()]
    of_students = sorted((max(row) for row in table), reverse=True)[:matches]
    of_teachers = sorted((max(row[m] for row in table) for m in range(len(teacher))), reverse=True)[:matches]
    return -(sum(of_students) / matches + sum(of_teachers) / matches) / 2


@few
@given(small, small, seeds)
def test_region_is_the_mean_negative_cosine_of_cells(cells, channels, seed):
    student, target = normal(seed, 2, 3, cells, cells, channels), normal(seed + 1, 2, 3, cells, cells, channels)
    loss = losses.region(student, target)
    assert loss.shape == (2, 3)
    assert loss[1, 2].item() == pytest.approx(slow_region(student[1, 2], target[1, 2]), abs=1e-12)


def test_region_by_hand():
    student = torch.tensor([[[3.0, 4], [1, 0]], [[0, 1], [1, 1]]])
    target = torch.tensor([[[4.0, 3], [-2, 0]], [[5, 0], [2, 2]]])  # cosines 24/25, -1, 0, 1
    assert losses.region(student, target).item() == pytest.approx(-0.24)


@few
@given(st.integers(1, 9), st.integers(1, 9), st.data(), seeds)
def test_patch_keeps_the_best_matches_of_either_side(n, m, data, seed):
    matches = data.draw(st.integers(1, min(n, m)))
    student, teacher = normal(seed, 2, n, 5), normal(seed + 1, 2, m, 5)
    loss = losses.patch_correspondence(student, teacher, matches)
    assert loss.shape == (2,)
    for b in range(2):
        assert loss[b].item() == pytest.approx(slow_patch(student[b], teacher[b], matches), abs=1e-12)


def test_patch_by_hand():
    student = torch.tensor([[1.0, 0], [0.6, 0.8], [-1, 0]])
    teacher = torch.tensor([[2.0, 0], [0, 1]])
    # cosines: (1, 0), (0.6, 0.8), (-1, 0); students' best: 1, 0.8, 0; teachers' best: 1, 0.8
    assert losses.patch_correspondence(student, teacher, 1).item() == pytest.approx(-1)
    assert losses.patch_correspondence(student, teacher, 2).item() == pytest.approx(-0.9)


def test_patch_broadcasts_students_over_teachers():
    student, teacher = normal(0, 2, 3, 4, 5), normal(1, 2, 2, 6, 5)
    loss = losses.patch_correspondence(student[:, :, None], teacher[:, None], 2)
    assert loss.shape == (2, 3, 2)
    assert loss[1, 2, 0].item() == pytest.approx(slow_patch(student[1, 2], teacher[1, 0], 2), abs=1e-12)


@few
@given(st.floats(0.01, 100), seeds)
def test_lengths_of_vectors_do_not_count(scale, seed):
    student, target = normal(seed, 3, 3, 4), normal(seed + 1, 3, 3, 4)
    assert torch.allclose(losses.region(student * scale, target), losses.region(student, target / scale))
    flat = student.flatten(0, 1), target.flatten(0, 1)
    assert torch.allclose(
        losses.patch_correspondence(flat[0] * scale, flat[1], 4), losses.patch_correspondence(*flat, 4)
    )


@few
@given(seeds)
def test_rotation_is_cross_entropy(seed):
    logits, rotations = normal(seed, 2, 3, 4), torch.randint(4, (2, 3), generator=torch.Generator().manual_seed(seed))
    loss = losses.rotation(logits, rotations)
    assert loss.shape == (2, 3)
    for b in range(2):
        for v in range(3):
            row = logits[b, v].tolist()
            expected = math.log(sum(map(math.exp, row))) - row[rotations[b, v]]
            assert loss[b, v].item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_lose_nothing(dtype):
    a, b = normal(0, 3, 3, 64, dtype=dtype), normal(1, 3, 3, 64, dtype=dtype)
    a = a * 300  # whose squares overflow in float16
    logits, rotations = normal(2, 5, 4, dtype=dtype), torch.tensor([0, 1, 2, 3, 0])
    for loss, inputs in (
        (losses.region, (a, b)),
        (lambda x, y: losses.patch_correspondence(x.flatten(0, 1), y.flatten(0, 1), 4), (a, b)),
        (lambda x, y: losses.rotation(x, rotations), (logits, logits)),
    ):
        exact = loss(*(x.double() for x in inputs)).flatten().tolist()
        assert loss(*inputs).flatten().tolist() == pytest.approx(exact, rel=1e-5, abs=1e-5)


def test_zero_vectors_give_finite_gradients():
    student = torch.zeros(2, 2, 3, requires_grad=True)
    losses.region(student, torch.ones(2, 2, 3)).backward()
    assert student.grad.isfinite().all()


def test_gradients_are_right():
    a, b = normal(0, 4, 3).requires_grad_(), normal(1, 5, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y: losses.patch_correspondence(x, y, 2), (a, b))
    assert torch.autograd.gradcheck(lambda x, y: losses.region(x[None], y[None, :4]), (a, b))


# Kernel alignment


def slow_cka(student, teacher):
    """HSIC with explicit centring matrices (Kornblith et al. 2019, section 3)."""
    n = len(student)
    centring = torch.eye(n, dtype=torch.float64) - torch.ones(n, n, dtype=torch.float64) / n

    def gram(x):
        products = [[sum(p * q for p, q in zip(a, b, strict=True)) for b in x.tolist()] for a in x.tolist()]
        return torch.tensor(products, dtype=torch.float64)

    def hsic(k, m):
        return torch.trace(k @ centring @ m @ centring).item() / (n - 1) ** 2

    k, m = gram(student), gram(teacher)
    return hsic(k, m) / math.sqrt(hsic(k, k) * hsic(m, m))


@few
@given(st.integers(2, 7), st.integers(1, 5), st.integers(1, 5), seeds)
def test_cka_is_the_normalised_hsic(patches, width, other, seed):
    student, teacher = normal(seed, 2, patches, width), normal(seed + 1, 2, patches, other)
    alignment = losses.cka(student, teacher)
    assert alignment.shape == (2,)
    assert ((alignment >= 0) & (alignment <= 1 + 1e-12)).all()
    for b in range(2):
        assert alignment[b].item() == pytest.approx(slow_cka(student[b], teacher[b]), rel=1e-9, abs=1e-12)


def test_cka_by_hand():
    line, corners = torch.tensor([[-1.0], [0], [1]]), torch.tensor([[0.0, 0], [1, 0], [0, 0]])
    # of one channel it is the squared correlation: (-1, 0, 1) and (-2, 1, 1) / 3 have 1 / (2 * 2 / 3)
    assert losses.cka(line, torch.tensor([[0.0], [1], [1]])).item() == pytest.approx(0.75)
    assert losses.cka(line, corners).item() == pytest.approx(0, abs=1e-6)


@few
@given(st.integers(2, 9), st.integers(1, 6), st.floats(0.01, 100), seeds)
def test_cka_ignores_rotation_scale_and_shift_of_features_but_not_the_order_of_patches(n, width, scale, seed):
    student, teacher = normal(seed, n, width), normal(seed + 1, n, width)
    turn = torch.linalg.qr(normal(seed + 2, width, width)).Q
    moved = scale * student @ turn + normal(seed + 3, width)
    torch.testing.assert_close(losses.cka(moved, teacher), losses.cka(student, teacher))
    torch.testing.assert_close(losses.cka(student, moved), torch.ones((), dtype=torch.float64))
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(losses.cka(student[order], teacher[order]), losses.cka(student, teacher))
    torch.testing.assert_close(losses.cka(student, teacher), losses.cka(teacher, student))


def test_cka_of_patches_that_are_all_alike_is_0_with_finite_gradients():
    student = torch.ones(4, 3, requires_grad=True)
    alignment = losses.cka(student, normal(0, 4, 3, dtype=torch.float32))
    alignment.backward()
    assert alignment.item() == pytest.approx(0)
    assert student.grad.isfinite().all()


def test_cka_gradients_and_half_precision():
    a, b = normal(0, 5, 3).requires_grad_(), normal(1, 5, 4).requires_grad_()
    assert torch.autograd.gradcheck(losses.cka, (a, b))
    for dtype in (torch.float16, torch.bfloat16):
        x, y = normal(2, 6, 8, dtype=dtype) * 300, normal(3, 6, 8, dtype=dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = losses.cka(x, y)
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(losses.cka(x.double(), y.double()).item(), rel=1e-4)


# What a teacher tells


def test_mutual_information_by_hand():
    """Two images, three prototypes; of the second image two views, which are averaged first."""
    assignments = torch.tensor(
        [[[0.5, 0.5, 0.0], [0.5, 0.5, 0.0]], [[0.0, 0.5, 0.5], [0.0, 0.0, 1.0]]], dtype=torch.float64
    )
    one, other, mean = (0.5, 0.5, 0.0), (0.0, 0.25, 0.75), (0.25, 0.375, 0.375)
    expected = [
        sum(p * math.log(p / m) for p, m in zip(row, mean, strict=True) if p) / math.log(2) for row in (one, other)
    ]
    assert losses.mutual_information(assignments).tolist() == pytest.approx(expected)


@few
@given(seeds, small, small, st.integers(2, 9), st.floats(0.01, 100))
def test_mutual_information_of_a_batch_is_a_share(seed, images, crops, prototypes, sharpness):
    assignments = (sharpness * normal(seed, images, crops, prototypes)).softmax(-1)
    assert -1e-9 <= losses.mutual_information(assignments).mean().item() <= 1 + 1e-9
    assert losses.mutual_information(assignments[:1].expand(images, -1, -1)).abs().max() < 1e-9  # the same of all


def test_mutual_information_is_largest_with_a_prototype_for_each_image():
    assignments = torch.eye(4, 6)[:, None].expand(-1, 2, -1)
    assert losses.mutual_information(assignments).tolist() == pytest.approx([1.0] * 4)
    assert losses.mutual_information(torch.full((4, 2, 6), 1 / 6)).abs().max() < 1e-6


# KoLeo


def slow_koleo(vectors):
    unit = [[value / math.sqrt(sum(v * v for v in row)) for value in row] for row in vectors.tolist()]
    nearest = [min(math.dist(a, b) for m, b in enumerate(unit) if m != n) for n, a in enumerate(unit)]
    return -sum(map(math.log, nearest)) / len(nearest)


@few
@given(st.integers(2, 7), st.integers(2, 5), seeds)
def test_koleo_is_the_mean_log_distance_to_the_nearest_other(n, width, seed):
    vectors = normal(seed, 3, n, width)
    assert losses.koleo(vectors).tolist() == pytest.approx([slow_koleo(each) for each in vectors], rel=1e-5)
    torch.testing.assert_close(losses.koleo(vectors * 7), losses.koleo(vectors))


def test_koleo_pushes_the_nearest_apart_and_lives_with_equal_vectors():
    near = normal(0, 4, 3)
    near[1] = near[0] + 0.01 * normal(1, 3)
    vectors = near.clone().requires_grad_()
    losses.koleo(vectors).backward()
    moved = near - 1e-4 * vectors.grad
    assert torch.dist(*moved[:2]) > torch.dist(*near[:2])
    equal = torch.ones(3, 4, requires_grad=True)
    losses.koleo(equal).backward()
    assert equal.grad.isfinite().all()
    alone = normal(2, 1, 4).requires_grad_()
    losses.koleo(alone).backward()
    assert losses.koleo(alone) == 0 and not alone.grad.any()


def test_entropy_is_a_share_of_the_largest():
    probs = torch.tensor([[0.25] * 4, [1.0, 0, 0, 0], [0.5, 0.5, 0, 0]])
    assert losses.entropy(probs).tolist() == pytest.approx([1, 0, 0.5])
