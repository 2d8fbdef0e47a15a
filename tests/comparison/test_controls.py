"""Controls: what they say of images whose answer is known."""

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
    found = ColourAndEdges(32).see(normal(pixels))
    assert found.shape == (1, 1, 1, 4 * 3 + 4 * 9)
    quarters = found[0, 0, 0, :12].view(4, 3) + 0.5  # rows of quarters, then channels
    expected = torch.tensor([[0.2, 0, 0], [0, 0.4, 0], [0, 0, 0.6], [0, 0, 0.6]])
    torch.testing.assert_close(quarters, expected, atol=1e-6, rtol=0)
    flat = ColourAndEdges(16).see(normal(torch.full((1, 3, 32, 32), 0.3)))
    assert flat[..., 12:].abs().max() < 1e-3


@pytest.mark.parametrize(("degrees", "bins"), [(0, {0, 8}), (90, {4})])
def test_edges_are_found_by_their_orientation(degrees, bins):
    """A ramp along x has its gradient at 0 degrees, between the first and the last bin; one along y in the fifth."""
    ramp = torch.linspace(0, 1, 32).expand(3, 32, 32)
    pixels = ramp if degrees == 0 else ramp.transpose(1, 2)
    edges = ColourAndEdges(16).see(normal(pixels[None]))[0, 0, 0, 12:].view(4, 9)
    assert set(edges[0].nonzero()[:, 0].tolist()) == bins
    torch.testing.assert_close(edges.norm(), torch.tensor(1.0))


def test_position_is_of_the_place_alone():
    images = torch.randn(3, 3, 64, 96)
    found = Position(16).see(images)
    assert found.shape[:3] == (3, 4, 6)
    assert torch.equal(found[0], found[2]) and torch.equal(found, Position(16).see(images + 1))
    flat = found[0].flatten(0, 1)
    assert torch.cdist(flat, flat).fill_diagonal_(1).min() > 0.01  # no two places alike


@pytest.mark.parametrize("name", CONTROLS)
def test_they_look_like_backbones(name):
    control = CONTROLS[name](16)
    tokens = control(torch.randn(2, 3, 32, 48))
    assert tokens.patches.shape == (2, 2, 3, control.embed_dim) and tokens.prefix.shape[1] == 0
    assert len(control.blocks(torch.randn(1, 3, 32, 32), (-4, -1))) == 2
    with pytest.raises(UserError, match="fine-tunes"):
        fine_tunable(control)
