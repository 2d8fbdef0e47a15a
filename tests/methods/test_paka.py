"""PaKA: the loss against torchvision's RoIAlign and HSIC with explicit centring matrices; what teacher and student see."""

import numpy as np
import pytest
import torch
from torchvision.ops import roi_align

import gtsa
from conftest import TINY, run
from gtsa.core.errors import UserError
from gtsa.core.settings import validated
from gtsa.core.types import Colour, Crops, Views
from gtsa.data.views.multicrop import MultiCrop
from gtsa.methods.paka import PaKA
from gtsa.models.backbone import Backbone
from gtsa.pretraining.settings import Pretrain


def method(**settings):
    torch.manual_seed(0)
    encoder = Backbone("vit_tiny_patch16_224", 64, arguments={"depth": 1, "embed_dim": 48, "num_heads": 3})
    paka = PaKA(encoder, **settings).double()
    with torch.no_grad():
        for p in paka.teacher.parameters():  # the teacher is another network
            p.add_(0.05 * torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(3)))
    return paka


def views(batch=3, globals_=2, locals_=2, seed=1):
    """Random pixels, and boxes as they are drawn in an image of 320 x 240 px."""
    multicrop = MultiCrop(globals_, locals_, 64, 32, local_inside=True, rotations=False)
    boxes = [multicrop.boxes(320, 240, np.random.default_rng(10 * seed + n)) for n in range(batch)]
    draw, groups = torch.Generator().manual_seed(seed), []
    for size, (count, side) in enumerate(((globals_, 64), (locals_, 32))[: 2 if locals_ else 1]):
        pixels = torch.randn(batch, count, 3, side, side, generator=draw, dtype=torch.float64)
        places = torch.tensor([image[size] for image in boxes], dtype=torch.float64)
        groups.append(Crops(pixels, places, torch.zeros(batch, count, dtype=torch.int64), torch.empty(0)))
    return Views.of(groups, torch.arange(batch))


def cells_by_hand(encoder, crop, own_box, other_box, cells):
    """[cells * cells, D] of one crop [3, S, S]: RoIAlign of what its box shares with another, in patches of 16 px."""
    patches = encoder(crop[None]).patches.permute(0, 3, 1, 2)  # [1, D, h, w]
    low, high = torch.maximum(own_box[:2], other_box[:2]), torch.minimum(own_box[2:], other_box[2:])
    scale = patches.shape[-1] / (own_box[2:] - own_box[:2])
    region = torch.cat([(low - own_box[:2]) * scale, (high - own_box[:2]) * scale])
    return roi_align(patches, [region[None]], cells, aligned=True)[0].flatten(1).T


def cka_by_hand(student, teacher):
    n = len(student)
    centring = torch.eye(n, dtype=torch.float64) - 1 / n
    k, m = (centring @ x @ x.T @ centring for x in (student, teacher))
    return ((k * m).sum() / ((k * k).sum() * (m * m).sum()).sqrt()).item()


def alignments_by_hand(paka, seen, cells, shift=0):
    """For each image, CKA of all pairs; the teacher's maps are those of the image ``shift`` before it."""
    size, view, whole = len(seen.groups) - 1, seen.groups[-1], seen.global_crops
    rows = []
    for b in range(len(seen.images)):
        row = []
        for v in range(view.count):
            for g in range(whole.count):
                if size == 0 and v == g:
                    continue
                mine, other = view.boxes[b, v], whole.boxes[b, g]
                student = cells_by_hand(paka.encoders["student"], view.pixels[b, v], mine, other, cells)
                pixels = whole.pixels[(b - shift) % len(seen.images), g]
                row.append(cka_by_hand(student, cells_by_hand(paka.encoders["teacher"], pixels, other, mine, cells)))
        rows.append(np.mean(row))
    return np.array(rows)


@pytest.mark.parametrize(("locals_", "cells", "expected_cells"), [(2, None, 2), (2, 3, 3), (0, None, 4)])
@torch.no_grad()
def test_the_loss_is_one_minus_cka_of_the_regions(locals_, cells, expected_cells):
    """By default there are as many cells as the student's crop has patches: 2 x 2 of 32 px, 4 x 4 of 64 px."""
    paka, seen = method(cells=cells).eval(), views(locals_=locals_)
    by_hand = 1 - alignments_by_hand(paka, seen, expected_cells).mean()
    assert 0.01 < by_hand < 0.99
    assert paka(seen, 0.5)["loss"].item() == pytest.approx(by_hand, rel=1e-9)


@torch.no_grad()
def test_the_score_is_the_gain_over_other_images():
    paka, seen = method(cells=4).eval(), views()
    own, *others = (alignments_by_hand(paka, seen, 4, shift) for shift in range(3))
    torch.testing.assert_close(
        paka.diagnose(seen)["kernel_score"], torch.tensor(own - np.mean(others, 0)), rtol=1e-9, atol=1e-12
    )
    assert paka.diagnose(views(batch=1))["kernel_score"].tolist() == [0.0]


def test_a_student_that_is_a_scaled_teacher_has_no_loss():
    """Of a crop that both see in full."""
    paka = method().eval()
    paka.student.load_state_dict(paka.teacher.state_dict())
    with torch.no_grad():
        paka.student["encoder"].vit.norm.weight.mul_(3)
        paka.student["encoder"].vit.norm.bias.mul_(3)
    crops = views(locals_=0).global_crops
    seen = Views(
        Crops(*(torch.cat([t[:, :1]] * 2, 1) for t in (crops.pixels, crops.boxes, crops.rotations)), crops.colours)
    )
    assert paka(seen, 0.5)["loss"].item() == pytest.approx(0, abs=1e-9)


def test_the_teacher_moves_with_the_momentum_of_the_next_step():
    paka = method()
    before = [p.clone() for p in paka.teacher.parameters()]
    paka.after_step(0.0, 0.5)
    share = 1 - (1 + 0.5 * (0.996 - 1))  # half of a cosine from 0.996 to 1
    for p, was, student in zip(paka.teacher.parameters(), before, paka.student.parameters(), strict=True):
        torch.testing.assert_close(p, was + share * (student - was))


def test_the_teacher_sees_clean_crops_around_those_of_the_student():
    settings = validated(Pretrain, {"method": "paka", "views": {"global_crops_size": 64, "local_crops_size": 32}})
    image = torch.randint(0, 256, (3, 240, 320), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for seed in range(10):
        drawn = settings.multicrop(image, np.random.default_rng(seed))
        clean, coloured = drawn.global_crops, drawn.local_crops
        assert (clean.colours[..., Colour.ORDER] == -1).all()
        assert not clean.colours[..., [Colour.GRAYSCALE, Colour.SIGMA, Colour.SOLARIZE]].any()
        assert (coloured.colours[..., Colour.ORDER] >= 0).any()
        inside = (coloured.boxes[0, :, None, :2] >= clean.boxes[0, None, :, :2]) & (
            coloured.boxes[0, :, None, 2:] <= clean.boxes[0, None, :, 2:]
        )
        assert inside.all()


@pytest.mark.parametrize("settings", [{"cells": 1}, {"momentum": 1.5}])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        method(**settings)


def test_mirrored_crops_are_refused(tmp_path, scenes):
    code, _, err = run(
        "pretrain", "--data", scenes, "--out", tmp_path / "run", "--method", "paka", "--views.hflip", "0.5"
    )
    assert code == 2
    assert "views.hflip: must be 0 for paka" in err


def test_it_continues_the_training_of_a_good_encoder(tmp_path, scenes, finished):
    few = {key: value for key, value in TINY.items() if key not in ("gtsa", "model")}
    settings = {**few, "steps": 2, "evaluate_every": 2, "log_every": 1}
    done = gtsa.pretrain(str(scenes), out=str(tmp_path / "run"), method="paka", init=str(finished), **settings)
    assert done.verdict.metrics["kernel_gain"] == pytest.approx(0, abs=0.05)
    assert done.verdict.metrics["similarity_to_start"] > 0.9
