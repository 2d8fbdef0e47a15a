"""Feature maps: where the vectors of shifted grids lie, and colours on a common scale."""

import pytest
import torch
import torch.nn.functional as F

from gtsa.core.types import Tokens
from gtsa.evaluation.feature_maps import centred_directions, feature_colours, patch_maps, strip
from gtsa.models.backbone import Encoder


class Means(Encoder):
    """An encoder whose tokens are the mean pixels of the patches."""

    normalisation = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    embed_dim, num_prefix_tokens, fingerprint = 3, 0, ""

    def __init__(self, patch_size):
        super().__init__()
        self.side, self.weight = patch_size, torch.nn.Parameter(torch.ones(()))

    @property
    def patch_size(self):
        return self.side

    def forward(self, images):
        return self.blocks(images)[0]

    def blocks(self, images, which=(), norm=True):
        return [Tokens(F.avg_pool2d(images, self.side).permute(0, 2, 3, 1), images.new_empty(len(images), 0, 3))]


@pytest.mark.parametrize("patch", [8, 16])
def test_vectors_of_shifted_grids_lie_half_a_patch_apart(patch):
    ramp = torch.linspace(0, 1, 4 * patch).expand(1, 3, 4 * patch, 4 * patch)
    for images in (ramp, ramp.transpose(-2, -1)):
        maps = patch_maps(Means(patch), images, shifts=2)[0, ..., 0]
        assert maps.shape == (8, 8)
        line = maps[4] if images is ramp else maps[:, 4]
        steps = line.diff()[1:-1]  # without the mirrored border
        assert steps.numpy() == pytest.approx(0.5 * patch / (4 * patch - 1), rel=1e-4)


def test_one_grid_is_the_network_itself():
    images = torch.rand(2, 3, 32, 32)
    assert patch_maps(Means(8), images).equal(F.avg_pool2d(images, 8).permute(0, 2, 3, 1))


def test_colours_have_one_scale_for_both_networks():
    torch.manual_seed(0)
    images, maps = torch.rand(2, 3, 32, 32), torch.randn(2, 8, 8, 16)
    alike = maps.mean((0, 1, 2)) + 5 + 0.2 * maps  # the same differences between patches, but smaller
    vivid, same, dull = feature_colours([maps, maps, alike], images, 64)
    assert vivid.shape == (2, 64, 64, 3) and vivid.min() >= 0 and vivid.max() <= 1
    assert vivid.equal(same)
    assert dull.std() < 0.5 * vivid.std()
    _, own = feature_colours([maps, alike], images, 64, common=False)
    assert own.std() > 1.5 * dull.std()


def test_centred_directions_are_unit_vectors_without_what_all_share():
    maps = torch.randn(2, 4, 4, 8) + 10
    directions = centred_directions(maps)
    assert directions.norm(dim=-1).numpy() == pytest.approx(1.0, abs=1e-5)
    assert directions.mean((0, 1, 2)).norm() < 0.2 < F.normalize(maps, dim=-1).mean((0, 1, 2)).norm()


def test_a_strip_takes_maps_of_any_density():
    images = torch.rand(3, 3, 32, 32)
    picture = strip(images, torch.randn(3, 4, 4, 8), torch.randn(3, 8, 8, 8), 10, size=64)
    assert picture.size == (80 + 3 * 76, 3 * 76 + 12)
