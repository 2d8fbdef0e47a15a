"""Region losses beside the cosine, against loops in float64 over images, cells and prototypes."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sinkhorn import by_hand

from gtsa.core.types import Crops
from gtsa.methods.parts import region_losses
from gtsa.methods.parts.geometry import pairs_of
from gtsa.methods.parts.losses import region
from gtsa.methods.parts.prototypes import Centre
from gtsa.methods.parts.region_losses import build, overlap_shares, recentred

few = settings(deadline=None, max_examples=12)
images_ = st.integers(2, 4)
seeds = st.integers(0, 2**32)


def cells_of(images, views, seen, side=2, width=3, seed=0):
    """Cells of the student and of the teacher: [B, V, G, c, c, C]."""
    draw = torch.Generator().manual_seed(seed)
    shape = (2, images, views, seen, side, side, width)
    return list(torch.randn(shape, generator=draw, dtype=torch.float64))


def crops_of(images, count, seed=0):
    """Crops that overlap: all of them hold the point (50, 50)."""
    draw = torch.Generator().manual_seed(seed)
    low, high = torch.rand(2, images, count, 2, generator=draw, dtype=torch.float64) * 45
    return Crops(None, torch.cat([low, 55 + high], -1), torch.zeros(images, count, dtype=torch.int64), None)


def cosine(a, b):
    return float(a @ b / a.norm() / b.norm())


def call(loss, student, target, size=0, seed=0):
    """The loss of all pairs [B, P], and the pairs."""
    images, views, seen = student.shape[:3]
    pairs = pairs_of(size, views, seen)
    return loss(student, target, crops_of(images, views, seed), crops_of(images, seen, seed + 1), pairs), pairs


def test_cosine_is_the_published_loss_of_the_pairs():
    student, target = cells_of(3, 2, 2)
    actual, (views, seen) = call(build("cosine", 3, 0.1, 8, 0.02), student, target)
    assert torch.equal(actual, region(student, target)[:, views, seen])
    assert actual.shape == (3, 2)


# InfoNCE


def infonce_by_hand(student, target, pairs, temperature):
    """Every cell against its own target and all targets of other images."""
    losses = torch.zeros(len(student), len(pairs[0]))
    for b in range(len(student)):
        for p, (v, g) in enumerate(zip(*pairs, strict=True)):
            terms = []
            for query, key in zip(student[b, v, g].flatten(0, 1), target[b, v, g].flatten(0, 1), strict=True):
                logits = [cosine(query, key) / temperature]
                for other in range(len(student)):
                    for w, h in zip(*pairs, strict=True):
                        if other != b:
                            negatives = target[other, w, h].flatten(0, 1)
                            logits += [cosine(query, negative) / temperature for negative in negatives]
                terms.append(math.log(sum(map(math.exp, logits))) - logits[0])
            losses[b, p] = sum(terms) / len(terms)
    return losses


@few
@given(images_, st.sampled_from([(2, 2, 0), (1, 2, 1), (3, 1, 1)]), st.floats(0.05, 1), seeds)
def test_infonce_is_the_plain_loop(images, shape, temperature, seed):
    student, target = cells_of(images, *shape[:2], seed=seed)
    actual, pairs = call(build("infonce", 3, temperature, 8, 0.02), student, target, shape[2])
    expected = infonce_by_hand(student, target, pairs, temperature)
    torch.testing.assert_close(actual.float(), expected, rtol=1e-5, atol=1e-5)


def test_cells_of_the_same_image_are_no_negatives():
    """The loss of a cell does not change with other cells of its image, but with cells of other images."""
    student, target = cells_of(2, 2, 2)
    loss = build("infonce", 3, 0.2, 8, 0.02)
    before, _ = call(loss, student, target)
    target[0, 0, 1, 1] += 5  # the last two cells of the first pair of image 0
    after, _ = call(loss, student, target)
    torch.testing.assert_close(after[0, 1], before[0, 1])  # the other pair of image 0
    assert not torch.allclose(after[1], before[1])


@pytest.mark.parametrize(("limit", "each"), [(2048, 8), (9, 3), (1, 1)])
def test_the_number_of_negatives_is_limited_and_the_same_for_every_image(monkeypatch, limit, each):
    """Where all vectors are one, the loss is the logarithm of the number of candidates."""
    monkeypatch.setattr(region_losses, "NEGATIVES", limit)
    same = torch.ones(3, 2, 2, 2, 2, 5, dtype=torch.float64)
    actual, _ = call(build("infonce", 5, 0.1, 8, 0.02), same, same)
    torch.testing.assert_close(actual, torch.full_like(actual, math.log(1 + 2 * each)))


def test_negatives_are_drawn_from_the_global_generator(monkeypatch):
    monkeypatch.setattr(region_losses, "NEGATIVES", 4)
    loss, (student, target) = build("infonce", 3, 0.1, 8, 0.02), cells_of(2, 2, 2)
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(call(loss, student, target)[0])
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_infonce_is_low_where_cells_agree_and_high_where_they_agree_with_another_image():
    student, _ = cells_of(2, 2, 2, width=8)
    loss = build("infonce", 8, 0.1, 8, 0.02)
    assert call(loss, student, student)[0].max() < call(loss, student, student.roll(1, 0))[0].min() - 5


# Prototypes


def shares_by_hand(view, seen):
    shares = np.zeros((*view.boxes.shape[:2], seen.boxes.shape[1]))
    for b, v, g in np.ndindex(*shares.shape):
        (x1, y1, x2, y2), (a1, b1, a2, b2) = view.boxes[b, v].tolist(), seen.boxes[b, g].tolist()
        width, height = min(x2, a2) - max(x1, a1), min(y2, b2) - max(y1, b1)
        shares[b, v, g] = max(0, width) * max(0, height) / ((x2 - x1) * (y2 - y1))
    return shares


@few
@given(images_, seeds)
def test_shares_of_views(images, seed):
    view, seen = crops_of(images, 3, seed), crops_of(images, 2, seed + 1)
    actual = overlap_shares(view, seen)
    np.testing.assert_allclose(actual.numpy(), shares_by_hand(view, seen), rtol=1e-12)
    assert actual.min() > 0 and actual.max() <= 1


def test_crops_that_do_not_overlap_share_nothing():
    boxes = torch.tensor([[[0.0, 0, 10, 10], [20, 20, 30, 30]]])
    crops = Crops(None, boxes, torch.zeros(1, 2, dtype=torch.int64), None)
    assert overlap_shares(crops, crops)[0].tolist() == [[1, 0], [0, 1]]


def prototypes_by_hand(loss, student, target, pairs, shares, temperatures):
    prototypes = loss.prototypes.weight.detach()
    rows = [
        [cosine(cell, prototype) for prototype in prototypes]
        for b in range(len(target))
        for v, g in zip(*pairs, strict=True)
        for cell in target[b, v, g].flatten(0, 1)
    ]
    assigned = iter(by_hand(rows, temperatures[1], 3))
    weights = [[shares[b, v, g] for v, g in zip(*pairs, strict=True)] for b in range(len(target))]
    losses = torch.zeros(len(student), len(pairs[0]), dtype=torch.float64)
    for b in range(len(student)):
        for p, (v, g) in enumerate(zip(*pairs, strict=True)):
            terms = []
            for cell in student[b, v, g].flatten(0, 1):
                logits = [cosine(cell, prototype) / temperatures[0] for prototype in prototypes]
                log_sum = math.log(sum(map(math.exp, logits)))
                terms.append(sum(q * (log_sum - logit) for q, logit in zip(next(assigned), logits, strict=True)))
            losses[b, p] = np.mean(terms) * weights[b][p] / np.mean(weights)
    return losses


@few
@given(images_, st.sampled_from([(2, 2, 0), (1, 2, 1), (3, 1, 1)]), st.integers(1, 6), seeds)
def test_prototypes_are_the_plain_loop(images, shape, count, seed):
    torch.manual_seed(seed)
    student, target = cells_of(images, *shape[:2], seed=seed)
    loss = build("prototypes", 3, 0.1, count, 0.05).double()
    actual, pairs = call(loss, student, target, shape[2], seed)
    shares = shares_by_hand(crops_of(images, shape[0], seed), crops_of(images, shape[1], seed + 1))
    expected = prototypes_by_hand(loss, student, target, pairs, shares, (0.1, 0.05))
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_prototypes_learn_and_targets_have_no_gradient():
    student, target = (cells.requires_grad_() for cells in cells_of(2, 2, 2))
    loss = build("prototypes", 3, 0.1, 5, 0.05).double()
    call(loss, student, target)[0].sum().backward()
    assert loss.prototypes.weight.grad.abs().sum() > 0 and student.grad.abs().sum() > 0
    assert target.grad is None


def test_lengths_of_cells_and_prototypes_do_not_matter():
    student, target = cells_of(2, 2, 2)
    for name in ("infonce", "prototypes"):
        loss = build(name, 3, 0.1, 5, 0.05).double()
        before, _ = call(loss, student, target)
        for parameter in loss.parameters():
            parameter.data *= torch.rand(len(parameter), 1, dtype=torch.float64) + 0.5
        torch.testing.assert_close(call(loss, 3 * student, 0.2 * target)[0], before)


# Centred maps


def test_the_mean_of_earlier_steps_is_subtracted():
    mean = Centre(3).double().train()
    maps = [torch.randn(2, 2, 3, 3, 3, dtype=torch.float64) + 1 for _ in range(2)]
    assert torch.equal(recentred(maps[0], mean), maps[0])  # no step is done yet
    recentred(maps[1], mean)
    mean.update(1.0)
    expected = 0.1 * torch.stack(maps).mean((0, 1, 2, 3, 4))  # momentum 0.9, from 0
    torch.testing.assert_close(mean.value, expected)
    torch.testing.assert_close(recentred(maps[0], mean), maps[0] - expected)
    assert recentred(maps[0], None) is maps[0]
