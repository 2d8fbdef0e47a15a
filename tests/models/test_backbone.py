"""Backbones, against timm's own models with the same weights."""

import copy

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gtsa.core.errors import UserError
from gtsa.models.attention import attention_maps
from gtsa.models.backbone import Backbone, names, patch_of

SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 3}
MODELS = {  # name: (patch, prefix tokens)
    "vit_small_patch16_224": (16, 1),
    "vit_small_patch8_224": (8, 1),
    "vit_base_patch16_siglip_224": (16, 0),
    "vit_small_patch14_reg4_dinov2": (14, 5),  # registers without positions
    "vit_small_patch16_dinov3": (16, 5),  # Eva with rotary positions alone
    "eva02_tiny_patch14_224": (14, 1),  # Eva with both
}
every = pytest.mark.parametrize("name", MODELS)


def pair(name, dtype=torch.float32):
    """Our backbone, made for 6 x 6 patches, and timm's model with its weights."""
    torch.manual_seed(0)
    size = 6 * MODELS[name][0]
    ours = Backbone(name, size, arguments=SMALL).to(dtype).eval()
    reference = timm.create_model(name, img_size=size, num_classes=0, global_pool="", dynamic_img_size=True, **SMALL)
    reference.load_state_dict(ours.vit.state_dict())
    return ours, reference.to(dtype).eval()


def images(rows, columns, patch, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows * 100 + columns)
    return torch.randn(2, 3, rows * patch, columns * patch, generator=generator).to(dtype)


@every
@pytest.mark.parametrize("grid", [(6, 6), (3, 3), (9, 9), (4, 7), (8, 2), (1, 1)], ids=str)
def test_tokens_are_those_of_timm(name, grid):
    ours, reference = pair(name)
    patch, prefix = MODELS[name]
    x = images(*grid, patch)
    tokens, expected = ours(x), reference.forward_features(x)
    assert (ours.embed_dim, ours.patch_size, ours.num_prefix_tokens) == (48, patch, prefix)
    assert tokens.patches.shape == (2, *grid, 48)
    assert tokens.prefix.shape == (2, prefix, 48)
    torch.testing.assert_close(tokens.patches.flatten(1, 2), expected[:, prefix:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tokens.prefix, expected[:, :prefix], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in MODELS if "dinov3" not in name])
@pytest.mark.parametrize("grid", [(6, 6), (3, 3), (4, 7)], ids=str)
def test_gradient_of_positions_is_that_of_timm(name, grid):
    ours, reference = pair(name, torch.float64)
    x = images(*grid, MODELS[name][0], torch.float64)
    ours(x).patches.sin().sum().backward()
    reference.forward_features(x)[:, MODELS[name][1] :].sin().sum().backward()
    got, expected = ours.vit.pos_embed.grad, reference.pos_embed.grad
    assert expected.abs().max() > 1e-3
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@settings(deadline=None, max_examples=15)
@given(st.lists(st.sampled_from([(6, 6), (3, 3), (3, 5), (5, 3)]), min_size=2, max_size=4))
def test_sizes_seen_before_leave_no_trace(grids):
    used = pair("vit_small_patch16_224")[0]
    for grid in grids:
        x = images(*grid, 16)
        assert torch.equal(used(x).patches, pair("vit_small_patch16_224")[0](x).patches)


def test_positions_follow_the_weights():
    ours, _ = pair("vit_small_patch16_224")
    x = images(3, 3, 16)
    ours(x)
    with torch.no_grad():
        ours.vit.pos_embed.mul_(3)
    fresh = Backbone("vit_small_patch16_224", 96, arguments=SMALL).eval()
    fresh.load_state_dict(ours.state_dict())
    assert torch.equal(ours(x).patches, fresh(x).patches)


def test_copy_has_weights_of_its_own():
    ours, _ = pair("vit_small_patch16_224")
    x, twin = images(3, 3, 16), copy.deepcopy(ours)
    before = ours(x).patches
    with torch.no_grad():
        twin.vit.pos_embed.add_(1)
    assert torch.equal(ours(x).patches, before)
    assert not torch.equal(twin(x).patches, before)


def test_a_failed_forward_leaves_the_grid():
    ours, reference = pair("vit_small_patch16_224")
    with pytest.raises(RuntimeError):
        ours(torch.zeros(1, 3, 40, 40))
    x = images(3, 3, 16)
    torch.testing.assert_close(ours(x).prefix, reference.forward_features(x)[:, :1], rtol=1e-5, atol=1e-5)


def test_drop_path_grows_linearly_from_zero():
    vit = Backbone("vit_tiny_patch16_224", 32, drop_path=0.1, arguments={"depth": 5}).vit
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in vit.blocks]
    assert rates == pytest.approx([0, 0.025, 0.05, 0.075, 0.1])


def test_encoder_is_the_published_one():
    vit = Backbone("vit_small_patch16_224", arguments={"depth": 1}).vit
    assert (vit.embed_dim, vit.blocks[0].attn.num_heads, vit.norm.eps) == (384, 6, 1e-6)
    assert vit.blocks[0].attn.qkv.bias is not None
    assert vit.pos_embed.shape == (1, 197, 384)


@pytest.mark.parametrize(
    "name",
    [
        "vit_smal_patch16_224",
        "",
        "nonsense",
        "hf-hub:some/where",
        "vit_small_patch16_224.nonsense",
        "resnet18",
        "swin_tiny_patch4_window7_224",
        "vit_tiny_r_s16_p8_224",
    ],
)
def test_a_model_that_is_not_a_plain_vit_is_refused(name):
    with pytest.raises(UserError, match=f"{name}.*vit_|near it") as caught:
        Backbone(name)
    assert caught.value.code == 2


def test_a_similar_name_is_proposed():
    with pytest.raises(UserError, match="near it: .*vit_small"):
        Backbone("vit_small_patch17_224")


def test_wrong_arguments_and_sizes_are_named():
    with pytest.raises(UserError, match="dpth"):
        Backbone("vit_tiny_patch16_224", arguments={"dpth": 1})
    with pytest.raises(UserError, match="225 px .* 16 px .* use 224"):
        Backbone("vit_tiny_patch16_224", 225)


def test_patch_is_known_without_weights():
    assert [patch_of(name) for name in MODELS] == [patch for patch, _ in MODELS.values()]


def test_names_are_of_plain_vits():
    assert "vit_small_patch16_224" in names("*small*")
    assert "vit_small_patch16_dinov3" in names("*small*")
    assert not [name for name in names("*") if name.startswith(("resnet", "swin"))]


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_attention_of_the_last_block_by_head(pooling):
    """The oracle: softmax(q k) of the last block, from its own input."""
    backbone = Backbone("test_vit", 48).eval()
    backbone.pooling = pooling
    images, inputs = torch.randn(2, 3, 32, 48), []
    last = backbone.vit.blocks[-1]
    handle = last.attn.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    maps = attention_maps(backbone, images)
    handle.remove()
    heads, (n, tokens, width) = last.attn.num_heads, inputs[0].shape
    q, k, _ = last.attn.qkv(inputs[0]).reshape(n, tokens, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-2, -1) / (width // heads) ** 0.5).softmax(-1)
    expected = weights[:, :, 0, 1:] if pooling == "cls" else weights[:, :, 1:, 1:].mean(2)
    assert maps.shape == (2, heads, 2, 3)
    assert maps.flatten(2).detach().numpy() == pytest.approx(expected.detach().numpy(), abs=1e-5)
    assert (maps.sum((2, 3)) <= 1 + 1e-6).all()


def test_attention_with_rotary_positions():
    """Eva models rotate q and k; the weights are taken after that."""
    backbone = Backbone("eva02_tiny_patch14_224", 56, arguments={"depth": 1}).eval()
    maps = attention_maps(backbone, torch.randn(1, 3, 56, 56))
    assert maps is None or (maps.shape == (1, 3, 4, 4) and (maps >= 0).all())


def test_a_model_that_does_not_give_its_attention():
    backbone = Backbone("test_vit", 48).eval()
    backbone.vit.blocks[-1].attn = torch.nn.Identity()
    assert attention_maps(backbone, torch.randn(1, 3, 48, 48)) is None
