"""The pyramid's shapes, strides and what each level can see."""

import pytest
import torch

from gtsa.evaluation.heads.feature_pyramid import ChannelNorm, Pyramid
from gtsa.models.backbone import Backbone


@pytest.mark.parametrize("patch", [8, 14, 16])
@pytest.mark.parametrize("grid", [(4, 6), (5, 7), (1, 3)])
def test_strides_follow_the_patch(patch, grid):
    maps = [torch.randn(2, 24, *grid) for _ in range(4)]
    made = Pyramid(24, 12)(maps)
    height, width = (side * patch for side in grid)
    for level, stride in zip(made, (patch / 4, patch / 2, patch, 2 * patch), strict=True):
        assert level.shape == (2, 12, -(-height // stride), -(-width // stride))  # a whole last cell where it is odd


def test_flat_keeps_the_patch_stride():
    for level in Pyramid(24, 12, flat=True)([torch.randn(1, 24, 5, 7)] * 4):
        assert level.shape == (1, 12, 5, 7)


def test_each_level_comes_from_its_own_map():
    torch.manual_seed(0)
    pyramid = Pyramid(16, 8)
    maps = [torch.randn(1, 16, 4, 4) for _ in range(4)]
    before = pyramid(maps)
    for changed in range(4):
        after = pyramid([m + torch.randn(1, 16, 4, 4) if i == changed else m for i, m in enumerate(maps)])
        moved = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
        assert moved == [i == changed for i in range(4)]


@pytest.mark.parametrize(("level", "scale"), [(0, 4), (1, 2), (2, 1), (3, 0.5)])
def test_positions_are_kept(level, scale):
    """A change of one patch changes its own position in the finer maps, and one cell around it (3x3 convolution)."""
    torch.manual_seed(0)
    pyramid = Pyramid(16, 8)
    maps = torch.randn(1, 16, 12, 12)
    other = maps.clone()
    other[..., 6, 3] += 9.0  # 9: a maximum
    moved = (pyramid([maps] * 4)[level] != pyramid([other] * 4)[level]).any(1)[0].nonzero()
    y, x = int(6 * scale), int(3 * scale)
    side = max(1, int(scale))
    assert moved.min(0).values.tolist() == [y - 1, x - 1]
    assert moved.max(0).values.tolist() == [y + side, x + side]


def test_channel_norm_is_layer_norm_at_each_position():
    maps = torch.randn(2, 6, 3, 5)
    centred = maps - maps.mean(1, keepdim=True)
    expected = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(ChannelNorm(6)(maps), expected)


def test_it_learns_over_a_backbone():
    backbone = Backbone("test_vit", 64)
    maps = [t.patches.permute(0, 3, 1, 2) for t in backbone.blocks(torch.randn(1, 3, 64, 96), [1, 2, 3, 5])]
    pyramid = Pyramid(backbone.embed_dim, 8)
    made = pyramid(maps)
    assert [tuple(level.shape[-2:]) for level in made] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    sum(level.square().sum() for level in made).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in pyramid.parameters() if p.ndim > 1)
