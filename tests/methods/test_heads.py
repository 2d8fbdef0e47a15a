"""Projector, predictor and rotation head, against their description in plain operations."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gtsa.methods.parts.heads import GridPredictor, GridProjector, RotationHead


def maps(width, h=5, w=7):
    return torch.randn(2, h, w, width, generator=torch.Generator().manual_seed(0))


def block(conv, x):
    """3x3 convolution, normalisation over channels, GELU, with every step written out; x [N, C, h, w]."""
    y = F.conv2d(x, conv.weight, conv.bias, padding=1)
    mean, variance = y.mean(1, keepdim=True), y.var(1, keepdim=True, unbiased=False)
    y = (y - mean) / (variance + 1e-5).sqrt()
    return y * 0.5 * (1 + torch.erf(y / 2**0.5))


def moved(module):
    """Parameters away from their start, where the normalised maps would hide biases."""
    torch.manual_seed(1)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    return module


@pytest.mark.parametrize("width", [6, 8])  # 8: as wide as the blocks, so that the first has a residual too
def test_projector(width):
    projector, x = moved(GridProjector(width, 8, 12)), maps(width)
    convs = [b.conv for b in projector.blocks]
    y = block(convs[0], x.permute(0, 3, 1, 2)) + (x.permute(0, 3, 1, 2) if width == 8 else 0)
    y = y + block(convs[1], y)
    y = F.conv2d(y, projector.proj.weight, projector.proj.bias).permute(0, 2, 3, 1)
    assert projector(x).shape == (2, 5, 7, 12)
    torch.testing.assert_close(projector(x), y)


def test_predictor_has_no_residual():
    predictor, x = moved(GridPredictor(8, 8)), maps(8)
    y = F.conv2d(block(predictor.block.conv, x.permute(0, 3, 1, 2)), predictor.proj.weight, predictor.proj.bias)
    torch.testing.assert_close(predictor(x), y.permute(0, 2, 3, 1))


def test_rotation_head_is_four_linears_and_three_norms():
    head = moved(RotationHead(6, 10, 5))
    x = given = torch.randn(3, 6)
    layers = list(head)
    for linear, norm, active in ((0, 1, True), (3, 4, True), (6, 7, False)):
        x = x @ layers[linear].weight.T + layers[linear].bias
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        x = x * layers[norm].weight + layers[norm].bias
        x = x * 0.5 * (1 + torch.erf(x / 2**0.5)) if active else x
    torch.testing.assert_close(head(given), x @ layers[8].weight.T + layers[8].bias)


@pytest.mark.parametrize(
    ("head", "shapes"),
    [
        (GridProjector(384), [(384, 384, 3, 3), (384,), (384, 384, 3, 3), (384,), (768, 384, 1, 1), (768,)]),
        (GridProjector(192), [(384, 192, 3, 3), (384,), (384, 384, 3, 3), (384,), (768, 384, 1, 1), (768,)]),
        (GridPredictor(), [(768, 768, 3, 3), (768,), (768, 768, 1, 1), (768,)]),
    ],
    ids=["projector", "narrow projector", "predictor"],
)
def test_published_widths_and_start(head, shapes):
    assert [tuple(p.shape) for p in head.parameters()] == shapes  # and so no norm has an affine part
    for name, parameter in head.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.02)
            assert abs(parameter.mean().item()) < 5e-4


@pytest.mark.parametrize("width", [192, 768])
def test_rotation_head_takes_any_encoder(width):
    head = RotationHead(width)
    shapes = [tuple(layer.weight.shape) for layer in head if isinstance(layer, nn.Linear)]
    assert shapes == [(768, width), (768, 768), (128, 768), (4, 128)]
    assert [layer.eps for layer in head if isinstance(layer, nn.LayerNorm)] == [1e-5] * 3
