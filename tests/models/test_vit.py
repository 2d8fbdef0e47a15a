"""The packed forward pass against timm's own network, size by size."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from gtsa.models import vit as packed
from gtsa.models.backbone import Backbone

PLAIN: dict[str, dict[str, Any]] = {
    "test_vit": {},
    "test_vit2": {},  # registers and LayerScale
    "vit_tiny_patch16_224": {"depth": 2},
    "vit_small_patch14_dinov2": {"depth": 2},  # LayerScale
    "vit_small_patch14_reg4_dinov2": {"depth": 2},  # positions of the patches alone
    "vit_base_patch16_clip_224": {"depth": 1, "embed_dim": 64, "num_heads": 2},  # a norm before the blocks, no bias
    "vit_tiny_patch16_224.augreg_in21k": {"depth": 2, "qk_norm": True, "reg_tokens": 2},
}


def pair(name: str, arguments: dict[str, Any]) -> tuple[Backbone, Any]:
    torch.manual_seed(0)
    patch = timm.create_model(name, **arguments).patch_embed.patch_size[0]
    ours = Backbone(name, 4 * patch, arguments=arguments)
    for parameter in ours.vit.parameters():  # initial values hide mistakes: zeros and ones
        torch.nn.init.normal_(parameter, std=0.2)
    reference = timm.create_model(
        name, num_classes=0, global_pool="", dynamic_img_size=True, img_size=4 * patch, **arguments
    )
    reference.load_state_dict(ours.vit.state_dict())
    return ours.eval(), reference.eval()


@pytest.mark.parametrize("name", PLAIN)
def test_sizes_side_by_side_give_what_timm_gives_each(name: str) -> None:
    ours, reference = pair(name, PLAIN[name])
    assert packed.is_plain(ours.vit)
    patch = ours.patch_size
    groups = [torch.randn(2, 3, 4 * patch, 4 * patch), torch.randn(3, 3, 2 * patch, 3 * patch)]
    outputs = ours.side_by_side(groups)
    total: Tensor = sum((tokens.patches.square().mean() for tokens in outputs), torch.zeros(()))
    total.backward()
    expected = [reference(images) for images in groups]
    prefix = ours.num_prefix_tokens
    for tokens, whole in zip(outputs, expected, strict=True):
        torch.testing.assert_close(tokens.prefix, whole[:, :prefix], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(tokens.patches.flatten(1, 2), whole[:, prefix:], rtol=1e-4, atol=1e-4)
    sum(whole[:, prefix:].square().mean() for whole in expected).backward()
    for (key, a), b in zip(ours.vit.named_parameters(), reference.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), key
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4 * float(b.grad.abs().max()) + 1e-7)


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "eva02_tiny_patch14_224"])
def test_other_networks_run_timms_own_forward(name: str) -> None:
    arguments = {"depth": 1}
    ours, reference = pair(name, arguments)
    assert not packed.is_plain(ours.vit)
    groups = [
        torch.randn(2, 3, 4 * ours.patch_size, 4 * ours.patch_size),
        torch.randn(1, 3, 3 * ours.patch_size, 3 * ours.patch_size),
    ]
    for tokens, images in zip(ours.side_by_side(groups), groups, strict=True):
        whole = reference(images)[:, ours.num_prefix_tokens :]
        torch.testing.assert_close(tokens.patches.flatten(1, 2), whole, rtol=1e-4, atol=1e-4)


def test_stochastic_depth_leaves_out_branches_of_whole_crops() -> None:
    vit = Backbone("test_vit", 64, drop_path=0.5, arguments={"depth": 3}).vit.train()
    layout, rows = ((400, 17), (600, 5)), torch.zeros(400 * 17 + 600 * 5, 1)
    scales = packed._kept(vit, layout, rows)
    assert scales is not None
    assert scales.shape == (6, len(rows), 1)
    large, small = scales[:, : 400 * 17].reshape(6, 400, 17), scales[:, 400 * 17 :].reshape(6, 600, 5)
    for part in (large, small):
        assert (part == part[..., :1]).all()  # the tokens of a crop share one draw
    for branch, rate in zip(torch.cat([large[..., 0], small[..., 0]], 1), (0, 0, 0.25, 0.25, 0.5, 0.5), strict=True):
        torch.testing.assert_close(branch, (branch > 0) / (1 - rate))
        assert float((branch == 0).float().mean()) == pytest.approx(rate, abs=0.06)
    assert not scales[4].equal(scales[5])


def test_without_drop_path_and_in_evaluation_nothing_is_drawn() -> None:
    backbone = Backbone("test_vit", 64, drop_path=0.5).eval()
    state = torch.get_rng_state()
    backbone(torch.zeros(1, 3, 64, 64))
    assert torch.get_rng_state().equal(state)


def test_activation_checkpointing_keeps_less_and_changes_no_bit() -> None:
    torch.manual_seed(0)
    backbone = Backbone("test_vit", 64, drop_path=0.3).train()
    groups = [torch.randn(2, 3, 64, 64), torch.randn(2, 3, 32, 32)]
    found, kept = [], []
    for recompute in (False, True):
        backbone.recompute = recompute
        sizes: dict[int, int] = {}

        def keep(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = sum(tokens.patches.square().sum() for tokens in backbone.side_by_side(groups))
        assert isinstance(loss, Tensor)
        loss.backward()
        found.append([p.grad for p in backbone.parameters() if p.grad is not None])
        kept.append(sum(sizes.values()))
        backbone.zero_grad(set_to_none=True)
    assert all(a.equal(b) for a, b in zip(*found, strict=True))
    assert kept[1] < 0.6 * kept[0]


def test_under_autocast_tokens_stay_bfloat16_and_weights_float32() -> None:
    torch.manual_seed(0)
    backbone = Backbone("vit_small_patch14_dinov2", 56, arguments={"depth": 4}).train()
    images, seen = torch.randn(2, 3, 56, 56), []
    for each in backbone.vit.blocks:
        each.mlp.register_forward_hook(lambda _, inputs, output: seen.extend([inputs[0].dtype, output.dtype]))
    exact = backbone(images).patches
    seen.clear()
    with torch.autocast("cpu", torch.bfloat16):
        half = backbone(images).patches
    assert set(seen) == {torch.bfloat16}
    assert half.dtype == torch.bfloat16
    half.float().sum().backward()
    assert {p.grad.dtype for p in backbone.parameters() if p.grad is not None} == {torch.float32}
    assert float(((half - exact).norm() / exact.norm()).detach()) < 0.02
