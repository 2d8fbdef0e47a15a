"""Controls: features of images with known colours and edges."""

import pytest
import torch

from gtsa.comparison.controls import CONTROLS, ColourAndEdges, Position
from gtsa.core.errors import UserError
from gtsa.evaluation.features import fine_tunable

MEAN, STD = (torch.tensor(v)[:, None, None] for v in ColourAndEdges.normalisation)


def normal(pixels):
    return (pixels - MEAN) / STD


def test_colours_of_quarters_and_no_edges_in_a_plain_patch():
    pixels = torch.zeros(1, 3, 32, 32)
    pixels[:, 0, :16, :16], pixels[:, 1, :16, 16:], pixels[:, 2, 16:] = 0.2, 0.4, 0.6
    features = ColourAndEdges(32).compute_patches(normal(pixels))
    assert features.shape == (1, 1, 1, 4 * 3 + 4 * 9)
    quarters = features[0, 0, 0, :12].view(4, 3) + 0.5  # rows of quarters, then channels
    expected = torch.tensor([[0.2, 0, 0], [0, 0.4, 0], [0, 0, 0.6], [0, 0, 0.6]])
    torch.testing.assert_close(quarters, expected, atol=1e-6, rtol=0)
    flat = ColourAndEdges(16).compute_patches(normal(torch.full((1, 3, 32, 32), 0.3)))
    assert flat[..., 12:].abs().max() < 1e-3


@pytest.mark.parametrize(("degrees", "bins"), [(0, {0, 8}), (90, {4})])
def test_edges_are_binned_by_their_orientation(degrees, bins):
    """A ramp along x has its gradient at 0 degrees, between the first and the last bin; one along y in the fifth."""
    ramp = torch.linspace(0, 1, 32).expand(3, 32, 32)
    pixels = ramp if degrees == 0 else ramp.transpose(1, 2)
    edges = ColourAndEdges(16).compute_patches(normal(pixels[None]))[0, 0, 0, 12:].view(4, 9)
    assert set(edges[0].nonzero()[:, 0].tolist()) == bins
    torch.testing.assert_close(edges.norm(), torch.tensor(1.0))


def test_position_ignores_the_content():
    images = torch.randn(3, 3, 64, 96)
    features = Position(16).compute_patches(images)
    assert features.shape[:3] == (3, 4, 6)
    assert torch.equal(features[0], features[2]) and torch.equal(features, Position(16).compute_patches(images + 1))
    flat = features[0].flatten(0, 1)
    assert torch.cdist(flat, flat).fill_diagonal_(1).min() > 0.01  # no two positions are alike


@pytest.mark.parametrize("name", CONTROLS)
def test_controls_work_like_backbones(name):
    control = CONTROLS[name](16)
    tokens = control(torch.randn(2, 3, 32, 48))
    assert tokens.patches.shape == (2, 2, 3, control.embed_dim) and tokens.prefix.shape[1] == 0
    assert len(control.blocks(torch.randn(1, 3, 32, 32), (-4, -1))) == 2
    with pytest.raises(UserError, match="fine-tunes"):
        fine_tunable(control)
