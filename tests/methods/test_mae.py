"""MAE against its published formulas, written out slowly in float64."""

import math

import numpy as np
import pytest
import torch
from test_dino import views

from gtsa.core.errors import UserError
from gtsa.core.settings import validated
from gtsa.methods.mae import MAE, Decoder, sines
from gtsa.methods.parts import masking
from gtsa.models.backbone import Backbone
from gtsa.pretraining.settings import Pretrain

SMALL = {"decoder_dim": 32, "decoder_depth": 2}


def method(**settings):
    torch.manual_seed(0)
    encoder = Backbone("vit_tiny_patch16_224", 64, arguments={"depth": 2, "embed_dim": 48, "num_heads": 3})
    return MAE(encoder, **{**SMALL, **settings}).double()


def seen(batch=3):
    return views(batch, 1, 0)


def test_the_encoder_is_given_visible_patches_with_their_positions():
    encoder, pixels = method().encoder, seen().global_crops.pixels[:, 0]
    chosen = torch.tensor([[3, 0, 15], [1, 2, 5], [9, 4, 14]])
    vit = encoder.vit
    whole = vit._pos_embed(vit.patch_embed(pixels))
    kept = torch.stack([torch.cat([row[:1], row[1 + positions]]) for row, positions in zip(whole, chosen, strict=True)])
    by_hand = vit.norm(vit.blocks(vit.norm_pre(kept)))
    torch.testing.assert_close(encoder.visible(pixels, chosen), by_hand)
    assert not vit.patch_drop._forward_hooks and not vit.patch_embed._forward_hooks


def test_targets_are_pixels_of_patches_each_with_its_own_mean_and_deviation():
    mae, pixels = method(), seen().global_crops.pixels[:, 0]
    actual, plain = mae.targets(pixels).numpy(), method(normalise=False).targets(pixels).numpy()
    for n in range(3):
        for position in range(16):
            row, column = divmod(position, 4)
            patch = pixels[n, :, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16].numpy()
            values = np.array([patch[c, y, x] for y in range(16) for x in range(16) for c in range(3)])
            assert np.abs(plain[n, position] - values).max() == 0
            normal = (values - values.mean()) / math.sqrt(values.var(ddof=1) + 1e-6)
            assert np.abs(actual[n, position] - normal).max() < 1e-12


def test_the_loss_is_the_mean_over_hidden_patches(monkeypatch):
    mae, views_ = method().eval(), seen()
    order = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(n)) for n in range(3)])
    monkeypatch.setattr(masking, "random_order", lambda count, patches: order)
    pixels = views_.global_crops.pixels[:, 0]
    with torch.no_grad():
        painted, hidden = mae.reconstruct(pixels, order)
        loss = mae(views_, 0.5)["loss"].item()
    targets, errors = mae.targets(pixels), []
    for n in range(3):
        assert hidden[n].nonzero()[:, 0].tolist() == sorted(order[n, 4:].tolist())  # a quarter is visible
        errors.append(np.mean([(painted[n, p] - targets[n, p]).square().mean().item() for p in order[n, 4:].tolist()]))
    assert loss == pytest.approx(np.mean(errors), rel=1e-12)


def test_hidden_patches_do_not_reach_the_encoder(monkeypatch):
    mae, views_ = method().eval(), seen()
    order = torch.arange(16).flip(0).expand(3, 16)
    pixels = views_.global_crops.pixels[:, 0]
    before, hidden = mae.reconstruct(pixels, order)
    other = pixels.clone()
    other[:, :, :48] = 0  # patches 0 to 11, which are hidden
    assert hidden[:, :12].all() and not hidden[:, 12:].any()
    assert torch.equal(mae.reconstruct(other, order)[0], before)
    other[:, :, 48:] += 1
    assert not torch.equal(mae.reconstruct(other, order)[0], before)


def test_the_decoder_puts_tokens_where_they_belong():
    torch.manual_seed(0)
    decoder = Decoder(8, 16, 1, 5).double().eval()
    seen_, order = torch.randn(2, 3, 8, dtype=torch.float64), torch.tensor([[4, 0, 2, 1, 3, 5], [5, 3, 1, 0, 2, 4]])
    inputs = []
    decoder.blocks.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    decoder(seen_, order, (2, 3))
    for n in range(2):
        for position in range(6):
            rank = order[n].tolist().index(position)
            token = decoder.embed(seen_[n, rank]) if rank < 3 else decoder.token[0, 0]
            torch.testing.assert_close(inputs[0][n, position], token + sines((2, 3), 16)[position])


def test_positions_by_hand():
    actual = sines((2, 3), 8)
    for position in range(6):
        row, column = divmod(position, 3)
        rates = [1, 1 / 100]
        by_hand = [f(v * r) for v in (row, column) for f in (math.sin, math.cos) for r in rates]
        assert actual[position].tolist() == pytest.approx(by_hand, abs=1e-12)


def test_the_diagnosis_is_0_by_chance_and_1_for_a_perfect_painter(monkeypatch):
    mae, views_ = method().eval(), seen(5)
    pixels = views_.global_crops.pixels[:, 0]
    assert torch.equal(mae.diagnose(views_)["pixel_score"], mae.diagnose(views_)["pixel_score"])
    monkeypatch.setattr(
        MAE, "reconstruct", lambda self, p, order: (self.targets(p), torch.ones(5, 16, dtype=torch.bool))
    )
    assert mae.diagnose(views_)["pixel_score"].tolist() == pytest.approx([1] * 5)
    monkeypatch.setattr(
        MAE, "reconstruct", lambda self, p, order: (torch.zeros(5, 16, 768), torch.ones(5, 16, dtype=torch.bool))
    )
    assert mae.diagnose(views_)["pixel_score"].abs().max() < 1e-6  # normalised patches are all equally far from grey
    assert len(pixels) == 5


def test_settings_of_a_run_are_the_published_ones():
    s = validated(Pretrain, {"method": "mae"})
    assert (s.weight_decay, s.final_weight_decay, s.beta2, s.warmup, s.clip_grad, s.drop_path) == (
        0.05,
        0.05,
        0.95,
        0.05,
        0,
        0,
    )
    v = s.views
    assert (v.global_crops_number, v.local_crops_number, v.global_crops_scale, v.hflip, v.color_jitter) == (
        1,
        0,
        (0.2, 1.0),
        0.5,
        0.0,
    )
    assert validated(Pretrain, {"method": "mae", "clip_grad": 3.0}).clip_grad == 3.0
    assert MAE.base_lr == 1.5e-4


def test_a_model_that_cannot_leave_patches_out_is_refused():
    encoder = Backbone("eva02_tiny_patch14_224", 56, arguments={"depth": 1})
    with pytest.raises(UserError, match="cannot leave patches out"):
        encoder.visible(torch.zeros(1, 3, 56, 56), torch.tensor([[0]]))


@pytest.mark.parametrize(
    ("wrong", "message"), [({"mask_ratio": 1.0}, "below 1"), ({"decoder_dim": 30}, "multiple of 4")]
)
def test_settings_that_mean_nothing_are_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        method(**wrong)
