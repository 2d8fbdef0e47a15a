"""DINO against its published formulas, written out slowly in float64."""

import math

import numpy as np
import pytest
import torch
from test_losses import slow_koleo
from test_sinkhorn import by_hand as slow_sinkhorn

from gtsa.core.errors import UserError
from gtsa.core.settings import Plan, validated
from gtsa.core.types import Crops, Views
from gtsa.data.views.multicrop import MultiCrop
from gtsa.methods.dino import DINO
from gtsa.methods.parts.losses import cross_view
from gtsa.methods.parts.prototypes import Centre, PrototypeHead
from gtsa.models.backbone import Backbone
from gtsa.pretraining import plan
from gtsa.pretraining.settings import Pretrain

SMALL = {"num_prototypes": 32, "hidden_dim": 24, "bottleneck_dim": 8}


def method(**settings):
    torch.manual_seed(0)
    encoder = Backbone("vit_tiny_patch16_224", 64, arguments={"depth": 2, "embed_dim": 48, "num_heads": 3})
    return DINO(encoder, **{**SMALL, **settings}).double()


def views(batch=3, globals_=2, locals_=2, seed=1):
    draw = torch.Generator().manual_seed(seed)
    groups = []
    for count, side in ((globals_, 64), (locals_, 32)):
        pixels = torch.randn(batch, count, 3, side, side, generator=draw, dtype=torch.float64)
        boxes = torch.zeros(batch, count, 4, dtype=torch.float64)
        groups.append(Crops(pixels, boxes, torch.zeros(batch, count, dtype=torch.int64), torch.empty(0)))
    return Views.of(groups, torch.arange(batch))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def logits_by_hand(branch, pixels):
    """The head, layer after layer."""
    tokens = branch.encoder(pixels).prefix[:, 0].detach().numpy()
    layers = [m for m in branch.head.mlp if hasattr(m, "weight")]
    for number, layer in enumerate(layers):
        tokens = tokens @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()
        if number < 2:
            tokens = np.array([[0.5 * v * (1 + math.erf(v / 2**0.5)) for v in row] for row in tokens])
    prototypes = branch.head.prototypes.weight.detach().numpy()
    return (tokens / np.linalg.norm(tokens, axis=1, keepdims=True)) @ (
        prototypes / np.linalg.norm(prototypes, axis=1, keepdims=True)
    ).T


def loss_by_hand(dino, seen, centre, temperature):
    """Crop by crop: all of the student's but the teacher's own, for each of the teacher's."""
    student, teacher = [], []
    for crops in seen.groups:
        student += [logits_by_hand(dino.student, crops.pixels[:, n]) / 0.1 for n in range(crops.count)]
    for n in range(seen.global_crops.count):
        teacher.append(softmax((logits_by_hand(dino.teacher, seen.global_crops.pixels[:, n]) - centre) / temperature))
    terms = [
        np.mean(-(t * np.log(softmax(s))).sum(-1))
        for g, t in enumerate(teacher)
        for v, s in enumerate(student)
        if v != g
    ]
    return np.mean(terms)


@pytest.mark.parametrize(("globals_", "locals_"), [(2, 2), (3, 1), (1, 1)])
def test_the_loss_is_the_published_one(globals_, locals_):
    dino, seen = method().eval(), views(globals_=globals_, locals_=locals_)
    with torch.no_grad():
        for p in dino.teacher.parameters():  # the teacher is another network
            p.add_(0.05 * torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(3)))
    dino.centre.value += torch.linspace(-0.3, 0.3, 32, dtype=torch.float64)
    actual = dino(seen, 0.5)["loss"].item()
    assert actual == pytest.approx(loss_by_hand(dino, seen, np.linspace(-0.3, 0.3, 32), 0.07), rel=1e-9)


def test_sinkhorn_targets_are_of_all_global_crops_together():
    """DINOv2's: one Sinkhorn over the crops of all images, at the temperature of the step. No centre is kept."""
    dino, seen = method(targets="sinkhorn").train(), views()
    logits = logits_by_hand(dino.teacher, seen.global_crops.pixels.flatten(0, 1))
    expected = torch.tensor(slow_sinkhorn(logits.tolist(), 0.07, 3), dtype=torch.float64).reshape(3, 2, 32)
    torch.testing.assert_close(dino.teacher_probs(seen.global_crops, 0.5), expected, rtol=1e-8, atol=1e-12)
    student = [
        torch.tensor(logits_by_hand(dino.student, c.pixels.flatten(0, 1)) / 0.1).reshape(3, 2, 32).log_softmax(-1)
        for c in seen.groups
    ]
    terms = [
        -(expected[:, g] * student[size][:, v]).sum(-1).mean()
        for size in (0, 1) for v in range(2) for g in range(2) if size or v != g
    ]  # fmt: skip
    assert dino(seen, 0.5)["loss"].item() == pytest.approx(torch.stack(terms).mean().item(), rel=1e-8)
    dino.after_step(0.5, 0.6)
    assert not dino.centre.value.any()


def test_koleo_is_of_the_students_cls_tokens_of_each_global_crop():
    plain, spread, seen = method().eval(), method(koleo_weight=0.1).eval(), views()
    before, parts = plain(seen, 0.5), spread(seen, 0.5)
    tokens = [spread.student.encoder(seen.global_crops.pixels[:, g]).prefix[:, 0].detach() for g in range(2)]
    assert parts["koleo"].item() == pytest.approx(sum(map(slow_koleo, tokens)), rel=1e-6)
    assert parts["loss"].item() == pytest.approx(before["loss"].item() + 0.1 * parts["koleo"].item())
    assert {"view", "koleo", "teacher_entropy"} <= set(spread.legend.replace("=", " ").split())
    parts["koleo"].backward()
    assert all(p.grad is None for p in spread.teacher.parameters())
    assert any(p.grad is not None and p.grad.any() for p in spread.student.encoder.parameters())


def test_cross_view_by_hand():
    student = torch.log(torch.tensor([[[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]]]))
    teacher = torch.tensor([[[1.0, 0, 0], [0, 0.5, 0.5]]])
    by_hand = -torch.log(torch.tensor([[[0.5, 0.25], [0.2, (0.2 * 0.6) ** 0.5]]]))
    torch.testing.assert_close(cross_view(student, teacher), by_hand)


def test_temperatures_are_the_published_ones():
    """30 epochs of numpy.linspace(0.04, 0.07), then 0.07, in a run of 100."""
    published = np.concatenate([np.linspace(0.04, 0.07, 30), np.full(70, 0.07)])
    schedule = method().teacher_temp
    assert [schedule(epoch / 100) for epoch in range(100)] == pytest.approx(published.tolist(), abs=1e-9)


def test_the_momentum_is_the_published_one():
    steps = 1000
    published = 1 + 0.5 * (0.996 - 1) * (1 + np.cos(np.pi * np.arange(steps) / steps))
    dino = method().double()
    assert [dino.momentum(step / steps) for step in range(steps)] == pytest.approx(published.tolist(), abs=1e-12)
    with torch.no_grad():
        for p in dino.student.parameters():
            p.add_(1)
    before = [p.clone() for p in dino.teacher.parameters()]
    dino.after_step(0.5, 0.501)  # step 500 moves with its own momentum
    for p, was in zip(dino.teacher.parameters(), before, strict=True):
        torch.testing.assert_close(p - was, torch.full_like(p, 1 - published[500]), rtol=1e-9, atol=1e-12)


def test_the_preset_follows_the_number_of_images():
    for images, prototypes, temperatures in ((38, 1024, (0.02, 0.02)), (10_000, 2048, (0.02, 0.02)),
                                             (118_287, 65536, (0.04, 0.07))):  # fmt: skip
        ready = Plan(validated(Pretrain, {"method": "dino"}), {})
        plan.resolve_method(ready, DINO.auto_settings, images)
        assert (ready.settings.dino.num_prototypes, ready.settings.dino.teacher_temp) == (prototypes, temperatures)


def test_the_centre_follows_the_teachers_logits_a_step_late():
    dino = method().train()
    centre = np.zeros(32)
    for step in range(4):
        parts = [views(seed=2 * step), views(seed=2 * step + 1)]  # a step of two micro-batches
        logits = [
            logits_by_hand(dino.teacher, part.global_crops.pixels.flatten(0, 1)).reshape(-1, 32) for part in parts
        ]
        for part in parts:
            loss = dino(part, 0.5)["loss"]
            drops = [m for m in dino.student.modules() if getattr(m, "drop_prob", 0)]
            assert not drops and loss.item() == pytest.approx(loss_by_hand(dino, part, centre, 0.07), rel=1e-9)
        accepted = step != 2
        dino.after_step(0.5, 0.6, torch.tensor(float(accepted)))
        if accepted:
            centre = 0.9 * centre + 0.1 * np.concatenate(logits).mean(0)
        assert np.abs(dino.centre.value.numpy() - centre).max() < 1e-12
    dino.eval()(views(), 0.5)
    assert not dino.centre.accumulated.any()  # a look teaches nothing


def test_prototypes_are_frozen_at_first():
    dino = method().train()
    prototypes = dino.student.head.prototypes.weight
    dino(views(), 0.0)["loss"].backward()
    assert not prototypes.grad.any() and dino.student.head.mlp[0].weight.grad.any()
    dino(views(), 0.01)["loss"].backward()
    assert prototypes.grad.any()


def test_magnitudes_of_prototypes_say_nothing():
    head, tokens = PrototypeHead(16, 8, 12, 4).double(), torch.randn(5, 16, dtype=torch.float64)
    before = head(tokens)
    with torch.no_grad():
        head.prototypes.weight *= torch.rand(8, 1, dtype=torch.float64) + 0.5
    torch.testing.assert_close(head(tokens), before)
    assert before.abs().max() <= 1


def test_the_teachers_entropy_is_a_share_of_the_largest():
    dino = method().eval()
    with torch.no_grad():
        dino.teacher.head.prototypes.weight[:] = dino.teacher.head.prototypes.weight[0]  # all prototypes alike
    assert dino(views(), 0.5)["teacher_entropy"].item() == pytest.approx(1)
    dino.centre.value[3] = -100.0
    assert dino(views(), 0.5)["teacher_entropy"].item() == pytest.approx(0, abs=1e-9)


def test_the_diagnosis_by_hand():
    dino, seen = method().eval(), views(4, 2, 1)
    recorded = []
    for network, groups in ((dino.student, seen.groups), (dino.teacher, [seen.global_crops])):
        of_groups = []
        for crops in groups:
            logits = logits_by_hand(network, crops.pixels.flatten(0, 1)).reshape(4, crops.count, 32)
            of_groups.append(logits - logits.mean((0, 1)))
        recorded.append(of_groups)
    students, (teacher,) = recorded

    def cosine(a, b):
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    for image in range(4):
        gains = []
        for size, student in enumerate(students):
            for v in range(student.shape[1]):
                for g in range(2):
                    if size or v != g:
                        own, *others = (cosine(student[image, v], teacher[image - k, g]) for k in range(4))
                        gains.append(own - np.mean(others))
        assert dino.diagnose(seen)["image_score"][image].item() == pytest.approx(np.mean(gains), abs=1e-6)


def test_teacher_information_by_hand():
    """At the temperature of the end, without the centre; nothing once all prototypes, or one alone, fit all images."""
    dino, seen = method(teacher_temp=(0.5, 0.05)).eval(), views(4, 2, 1)
    dino.centre.value[:] = torch.linspace(-0.1, 0.1, 32)
    pixels = seen.global_crops.pixels.flatten(0, 1)
    logits = (logits_by_hand(dino.teacher, pixels) - np.linspace(-0.1, 0.1, 32)) / 0.05
    p = softmax(logits).reshape(4, 2, 32).mean(1)
    expected = (p * np.log(p / p.mean(0))).sum(-1) / np.log(4)
    np.testing.assert_allclose(dino.diagnose(seen)["teacher_information"].numpy(), expected, atol=1e-6)
    with torch.no_grad():
        dino.teacher.head.prototypes.weight[:] = dino.teacher.head.prototypes.weight[0].clone()
    assert dino.diagnose(seen)["teacher_information"].abs().max() < 1e-6
    dino.centre.value[3] = -100.0
    assert dino.diagnose(seen)["teacher_information"].abs().max() < 1e-6


def test_images_that_look_alike_have_no_view_matching():
    alike = views(1).each(lambda c: c.each(lambda t: t.expand(4, *t.shape[1:]) if len(t) else t))
    assert method().eval().diagnose(alike)["image_score"].abs().max() < 1e-9


def test_views_are_the_published_ones():
    v = MultiCrop(**validated(Pretrain, {"method": "dino"}).views.model_dump() | {"global_crops_size": 224})
    assert (v.global_crops_number, v.local_crops_number, v.global_crops_scale, v.local_crops_scale) == (
        2,
        8,
        (0.4, 1.0),
        (0.05, 0.4),
    )
    assert (v.brightness, v.contrast, v.saturation, v.hue, v.color_jitter, v.grayscale) == (
        0.4,
        0.4,
        0.2,
        0.1,
        0.8,
        0.2,
    )
    assert (v.hflip, v.rotations, v.gaussian_blur, v.solarize) == (0.5, False, (1.0, 0.1, 0.5), (0.0, 0.2, 0.0))
    given = validated(Pretrain, {"method": "dino", "views": {"hflip": 0.0, "rotations": True}}).views
    assert (given.hflip, given.rotations, given.solarize) == (0.0, True, (0.0, 0.2, 0.0))
    assert validated(Pretrain, {}).views.hflip == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_prototypes": 0}, "at least 1"),
        ({"teacher_temp": (0.0, 0.07)}, "above 0"),
        ({"freeze_last_layer": 2.0}, "from 0 to 1"),
        ({"koleo_weight": -1.0}, "must not be negative"),
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        method(**wrong)


def test_without_a_class_token_it_is_refused():
    encoder = Backbone("vit_tiny_patch16_224", 64, arguments={"depth": 2, "class_token": False})
    with pytest.raises(UserError, match="CLS"):
        DINO(encoder, **SMALL)


def test_gtsa_refuses_views_that_it_cannot_compare():
    with pytest.raises(UserError, match=r"views.hflip: must be 0 for gtsa"):
        validated(Pretrain, {"views": {"hflip": 0.5}})
    with pytest.raises(UserError, match=r"views.local_overlap: must be above 0 for gtsa"):
        validated(Pretrain, {"views": {"local_overlap": 0.0}})


def test_an_untouched_centre_stays():
    centre = Centre(4)
    centre.update(1.0)
    assert not centre.value.any()
