"""Dense retrieval: what it solves exactly, chance, and any size of image."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_dense import PALETTE, Colours, blocks, labelled, make_context, painted, perfect, stripes

from gtsa.core.errors import UserError
from gtsa.data.labels import IGNORE
from gtsa.evaluation.evaluators.in_context import InContext
from gtsa.models.backbone import Backbone


def metrics(train, val, backbone=None, settings=None, **options):
    evaluator = InContext(**(settings or {}))
    return evaluator.metrics(evaluator(backbone or Colours(), train, val, make_context(**options)))


def coloured(make, images, **options):
    masks = make(images, **options)
    return labelled(painted(masks), masks)


def test_colours_are_retrieved_exactly():
    train, val = coloured(stripes, 6, height=96), coloured(stripes, 5, height=96, seed=1)
    assert perfect(metrics(train, val, settings={"size": 96, "k": 5}))


def test_every_pixel_that_is_a_patch_is_retrieved_exactly():
    train, val = coloured(blocks, 4), coloured(blocks, 3, seed=1)
    assert perfect(metrics(train, val, settings={"size": 256}))


def test_every_patch_of_a_vit_finds_itself():
    torch.manual_seed(0)
    data = coloured(blocks, 4)
    settings = {"size": 256, "k": 1, "memory": 10_000}
    assert perfect(metrics(data, data, Backbone("test_vit", 64).eval(), settings))


def test_shuffled_labels_give_chance():
    train = labelled(painted(blocks(6)), blocks(6, seed=1))
    val = labelled(painted(blocks(6, seed=2)), blocks(6, seed=3))
    actual = metrics(train, val, settings={"size": 256})
    patches, chance = 6 * 16 * 16, 100 / len(PALETTE)
    assert actual["aAcc"] == pytest.approx(chance, abs=5 * 100 * (0.25 * 0.75 / patches) ** 0.5)


def test_the_whole_evaluation_by_hand():
    """Four patches an image, three neighbours: everything again in numpy, but the upsampling."""
    rng = np.random.default_rng(0)
    pixels = [
        torch.from_numpy(rng.integers(0, 256, (3, 2, 2))).byte().repeat_interleave(16, 1).repeat_interleave(16, 2)
        for _ in range(5)
    ]
    masks = [torch.from_numpy(rng.integers(IGNORE, 3, (32, 32))) for _ in range(5)]
    kept = {}
    settings = {"size": 32, "k": 3, "temperature": 0.1}
    metrics(
        labelled(pixels[:4], masks[:4], 3),
        labelled(pixels[4:], masks[4:], 3),
        settings=settings,
        on_prediction=kept.__setitem__,
    )

    mean, std = (np.array(values)[:, None, None] for values in Colours.normalisation)

    def token(image, y, x):
        patch = (image.numpy()[:, y : y + 16, x : x + 16] / 255 - mean) / std
        return patch.mean((1, 2)) / np.linalg.norm(patch.mean((1, 2)))

    def shares(mask, y, x):
        known = [c for c in mask[y : y + 16, x : x + 16].flatten().tolist() if c != IGNORE]
        return [known.count(c) / len(known) for c in range(3)]

    positions = [(y, x) for y in (0, 16) for x in (0, 16)]
    memory = np.array([token(image, *position) for image in pixels[:4] for position in positions])
    soft = np.array([shares(mask, *position) for mask in masks[:4] for position in positions])
    maps = np.zeros((3, 2, 2))
    for y, x in positions:
        similarity = memory @ token(pixels[4], y, x)
        nearest = np.argsort(-similarity)[:3]
        weights = np.exp(similarity[nearest] / 0.1)
        maps[:, y // 16, x // 16] = weights @ soft[nearest] / weights.sum()
    scores = F.interpolate(torch.from_numpy(maps)[None], (32, 32), mode="bilinear")[0]
    first, second = scores.topk(2, 0).values
    sure = first - second > 1e-4
    assert sure.double().mean() > 0.9
    assert len(scores.argmax(0).unique()) > 1
    assert torch.equal(kept[0].long()[sure], scores.argmax(0)[sure])


@pytest.mark.parametrize(("height", "width"), [(17, 33), (16, 90), (61, 47)])
def test_any_size_of_image(height, width):
    masks = stripes(3, height, width)
    masks[0][:4] = IGNORE
    kept = {}
    actual = metrics(
        labelled(painted(masks), masks),
        labelled(painted(masks), masks),
        settings={"size": 64},
        on_prediction=kept.__setitem__,
    )
    assert [kept[i].shape for i in range(3)] == [(height, width)] * 3
    assert 0 <= actual["mIoU"] <= 100


def test_a_seed_gives_the_same_and_memory_matters_little_where_colours_do():
    train, val = coloured(stripes, 6, height=96), coloured(stripes, 5, height=96, seed=1)
    some = {"size": 96, "k": 3, "memory": 40}
    first, again = (metrics(train, val, settings=some, seed=3) for _ in range(2))
    assert first == again
    assert perfect(first)


def test_the_backbone_is_left_as_it_was():
    torch.manual_seed(0)
    backbone = Backbone("test_vit", 64).eval()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    data = coloured(stripes, 2)
    metrics(data, data, backbone, {"size": 64})
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert not backbone.training


def test_invalid_settings_are_refused():
    with pytest.raises(UserError, match="temperature"):
        InContext(temperature=0)
