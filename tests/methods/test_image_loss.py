"""The image loss beside GTSA's, against DINO written out by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_dino import logits_by_hand, loss_by_hand, views

from gtsa.methods.parts.image_loss import ImageLoss
from gtsa.methods.parts.prototypes import update_centres
from gtsa.models.backbone import Backbone


@pytest.fixture
def networks():
    torch.manual_seed(0)
    arguments = {"depth": 1, "embed_dim": 24, "num_heads": 2}
    student, teacher = (Backbone("vit_tiny_patch16_224", 64, arguments=arguments).double().eval() for _ in range(2))
    loss = ImageLoss(24, 16, 12, 0.05).double()
    with torch.no_grad():
        for parameter in loss.teacher_head.parameters():  # no copy, so that it shows whose head is whose
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return student, teacher, loss


def compute(networks, seen):
    student, teacher, loss = networks
    tokens = student.side_by_side([crops.pixels.flatten(0, 1) for crops in seen.groups])
    return loss(tokens, teacher(seen.global_crops.pixels.flatten(0, 1)), seen.groups)


@pytest.mark.parametrize(("globals_", "locals_"), [(2, 2), (3, 1), (2, 0)])
def test_it_is_dinos(networks, globals_, locals_):
    student, teacher, loss = networks
    seen = views(globals_=globals_, locals_=locals_ or 1)
    if not locals_:
        seen = type(seen).of(seen.groups[:1])
    loss.centre.value += torch.linspace(-0.3, 0.3, 16, dtype=torch.float64)
    dino = SimpleNamespace(
        student=SimpleNamespace(encoder=student, head=loss.student_head),
        teacher=SimpleNamespace(encoder=teacher, head=loss.teacher_head),
    )
    expected = loss_by_hand(dino, seen, np.linspace(-0.3, 0.3, 16), 0.05)
    assert compute(networks, seen).item() == pytest.approx(expected, rel=1e-9)


def test_the_centre_and_the_teachers_head_follow(networks):
    _, teacher, loss = networks
    seen = views()
    compute(networks, seen)
    update_centres([loss.centre])
    branch = SimpleNamespace(encoder=teacher, head=loss.teacher_head)
    logits = logits_by_hand(branch, seen.global_crops.pixels.flatten(0, 1))
    np.testing.assert_allclose(loss.centre.value.numpy(), 0.1 * logits.mean(0), atol=1e-12)
    before = [p.clone() for p in loss.teacher_head.parameters()]
    loss.follow(0.75, 1.0)
    for old, now, own in zip(before, loss.teacher_head.parameters(), loss.student_head.parameters(), strict=True):
        torch.testing.assert_close(now, 0.75 * old + 0.25 * own)


def test_gradients_reach_the_student_alone(networks):
    compute(networks, views()).backward()
    student, teacher, loss = networks
    assert all(p.grad is not None for p in loss.student_head.parameters())
    assert student.vit.cls_token.grad.abs().sum() > 0
    assert all(p.grad is None for p in [*teacher.parameters(), *loss.teacher_head.parameters()])


def test_the_bottleneck_is_no_wider_than_the_hidden_layers():
    assert ImageLoss(24, 16, 12, 0.05).student_head.prototypes.in_features == 12
    assert ImageLoss(24, 16, 1024, 0.05).student_head.prototypes.in_features == 256
