"""Attention of the last block, for pictures."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gtsa.models.backbone import Backbone


@torch.no_grad()
def attention_maps(backbone: Backbone, images: Tensor) -> Tensor | None:
    """How much the last block attends to every patch, by head: [N, heads, h, w], each map sums to at most 1.

    The query is the CLS token where features are pooled by it, else the mean over all patches. None for models
    whose attention timm does not compute as softmax(q k) in one place.
    """
    attend: Any = getattr(backbone.vit.blocks[-1], "attn", None)
    if not isinstance(getattr(attend, "attn_drop", None), nn.Dropout) or not hasattr(attend, "fused_attn"):
        return None
    weights: list[Tensor] = []
    handle = attend.attn_drop.register_forward_hook(lambda _, __, output: weights.append(output))
    fused, attend.fused_attn = attend.fused_attn, False  # fused kernels do not give the weights
    try:
        backbone.blocks(images, [-1])
    finally:
        attend.fused_attn = fused
        handle.remove()
    if not weights or weights[-1].dim() != 4:
        return None
    first = backbone.num_prefix_tokens
    by_query = weights[-1][..., first:].float()  # [N, heads, queries, patches]
    seen = by_query[:, :, 0] if backbone.pooling == "cls" and first else by_query[:, :, first:].mean(2)
    patch = backbone.patch_size
    return seen.reshape(*seen.shape[:2], images.shape[-2] // patch, images.shape[-1] // patch)
