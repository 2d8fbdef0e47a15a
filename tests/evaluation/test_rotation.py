"""Rotation metrics of backbones whose features are known by construction."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from evaluating import Stub, cells, labelled, make_context, noise
from gtsa.core.errors import UserError
from gtsa.core.types import Tokens
from gtsa.evaluation.evaluators.rotation import Rotation
from gtsa.models.backbone import Backbone

SMALL = {"resize": 64, "crop": 64, "size": 64}


class Invariant(nn.Module):
    """A backbone made exactly invariant: maps of the four rotations, each rotated back, averaged."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.patch_size, self.num_prefix_tokens, self.normalisation = (
            inner,
            inner.patch_size,
            0,
            inner.normalisation,
        )

    def blocks(self, images, which=(), norm=True):
        back = [
            torch.rot90(self.inner(torch.rot90(images, rotations, (-2, -1))).patches, -rotations, (1, 2))
            for rotations in range(4)
        ]
        patches = torch.stack(back).mean(0)
        return [Tokens(patches, patches.new_zeros(len(patches), 0, 1))] * max(1, len(which))

    def forward(self, images):
        return self.blocks(images)[-1]


def lit(count, seed):
    """Noise that is brighter towards the top, so that orientation can be seen."""
    shade = torch.linspace(255, 0, 64)[None, :, None]
    return [((image / 2 + shade / 2) * 0.99).to(torch.uint8) for image in noise(count, 64, seed)]


def gradient(images):
    """Features of an edge filter: for every patch its brightness on the left, right, above and below, and its position."""
    n, h, w, _ = cells(images).shape
    light = images.mean(1)
    halves = [half.mean((1, 2)) for half in (light[:, :32], light[:, 32:], light[:, :, :32], light[:, :, 32:])]
    whole = torch.stack(halves, dim=-1)[:, None, None].expand(n, h, w, 4)
    return torch.cat([whole, placed(images)], dim=-1)


def placed(images):
    """Row and column of a patch, mixed with one another."""
    n, h, w, _ = cells(images).shape
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    position = torch.stack([rows + 2 * columns, rows - columns, torch.ones(h, w)], dim=-1).float()
    return position.expand(n, h, w, 3)


def evaluate_rotation(backbone, train=24, val=40, images=lit, kind="none", **options):
    task = Rotation(**SMALL)
    per_image = task(
        backbone, labelled(images(train, 0), kind=kind), labelled(images(val, 1), kind=kind), make_context(**options)
    )
    return task.metrics(per_image), per_image


def vit():
    torch.manual_seed(0)
    return Backbone("test_vit", 64).eval()


def test_an_invariant_backbone_names_no_rotation():
    metrics, per_image = evaluate_rotation(Invariant(vit()))
    right = round(float(per_image["named"].sum() * 4))
    low, high = stats.binomtest(right, 160).proportion_ci()
    assert low <= 0.25 <= high
    assert metrics["rotation accuracy"] == pytest.approx(100 * right / 160)
    assert metrics["cosine turned back"] == pytest.approx(1, abs=1e-5)
    assert metrics["cosine as it lies"] < 1 - 1e-4


def test_its_cosine_as_it_lies_is_that_of_its_own_map_with_its_own_rotations():
    backbone = Invariant(Stub(cells))
    images = lit(3, 1)
    metrics, _ = evaluate_rotation(backbone, val=3)
    pixels = (torch.stack(images).float() / 255 - 0.5) / 0.25
    maps = backbone(pixels).patches.double().numpy()
    maps /= np.linalg.norm(maps, axis=-1, keepdims=True)
    lies = np.mean([(maps * np.rot90(maps, rotations, (1, 2))).sum(-1).mean() for rotations in (1, 2, 3)])
    every = np.mean([(m.reshape(64, -1) @ m.reshape(64, -1).T).mean() for m in maps])
    assert metrics["cosine as it lies"] == pytest.approx(lies, abs=1e-5)
    assert metrics["cosine at random"] == pytest.approx(every, abs=1e-5)  # each position with each


def test_a_sensitive_backbone_encodes_all_rotations_and_positions():
    metrics, _ = evaluate_rotation(Stub(gradient))
    assert metrics["rotation accuracy"] == 100
    assert metrics["position R2"] == pytest.approx(1, abs=1e-6)


def test_features_of_position_alone_do_not_rotate():
    metrics, _ = evaluate_rotation(Stub(placed))
    assert metrics["rotation accuracy"] == 25
    assert metrics["cosine as it lies"] == pytest.approx(1, abs=1e-6)
    assert metrics["cosine turned back"] < 0.9
    assert metrics["position R2"] == pytest.approx(1, abs=1e-6)


def test_features_of_noise_do_not_encode_position():
    metrics, _ = evaluate_rotation(Stub(cells), images=lambda count, seed: noise(count, 64, seed))
    assert -0.05 < metrics["position R2"] < 0.05
    assert 15 < metrics["rotation accuracy"] < 35


def test_equivariant_features_retrieve_masks_in_rotated_images():
    """Two halves, side by side or one above the other, have two of three colours, which are their classes."""

    def scenes(count, seed):
        draw = np.random.default_rng(seed)
        halves = [torch.from_numpy(draw.permutation(3)[:2]).repeat_interleave(32).expand(64, 64) for _ in range(count)]
        masks = [mask.T.contiguous() if i % 2 else mask.contiguous() for i, mask in enumerate(halves)]
        colours = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255]], dtype=torch.uint8)
        return labelled([colours[mask].permute(2, 0, 1).contiguous() for mask in masks], masks, "masks", "rgb")

    task = Rotation(**SMALL)
    per_image = task(Stub(cells), scenes(6, 0), scenes(4, 1), make_context())
    assert per_image["hit"].shape == (4, 4, 3)
    metrics = task.metrics(per_image)
    assert metrics["in-context mIoU upright"] == 100
    assert metrics["in-context mIoU turned"] == 100
    alone = task.metrics({name: values[:1] for name, values in per_image.items()})
    assert alone["in-context mIoU turned"] == 100
    place_only = task.metrics(task(Stub(placed), scenes(6, 0), scenes(4, 1), make_context()))
    assert place_only["in-context mIoU turned"] < 60


def test_without_masks_there_are_no_metrics_of_masks():
    metrics, _ = evaluate_rotation(Stub(cells), val=2)
    assert not any("mIoU" in name for name in metrics)
    with pytest.raises(UserError, match="one training image is too few"):
        evaluate_rotation(Stub(cells), train=1)
