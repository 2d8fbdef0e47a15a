"""Segmentation with both heads: what they learn exactly, chance, crops that follow from seeds, and exact resume."""

import copy
import functools
import signal

import pytest
import torch
import torch.nn.functional as F
from test_dense import PALETTE, Colours, blocks, labelled, make_context, painted, perfect, stripes

from conftest import final_weights
from gtsa.core.errors import UserError
from gtsa.core.types import Draw, Examples
from gtsa.data.batches.loader import StepSampler
from gtsa.data.labels import IGNORE
from gtsa.evaluation.evaluators.segmentation import PixelCrossEntropy, Segmentation, TrainingCrops, parameter_groups
from gtsa.evaluation.heads.semantic_fpn import SemanticFPN
from gtsa.models.backbone import Backbone
from gtsa.training import supervised
from gtsa.training.schedules import Polynomial

QUICK = {"size": 128, "scales": (1.0, 1.0), "steps": 30, "batch_size": 4, "learning_rate": 0.2}
TUNED = {"head": "fpn", "crop": 48, "steps": 6, "batch_size": 2}


def vit():
    torch.manual_seed(0)
    return Backbone("vit_tiny_patch16_224", 64, arguments={"depth": 2, "embed_dim": 48, "num_heads": 3}).eval()


def evaluate_segmentation(train, val, backbone=None, settings=None, **options):
    evaluator = Segmentation(**(settings or QUICK))
    return evaluator.metrics(evaluator(backbone or Colours(), train, val, make_context(**options)))


def coloured(make, images, **options):
    masks = make(images, **options)
    return labelled(painted(masks), masks)


# known answers


def test_a_linear_head_names_colours():
    train, val = coloured(blocks, 6, cells=8), coloured(blocks, 3, cells=8, seed=1)  # each pixel becomes a patch
    assert perfect(evaluate_segmentation(train, val))


def test_windows_name_colours():
    train, val = coloured(blocks, 6, cells=8), coloured(blocks, 3, cells=8, seed=1)
    assert perfect(evaluate_segmentation(train, val, settings={**QUICK, "crop": 64, "sliding": 32}))


@pytest.mark.parametrize("head", ["linear", "fpn"])
def test_shuffled_labels_give_chance(head):
    train, val = (labelled(painted(blocks(6, 8, seed)), blocks(6, 8, seed + 1)) for seed in (0, 2))
    tuned = {**QUICK, "head": "fpn", "steps": 10, "learning_rate": 5e-3}
    actual = evaluate_segmentation(train, val) if head == "linear" else evaluate_segmentation(train, val, vit(), tuned)
    assert actual["aAcc"] == pytest.approx(25, abs=5 * 100 * (0.25 * 0.75 / (6 * 8 * 8)) ** 0.5)


def test_fpn_is_fine_tuned_to_name_colours():
    """Halves of two colours; two pixels on either side of their border are not labelled."""
    pairs = [torch.tensor((a, b)) for a in range(4) for b in range(4) if a != b]
    masks = [pair.repeat_interleave(16).expand(32, 32).clone() for pair in pairs]
    pixels = painted(masks)
    for mask in masks:
        mask[:, 14:18] = IGNORE
    data = labelled(pixels, masks)
    backbone = vit()
    before = copy.deepcopy(backbone.state_dict())
    settings = {**TUNED, "crop": 32, "steps": 40, "batch_size": 6, "learning_rate": 5e-3, "scales": (1.0, 1.0)}
    assert perfect(evaluate_segmentation(data, data, backbone, settings))
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert not backbone.training
    assert all(p.grad is None for p in backbone.parameters())


@pytest.mark.parametrize("head", ["linear", "fpn"])
def test_images_of_any_size(head):
    masks = [m[:h, :w] for m, (h, w) in zip(stripes(4, 90, 96), [(17, 33), (90, 31), (64, 96), (16, 90)], strict=True)]
    masks[0] = torch.full_like(masks[0], IGNORE)
    data, kept = labelled(painted(masks), masks), {}
    settings = {"head": head, "size": 0, "crop": 64, "sliding": 40, "steps": 3, "batch_size": 3}
    actual = evaluate_segmentation(data, data, vit(), settings, on_prediction=kept.__setitem__)
    assert [kept[i].shape for i in range(4)] == [m.shape for m in masks]
    assert all(0 <= value <= 100 for value in actual.values())


def test_windows_of_a_constant_image_are_the_whole():
    """Without positions, all windows of one colour look alike to a ViT."""
    backbone = vit()
    torch.nn.init.zeros_(backbone.vit.pos_embed)
    masks = [torch.full((96, 144), c) for c in range(4)]
    train, kept = labelled(painted(masks), masks), {0: {}, 32: {}}
    for sliding, pictures in kept.items():
        settings = {**QUICK, "size": 0, "crop": 64, "steps": 30, "sliding": sliding}
        assert perfect(evaluate_segmentation(train, train, backbone, settings, on_prediction=pictures.__setitem__))
    assert all(torch.equal(kept[0][i], kept[32][i]) for i in range(4))


# parts


def test_crops_follow_from_seed_and_draw_alone():
    data = coloured(stripes, 5, height=70, width=90)
    cuts, again, other = (TrainingCrops(data, 0, 48, (0.5, 2.0), 0.5, seed) for seed in (1, 1, 2))
    draws = [Draw(epoch, position) for epoch in range(3) for position in range(5)]
    first = [cuts[draw] for draw in draws]
    for (pixels, mask, image), draw in reversed(list(zip(first, draws, strict=True))):
        same = again[draw]
        assert torch.equal(pixels, same[0]) and torch.equal(mask, same[1]) and image == same[2]
    assert any(not torch.equal(pixels, other[draw][0]) for (pixels, *_), draw in zip(first, draws, strict=True))
    for epoch in range(3):
        assert sorted(image for *_, image in first[5 * epoch : 5 * epoch + 5]) == list(range(5))
    assert len({int((mask != IGNORE).sum()) for _, mask, _ in first}) > 3  # scales differ


@pytest.mark.parametrize(("size", "scales"), [(0, (0.4, 0.6)), (0, (1.0, 2.0)), (96, (1.0, 1.0))])
def test_crops_and_masks_lie_alike(size, scales):
    data = coloured(stripes, 4, height=64, width=64)
    for position in range(4):
        pixels, mask, _ = TrainingCrops(data, size, 48, scales, 0.5, 0)[Draw(0, position)]
        assert pixels.shape == (3, 48, 48) and mask.shape == (48, 48)
        known = mask != IGNORE
        near = (pixels[:, None].float() - PALETTE.T.float()[:, :, None, None]).square().sum(0).argmin(0)
        assert (near[known] == mask[known]).double().mean() > 0.9  # but where colours blend at borders
        beyond = pixels[:, ~known]
        assert torch.equal(beyond, torch.tensor([124, 116, 104], dtype=torch.uint8)[:, None].expand_as(beyond))
        assert bool(known.all()) == (scales[0] >= 0.75)


def test_crops_are_mirrored():
    data = coloured(stripes, 1, height=64, width=64)
    (pixels, mask, _), (mirrored, other, _) = (
        TrainingCrops(data, 0, 64, (1.0, 1.0), flip, 0)[Draw(0, 0)] for flip in (0.0, 1.0)
    )
    assert torch.equal(pixels.flip(-1), mirrored)
    assert torch.equal(mask.flip(-1), other)
    assert not torch.equal(mask, other)


def test_the_loss_is_torchs():
    scores = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    truth = torch.randint(-1, 3, (2, 16, 20), generator=torch.Generator().manual_seed(1))
    batch = Examples(scores, truth, torch.arange(2))
    actual = PixelCrossEntropy(torch.nn.Identity())(batch, 0.0)["loss"]
    big = F.interpolate(scores, (16, 20), mode="bilinear", align_corners=False)
    assert torch.allclose(actual, F.cross_entropy(big, truth, ignore_index=-1))
    unlabelled = Examples(scores, torch.full_like(truth, IGNORE), torch.arange(2))
    nothing = PixelCrossEntropy(torch.nn.Identity())(unlabelled, 0.0)["loss"]
    nothing.backward()
    assert nothing.item() == 0
    assert torch.equal(scores.grad, torch.zeros_like(scores))


@pytest.mark.parametrize(("flat", "cells"), [(False, (16, 20)), (True, (4, 5))])
def test_fpn_makes_maps_of_its_finest_stride(flat, cells):
    network = SemanticFPN(vit(), 7, flat)
    assert network(torch.rand(2, 3, 64, 80)).shape == (2, 7, *cells)


def test_fpn_uses_blocks_at_quarters_of_the_depth():
    deep = Backbone("vit_tiny_patch16_224", 64, arguments={"depth": 12, "embed_dim": 48, "num_heads": 3})
    assert SemanticFPN(deep, 2, False).which == [2, 5, 8, 11]  # blocks 3, 6, 9, 12
    assert SemanticFPN(vit(), 2, False).which == [0, 0, 1, 1]


def test_positions_tokens_and_norms_are_not_decayed():
    network = SemanticFPN(vit(), 2, False)
    decayed, spared = ({id(p) for p in group["params"]} for group in parameter_groups(network))
    names = {id(p): name for name, p in network.named_parameters()}
    assert decayed | spared == set(names)
    assert not decayed & spared
    undecayed = {names[i] for i in spared}
    assert {"backbone.vit.pos_embed", "backbone.vit.cls_token", "backbone.vit.blocks.0.norm1.weight"} <= undecayed
    assert "backbone.vit.blocks.0.attn.qkv.weight" in {names[i] for i in decayed}


def test_published_settings():
    fpn, linear = Segmentation("fpn"), Segmentation()
    assert (fpn.size, fpn.crop, fpn.learning_rate, fpn.weight_decay) == (0, 512, 6e-5, 0.01)
    assert (linear.size, linear.crop, linear.learning_rate) == (448, 448, 1e-3)
    assert fpn.warmup * fpn.steps == 1_500
    optimizer = fpn._optimizer(torch.nn.Linear(2, 2))
    rates = {}
    for step in (0, 750, 1_499, 1_500, 20_750, 39_999):
        optimizer.set_time(step / fpn.steps)
        rates[step] = optimizer.param_groups[0]["lr"]
    assert rates[0] == 0
    assert rates[750] == pytest.approx(6e-5 * 750 / 1_499)
    assert rates[1_499] == rates[1_500] == 6e-5
    assert rates[20_750] == pytest.approx(3e-5)
    assert rates[39_999] == pytest.approx(6e-5 / 38_500)


def test_polynomial():
    assert [Polynomial(2.0)(t) for t in (0, 0.25, 1, 1.5)] == [2, 1.5, 0, 0]
    assert Polynomial(2.0, 2.0)(0.5) == 0.5


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"scales": (2.0, 1.0)}, {"warmup": 1.0}, {"learning_rate": 0.0}, {"size": -1}]
)
def test_invalid_settings_are_refused(wrong):
    with pytest.raises(UserError, match="segmentation"):
        Segmentation(**wrong)


def test_micro_batches_make_a_step():
    evaluator = Segmentation(steps=2, batch_size=6, accumulate=3)
    batches = list(
        evaluator._batches(TrainingCrops(coloured(stripes, 5), 48, 48, (1.0, 1.0), 0.0, 0), make_context(), 1)
    )
    assert [len(batch.images) for batch in batches] == [2, 2, 2]


# resume


class Failing:
    """A source that does something when it is read for the ``count``-th time."""

    def __init__(self, source, count, act):
        self.source, self.left, self.act = source, count, act
        self.range16 = source.range16

    def name(self, index):
        return self.source.name(index)

    def read(self, index, detail=None):
        self.left -= 1
        if self.left == 0:
            self.act()
        return self.source.read(index)


def _power_cut():
    raise KeyboardInterrupt


def _request_stop():
    signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("head", ["fpn", "linear"])
@pytest.mark.parametrize("stop", [_power_cut, _request_stop])
def test_training_resumes_bit_for_bit(tmp_path, monkeypatch, head, stop):
    monkeypatch.setattr(supervised, "train", functools.partial(supervised.train, checkpoint_every=2))
    masks = [m[:h] for m, h in zip(stripes(5, 48, 40), (48, 20, 33, 48, 33), strict=True)]
    data = labelled(painted(masks), masks)
    settings = {**TUNED, "crop": 32, "head": head, "size": 0, "learning_rate": 1e-2}
    settings["accumulate"] = 2 if head == "fpn" else 1

    def per_image(folder, train=data):
        kept = {}
        actual = Segmentation(**settings)(
            vit(), train, data, make_context(folder=tmp_path / folder, on_prediction=kept.__setitem__)
        )
        return actual, kept

    whole, pictures = per_image("whole")
    failing = labelled(painted(masks), masks)
    object.__setattr__(failing, "source", Failing(failing.source, 8, stop))  # in the fourth of six steps
    with pytest.raises(KeyboardInterrupt if stop is _power_cut else UserError):
        per_image("cut", failing)
    steps = sorted(p.name for p in (tmp_path / "cut" / "checkpoints").glob("step-*"))
    assert steps == ["step-00000002" if stop is _power_cut else "step-00000004"]
    resumed, again = per_image("cut")
    assert final_weights(tmp_path / "cut") == final_weights(tmp_path / "whole")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert all(torch.equal(pictures[i], again[i]) for i in pictures)
    finished, _ = per_image("cut")  # nothing is left to train
    assert all(torch.equal(whole[name], finished[name]) for name in whole)


def test_a_folder_of_another_training_is_refused(tmp_path):
    data = coloured(stripes, 3)
    first = {"size": 48, "steps": 2, "batch_size": 2}
    evaluate_segmentation(data, data, settings=first, folder=tmp_path)
    for settings, train, options in (
        ({**first, "learning_rate": 0.5}, data, {}),
        (first, data.take([0, 1]), {}),
        (first, data, {"seed": 1}),
    ):
        with pytest.raises(UserError, match="another folder") as caught:
            evaluate_segmentation(train, data, settings=settings, folder=tmp_path, **options)
        assert caught.value.code == 4
    evaluate_segmentation(
        data, data, settings={**first, "sliding": 16}, folder=tmp_path
    )  # other windows in evaluation, the same training


def test_workers_change_nothing():
    data = coloured(stripes, 4)
    settings = {"size": 48, "steps": 3, "batch_size": 2}
    assert evaluate_segmentation(data, data, settings=settings, workers=2) == evaluate_segmentation(
        data, data, settings=settings
    )


def test_a_start_in_the_middle_sees_the_same_crops():
    cuts = TrainingCrops(coloured(stripes, 5), 0, 48, (0.5, 2.0), 0.5, 0)
    evaluator = Segmentation(steps=5, batch_size=3)
    whole, rest = (list(evaluator._batches(cuts, make_context(), start)) for start in (0, 3))
    assert len(rest) == 2
    for one, other in zip(whole[3:], rest, strict=True):
        assert torch.equal(one.pixels, other.pixels) and torch.equal(one.targets, other.targets)
    drawn = [draw for step in StepSampler(5, 3, 5) for draw in step]
    assert len(drawn) == 15
