"""Retrieval for rotated queries and equivariance, of features that are known by construction."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_dense import Colours, blocks, labelled, make_context, painted
from torch import nn

from gtsa.core.errors import UserError
from gtsa.core.types import Tokens
from gtsa.evaluation import dense
from gtsa.evaluation.evaluators.in_context import InContext
from gtsa.evaluation.evaluators.orientation import Orientation
from gtsa.models.backbone import IMAGENET, Backbone

SMALL = {"size": 128, "memory": 2000, "k": 5}
PATCH = 16


class Features(nn.Module):
    """A backbone whose patch tokens are ``see(pixels)``, [N, h, w, D]."""

    patch_size, normalisation = PATCH, IMAGENET

    def __init__(self, see, width):
        super().__init__()
        self.see, self.embed_dim = see, width

    def forward(self, pixels):
        patches = self.see(pixels)
        return Tokens(patches, patches.new_empty(len(pixels), 0, self.embed_dim))


def slopes(pixels):
    """How much brighter a patch is on its right and lower half, and its mean: rotates with the image."""
    grey = pixels.mean(1)
    halves = grey.unflatten(2, (-1, 2, PATCH // 2)).unflatten(1, (-1, 2, PATCH // 2)).mean((3, 6))  # [N, h, 2, w, 2]
    halves = halves.permute(0, 1, 3, 2, 4)
    down, right = halves[..., 1, :].sum(-1) - halves[..., 0, :].sum(-1), halves[..., 1].sum(-1) - halves[..., 0].sum(-1)
    return torch.stack([down, right], dim=-1)


def placed(pixels):
    """Row and column of a patch: nothing of its content."""
    n, h, w = len(pixels), pixels.shape[-2] // PATCH, pixels.shape[-1] // PATCH
    rows, columns = torch.meshgrid(torch.linspace(0.1, 1, h), torch.linspace(0.1, 1, w), indexing="ij")
    return torch.stack([rows, columns, torch.ones(h, w)], dim=-1).expand(n, h, w, 3)


def noise(images, seed):
    draw = np.random.default_rng(seed)
    pixels = [torch.from_numpy(draw.integers(0, 256, (3, 128, 128))).byte() for _ in range(images)]
    return labelled(pixels, [torch.from_numpy(draw.integers(0, 4, (128, 128))) for _ in range(images)])


def coloured(images, **options):
    masks = blocks(images, cells=8, **options)
    return labelled(painted(masks), masks)


def evaluate(backbone, train, val, **more):
    task = Orientation(**{**SMALL, **more})
    per_image = task(backbone, train, val, make_context())
    return task.metrics(per_image), per_image


def test_features_that_do_not_change_with_the_rotation():
    metrics, per_image = evaluate(Colours(), coloured(8), coloured(4, seed=1))
    assert [metrics[f"mIoU {angle}"] for angle in (0, 90, 180, 270)] == [100] * 4
    assert metrics["mIoU"] == 100 and metrics["drop"] == 0
    assert metrics["cosine turned back"] == pytest.approx(1, abs=1e-5)
    assert metrics["equivariance error"] == pytest.approx(0, abs=1e-5)
    assert metrics["linear R2"] == pytest.approx(1, abs=1e-5)
    assert per_image["true"].shape == (4, 4, 4)


def test_features_that_rotate_with_the_image():
    """Slopes of brightness turn by 90 degrees each time: another vector, but a linear map of the upright one."""
    metrics, _ = evaluate(Features(slopes, 2), noise(12, 0), noise(8, 1))
    assert metrics["cosine turned back"] == pytest.approx(-1 / 3, abs=0.02)  # of 90, 180 and 270 degrees: 0, -1, 0
    assert metrics["equivariance error"] == pytest.approx(4 / 3, abs=0.05)
    assert metrics["linear R2"] == pytest.approx(1, abs=1e-4)


def test_features_of_the_position_stay_where_they_are():
    metrics, _ = evaluate(Features(placed, 3), coloured(6), coloured(3, seed=1))
    assert metrics["cosine as it lies"] == pytest.approx(1, abs=1e-5)
    assert metrics["cosine turned back"] < 0.95
    assert metrics["linear R2"] == pytest.approx(1, abs=1e-4)  # of a position follows the rotated one


def test_the_masks_of_an_angle_are_those_of_rotated_images_and_masks():
    """The in-context evaluation of images and masks that are rotated themselves."""
    torch.manual_seed(0)
    backbone = Backbone("test_vit", 64).eval()
    train, val = coloured(6), coloured(4, seed=1)
    metrics, per_image = evaluate(backbone, train, val)
    for turns in range(4):
        rotated = labelled(
            [torch.rot90(pixels, turns, (-2, -1)).contiguous() for pixels in val.source.pixels],
            [torch.rot90(mask, turns).contiguous() for mask in val.targets],
        )
        expected = InContext(**SMALL)(backbone, train, rotated, make_context())
        assert metrics[f"mIoU {90 * turns}"] == pytest.approx(dense.metrics(expected)["mIoU"], abs=0.1)
        torch.testing.assert_close(per_image["hit"][:, turns].sum(), expected["hit"].sum(), rtol=0, atol=8)
    others = [metrics[f"mIoU {angle}"] for angle in (90, 180, 270)]
    assert metrics["drop"] == pytest.approx(metrics["mIoU 0"] - np.mean(others))
    assert metrics["mIoU"] == pytest.approx(np.mean([metrics["mIoU 0"], *others]))


def test_cosines_by_hand():
    torch.manual_seed(0)
    backbone = Backbone("test_vit", 64).eval()
    val = noise(2, 1)
    metrics, _ = evaluate(backbone, noise(3, 0), val)
    mean, std = (torch.tensor(value)[:, None, None] for value in IMAGENET)
    pixels = (torch.stack(val.source.pixels).float() / 255 - mean) / std
    with torch.no_grad():
        maps = [
            F.normalize(backbone(torch.rot90(pixels, r, (-2, -1))).patches, dim=-1).double().numpy() for r in range(4)
        ]
    back = np.mean([(maps[0] * np.rot90(maps[r], -r, (1, 2))).sum(-1).mean() for r in (1, 2, 3)])
    random = np.mean(
        [
            np.mean([a.reshape(-1, 64) @ b.reshape(-1, 64).T for a, b in zip(maps[0], maps[r], strict=True)])
            for r in (1, 2, 3)
        ]
    )
    assert metrics["cosine turned back"] == pytest.approx(back, abs=1e-5)
    assert metrics["cosine at random"] == pytest.approx(random, abs=1e-5)
    assert metrics["equivariance error"] == pytest.approx((1 - back) / (1 - random), abs=1e-4)


def test_the_linear_map_is_fitted_on_other_images():
    """Noise of its own for each image and rotation: nothing of it can be predicted."""
    draw = torch.Generator().manual_seed(0)
    metrics, _ = evaluate(
        Features(lambda p: torch.randn(len(p), 8, 8, 4, generator=draw), 4), noise(10, 0), noise(6, 1)
    )
    assert metrics["linear R2"] == pytest.approx(0, abs=0.02)
    assert metrics["equivariance error"] == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("wrong", [{"k": 0}, {"memory": 0}, {"size": 0}, {"temperature": 0.0}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(UserError, match="orientation: k, memory and size must be at least 1"):
        Orientation(**wrong)


def test_one_training_image_is_too_few():
    with pytest.raises(UserError, match="orientation: one training image is too few"):
        evaluate(Colours(), coloured(1), coloured(1))
