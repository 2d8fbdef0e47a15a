"""iBOT against its published formulas, written out slowly in float64."""

import numpy as np
import pytest
import torch
from test_dino import loss_by_hand, softmax, views
from test_sinkhorn import by_hand as slow_sinkhorn

from gtsa.core.errors import UserError
from gtsa.core.settings import validated
from gtsa.methods.ibot import IBOT
from gtsa.models.backbone import Backbone
from gtsa.pretraining.settings import Pretrain

SMALL = {"num_prototypes": 32, "hidden_dim": 24, "bottleneck_dim": 8}


def method(**settings):
    torch.manual_seed(0)
    encoder = Backbone("vit_tiny_patch16_224", 64, arguments={"depth": 2, "embed_dim": 48, "num_heads": 3})
    ibot = IBOT(encoder, **{**SMALL, **settings}).double()
    with torch.no_grad():
        ibot.mask_token += 0.1 * torch.randn(48, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
        for p in ibot.teacher.parameters():  # the teacher is another network
            p.add_(0.05 * torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(3)))
    return ibot


def tokens_by_hand(encoder, pixels, hidden=None, token=None):
    """timm's own steps, with the token put in by hand."""
    vit = encoder.vit
    x = vit.patch_embed(pixels)  # [N, h, w, D]
    if hidden is not None:
        x = x.clone()
        for n, row, column in hidden.nonzero().tolist():
            x[n, row, column] = token
    return vit.norm(vit.blocks(vit.norm_pre(vit._pos_embed(x)))).detach()


def head_by_hand(head, tokens):
    return head(tokens).detach().numpy()


def fixed(hidden):
    return lambda crops, side: hidden


@pytest.fixture
def hidden():
    """Of two images with two global crops each: a block, nothing, one patch, and all but one."""
    actual = torch.zeros(4, 4, 4, dtype=torch.bool)
    actual[0, 1:3, :2], actual[2, 3, 3], actual[3] = True, True, True
    actual[3, 0, 0] = False
    return actual


def test_hidden_patches_are_replaced_before_positions_are_added(hidden):
    ibot, pixels = method(), views(2).global_crops.pixels.flatten(0, 1)
    actual = ibot.student.encoder.side_by_side([pixels], [hidden], ibot.mask_token[0])[0]
    by_hand = tokens_by_hand(ibot.student.encoder, pixels, hidden, ibot.mask_token[0])
    torch.testing.assert_close(actual.patches.flatten(1, 2), by_hand[:, 1:])
    torch.testing.assert_close(actual.prefix, by_hand[:, :1])
    torch.testing.assert_close(ibot.student.encoder(pixels).prefix, tokens_by_hand(ibot.student.encoder, pixels)[:, :1])


@pytest.mark.parametrize("patch_temp", [0.07, 0.05])
def test_the_losses_are_the_published_ones(hidden, patch_temp):
    ibot, seen = method(teacher_patch_temp=(0.04, patch_temp)).eval(), views(2)
    ibot.mask = fixed(hidden)
    ibot.centre.value += torch.linspace(-0.3, 0.3, 32, dtype=torch.float64)
    ibot.patch_centre.value += torch.linspace(0.2, -0.2, 32, dtype=torch.float64)
    parts = ibot(seen, 0.5)

    pixels = seen.global_crops.pixels.flatten(0, 1)
    mine = tokens_by_hand(ibot.student.encoder, pixels, hidden, ibot.mask_token[0])
    reference = tokens_by_hand(ibot.teacher.encoder, pixels)
    crops = []
    for n in range(4):
        terms = [0.0]
        for row, column in hidden[n].nonzero().tolist():
            position = 1 + 4 * row + column
            student = softmax(head_by_hand(ibot.student.head, mine[n, position]) / 0.1)
            target = head_by_hand(ibot.teacher.head, reference[n, position]) - np.linspace(0.2, -0.2, 32)
            terms.append(-(softmax(target / patch_temp) * np.log(student)).sum())
        crops.append(sum(terms) / max(1, len(terms) - 1))
    assert parts["patch"].item() == pytest.approx(np.mean(crops), rel=1e-9)

    student = [head_by_hand(ibot.student.head, mine[:, 0]).reshape(2, 2, 32)]
    local = seen.local_crops.pixels.flatten(0, 1)
    student.append(head_by_hand(ibot.student.head, ibot.student.encoder(local).prefix[:, 0]).reshape(2, 2, 32))
    teacher = head_by_hand(ibot.teacher.head, reference[:, 0]).reshape(2, 2, 32) - np.linspace(-0.3, 0.3, 32)
    terms = [
        -(softmax(teacher[:, g] / 0.07) * np.log(softmax(student[size][:, v] / 0.1))).sum(-1).mean()
        for g in range(2)
        for size in range(2)
        for v in range(2)
        if size or v != g
    ]
    assert parts["view"].item() == pytest.approx(np.mean(terms), rel=1e-9)
    assert parts["loss"].item() == pytest.approx(parts["view"].item() + parts["patch"].item(), rel=1e-12)


def test_where_nothing_is_hidden_it_is_dino():
    ibot, seen = method(mask_probability=0.0).eval(), views(2)
    parts = ibot(seen, 0.5)
    assert parts["patch"].item() == 0
    assert parts["view"].item() == pytest.approx(loss_by_hand(ibot, seen, 0.0, 0.07), rel=1e-9)


def test_the_centre_of_patches_is_the_mean_over_all_of_them(hidden):
    ibot = method().train()
    ibot.mask = fixed(hidden)
    steps = [views(2, seed=1), views(2, seed=2)]
    for seen in steps:
        ibot(seen, 0.5)
    logits = [
        head_by_hand(
            ibot.teacher.head, tokens_by_hand(ibot.teacher.encoder, s.global_crops.pixels.flatten(0, 1))[:, 1:]
        )
        for s in steps
    ]
    ibot.after_step(0.5, 0.6, 1.0)
    by_hand = 0.1 * np.concatenate(logits).reshape(-1, 32).mean(0)
    assert np.abs(ibot.patch_centre.value.numpy() - by_hand).max() < 1e-12
    assert not np.allclose(by_hand, ibot.centre.value.numpy(), atol=1e-4)


def test_sinkhorn_targets_are_of_all_global_crops_and_of_all_masked_patches(hidden):
    ibot, seen = method(targets="sinkhorn").train(), views(2)
    ibot.mask = fixed(hidden)
    tokens = tokens_by_hand(ibot.teacher.encoder, seen.global_crops.pixels.flatten(0, 1))
    targets = []
    record = ibot.centre.sharpened, ibot.patch_centre.sharpened
    for centre, plain in zip((ibot.centre, ibot.patch_centre), record, strict=True):
        centre.sharpened = lambda *inputs, plain=plain: targets.append(plain(*inputs)) or targets[-1]
    ibot(seen, 0.5)
    views_, patches = (target.reshape(-1, 32) for target in targets)
    rows = head_by_hand(ibot.teacher.head, tokens[:, 0])
    torch.testing.assert_close(
        views_, torch.tensor(slow_sinkhorn(rows.tolist(), 0.07, 3), dtype=torch.float64), rtol=1e-8, atol=1e-12
    )
    rows = head_by_hand(ibot.teacher.head, tokens[:, 1:][hidden.flatten(1)])
    torch.testing.assert_close(
        patches, torch.tensor(slow_sinkhorn(rows.tolist(), 0.07, 3), dtype=torch.float64), rtol=1e-8, atol=1e-12
    )
    ibot.after_step(0.5, 0.6)
    assert not ibot.centre.value.any() and not ibot.patch_centre.value.any()


def test_gradients_reach_the_mask_token_and_no_teacher(hidden):
    ibot = method().train()
    ibot.mask = fixed(hidden)
    ibot(views(2), 0.5)["loss"].backward()
    assert ibot.mask_token.grad.abs().sum() > 0
    assert all(p.grad is None for p in ibot.teacher.parameters())
    ibot.zero_grad()
    ibot.mask = fixed(torch.zeros_like(hidden))
    ibot(views(2), 0.5)["loss"].backward()
    assert ibot.mask_token.grad is not None  # a gradient of 0, which several processes wait for


def test_half_of_the_crops_hide_a_tenth_to_a_half():
    torch.manual_seed(0)
    crops = views(1500, 2, 0).global_crops
    share = method().mask(crops, 14).double().mean((1, 2))
    assert abs((share > 0).double().mean() - 0.5) < 5 * (0.25 / 3000) ** 0.5
    assert share.max() <= 0.5 and share[share > 0].mean() > 0.25


def test_views_are_the_published_ones():
    v = validated(Pretrain, {"method": "ibot"}).views
    assert (v.global_crops_scale, v.local_crops_scale, v.local_crops_number, v.hflip) == (
        (0.25, 1.0),
        (0.05, 0.25),
        10,
        0.5,
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"bottleneck_dim": 0}, "at least 1"),
        ({"patch_weight": -1.0}, "must not be negative"),
        ({"teacher_patch_temp": (0.0, 0.07)}, "temperatures must be above 0"),
        ({"mask_ratio": (0.5, 0.1)}, "0 <= low <= high <= 1, not 0.5 0.1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        method(**wrong)


def test_teacher_information_is_of_the_cls_token():
    ibot, seen = method(teacher_temp=(0.5, 0.05)).eval(), views(4, 2, 1)
    ibot.centre.value += torch.linspace(-0.3, 0.3, 32, dtype=torch.float64)
    cls = tokens_by_hand(ibot.teacher.encoder, seen.global_crops.pixels.flatten(0, 1))[:, 0]
    logits = head_by_hand(ibot.teacher.head, cls) - np.linspace(-0.3, 0.3, 32)
    p = softmax(logits / 0.05).reshape(4, 2, 32).mean(1)
    expected = (p * np.log(p / p.mean(0))).sum(-1) / np.log(4)
    np.testing.assert_allclose(ibot.diagnose(seen)["teacher_information"].numpy(), expected, atol=1e-6)
