"""The forward pass of timm's VisionTransformer over crops of several sizes at once, in parts that can be compiled.

Tokens of all crops lie side by side as rows: [T, D]. Norms and matrix products run once for all of them, attention once
a size. The result is that of timm's own forward, to rounding.

Shapes: n crops of a size, t tokens a crop (prefix and patches), T rows in all (the sum of n * t), D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import Attention, DropPath, LayerScale, PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gtsa.core.compilation import compilable

SHARDED = "run_sharded"  # name of a method of blocks
Layout = tuple[tuple[int, int], ...]  # (n, t) of each size


def is_plain(vit: nn.Module) -> bool:
    """Whether this forward pass is that of ``vit``: others (EVA, rotary positions, dropout) run timm's own."""
    return (
        type(vit) is VisionTransformer
        and type(vit.patch_embed) is PatchEmbed
        and all(type(each) is Block and type(each.attn) is Attention for each in cast(nn.Sequential, vit.blocks))
        and all(each.p == 0 for each in vit.modules() if isinstance(each, nn.Dropout))
        and isinstance(vit.patch_drop, nn.Identity)
    )


def forward(vit: Any, embedded: Sequence[Tensor], recompute: bool = False) -> list[Tensor]:
    """Embedded tokens [n, t, D] of each size -> tokens after all blocks and the final norm, of the same shapes.

    Args:
        recompute: keep the input of every block alone, and compute the rest again in the backward pass.
    """
    layout: Layout = tuple((each.shape[0], each.shape[1]) for each in embedded)
    rows = torch.cat([each.flatten(0, 1) for each in embedded]) if len(embedded) > 1 else embedded[0].flatten(0, 1)
    if torch.is_autocast_enabled(rows.device.type):
        half = torch.get_autocast_dtype(rows.device.type)
        rows = rows.to(half) if half == torch.bfloat16 else rows  # fp16 would overflow
    kept = _kept(vit, layout, rows) if vit.training else None
    for index, each in enumerate(vit.blocks):
        scales = None if kept is None else kept[2 * index : 2 * index + 2]
        run = getattr(each, SHARDED, None) or partial(_run, each)
        rows = run(rows, layout, scales, recompute and torch.is_grad_enabled())
    rows = normalised(vit.norm, rows)
    parts = torch.split(rows, [n * t for n, t in layout])
    return [part.reshape(n, t, -1) for part, (n, t) in zip(parts, layout, strict=True)]


def shard_units(vit: Any) -> list[nn.Module]:
    """The blocks, each with a method ``SHARDED`` that ``forward`` calls: sharding can gather a block around it."""
    for each in vit.blocks:
        setattr(each, SHARDED, partial(_run, each))
    return list(vit.blocks)


def _run(each: Any, rows: Tensor, layout: Layout, scales: Tensor | None, recompute: bool) -> Tensor:
    if recompute:
        return checkpoint(block, each, rows, layout, scales, use_reentrant=False)
    return block(each, rows, layout, scales)


def embed(vit: Any, images: Tensor) -> Tensor:
    """Images [n, C, H, W] -> patches [n, h * w, D] without positions; the convolution is one matrix product."""
    patch = vit.patch_embed.patch_size
    n, channels, height, width = images.shape
    h, w = height // patch[0], width // patch[1]
    cells = images.reshape(n, channels, h, patch[0], w, patch[1]).permute(0, 2, 4, 1, 3, 5).reshape(n, h * w, -1)
    projection = vit.patch_embed.proj
    return cast(Tensor, vit.patch_embed.norm(F.linear(cells, projection.weight.flatten(1), projection.bias)))


def with_positions(vit: Any, patches: Tensor, positions: Tensor | None) -> Tensor:
    """Patches [n, h * w, D] and prefix tokens, with position embeddings: [n, t, D]."""
    prefix = [p.expand(len(patches), -1, -1) for p in (vit.cls_token, vit.reg_token) if p is not None]
    if positions is not None and vit.no_embed_class:
        patches = patches + positions
    tokens = torch.cat([*(p.to(patches.dtype) for p in prefix), patches], dim=1) if prefix else patches
    if positions is not None and not vit.no_embed_class:
        tokens = tokens + positions
    return cast(Tensor, vit.norm_pre(tokens))


@compilable
def block(each: Any, rows: Tensor, layout: Layout, scales: Tensor | None) -> Tensor:
    """One transformer block: rows [T, D] -> [T, D].

    Args:
        scales: [2, T, 1] of stochastic depth: 0 where a crop leaves the branch out.
    """
    branch = _scaled(each.ls1, _attention(each.attn, normalised(each.norm1, rows), layout))
    rows = rows + (branch if scales is None else branch * scales[0])
    branch = _scaled(each.ls2, each.mlp(normalised(each.norm2, rows)))
    return rows + (branch if scales is None else branch * scales[1])


def normalised(layer: nn.Module, rows: Tensor) -> Tensor:
    """A layer norm that keeps bfloat16 (autocast would widen it); the kernel takes its statistics in float32."""
    if rows.dtype != torch.bfloat16 or not isinstance(layer, nn.LayerNorm):
        return cast(Tensor, layer(rows))
    weight, bias = (None if p is None else p.to(rows.dtype) for p in (layer.weight, layer.bias))
    with torch.autocast(rows.device.type, enabled=False):
        return F.layer_norm(rows, layer.normalized_shape, weight, bias, layer.eps)


def _attention(attention: Any, rows: Tensor, layout: Layout) -> Tensor:
    """Multi-head self-attention within every crop: [T, D] -> [T, D]."""
    attended = []
    for part, (n, t) in zip(torch.split(attention.qkv(rows), [n * t for n, t in layout]), layout, strict=True):
        q, k, v = part.reshape(n, t, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = attention.q_norm(q), attention.k_norm(k)
        found = F.scaled_dot_product_attention(q, k, v)
        attended.append(found.transpose(1, 2).reshape(n * t, -1))
    joined = attention.norm(torch.cat(attended) if len(attended) > 1 else attended[0])
    if attention.gate is not None:
        joined = joined * attention.gate(rows).sigmoid()
    return cast(Tensor, attention.proj(joined))


def _scaled(layer: nn.Module, rows: Tensor) -> Tensor:
    """LayerScale, in the precision of ``rows``."""
    return rows * layer.gamma.to(rows.dtype) if isinstance(layer, LayerScale) else cast(Tensor, layer(rows))


def _kept(vit: Any, layout: Layout, rows: Tensor) -> Tensor | None:
    """Scales of stochastic depth, drawn at once: [2 * depth, T, 1], for the branches of all blocks, one draw a crop.

    A branch is left out with the block's probability p, else multiplied by 1 / (1 - p) (Huang et al. 2016).
    """
    rates = [
        path.drop_prob if isinstance(path, DropPath) else 0.0
        for each in vit.blocks.children()
        for path in (each.drop_path1, each.drop_path2)
    ]
    if not any(rates):
        return None
    keep = 1 - torch.tensor(rates, device=rows.device)[:, None]  # [2 * depth, 1]
    crops = sum(n for n, _ in layout)
    scales = (torch.rand(len(rates), crops, device=rows.device) < keep) / keep
    each = torch.cat([torch.full((n,), t) for n, t in layout]).to(rows.device)
    return scales.repeat_interleave(each, dim=1, output_size=len(rows))[..., None].to(rows.dtype)


class Intermediates(nn.Module):
    """Tokens after some blocks of a timm ViT, prefix first: images -> [N, prefix + h * w, D] for each block."""

    def __init__(self, vit: Any, which: list[int], norm: bool) -> None:
        super().__init__()
        self.vit, self.which, self.norm = vit, which, norm

    def forward(self, images: Tensor) -> list[Tensor]:
        outputs = self.vit.forward_intermediates(
            images, self.which, return_prefix_tokens=True, norm=self.norm, output_fmt="NLC", intermediates_only=True
        )
        return [torch.cat([entry[1], entry[0]], dim=1) if isinstance(entry, tuple) else entry for entry in outputs]
