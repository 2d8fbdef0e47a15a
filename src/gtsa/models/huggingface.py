"""Translates vision transformers of Hugging Face's transformers to timm, and back.

Reads the names of transformers 4 (``encoder.layer.0.attention.attention.query``, the default also in 5) and of 5
(``layers.0.attention.q_proj``). Heads, poolers and mask tokens are left out and counted.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from gtsa.core.errors import UserError
from gtsa.models import state_dict
from gtsa.models.backbone import Backbone

DEFAULTS: dict[str, dict[str, Any]] = {  # what a config.json may leave out, by its model_type
    "vit": {"patch_size": 16, "intermediate_size": 3072, "layer_norm_eps": 1e-12},
    "dinov2": {"patch_size": 14, "layer_norm_eps": 1e-6},
    "dinov2_with_registers": {"patch_size": 16, "layer_norm_eps": 1e-6, "num_register_tokens": 4},
    "dinov3_vit": {"patch_size": 16, "layer_norm_eps": 1e-5, "num_register_tokens": 0, "rope_theta": 100.0},
}
LEFT_OUT = re.compile(r"(?:embeddings\.)?(pooler|classifier|decoder|mask_token)\b")
NAMES = (  # timm, Hugging Face
    ("cls_token", r"embeddings\.cls_token"),
    ("reg_token", r"embeddings\.register_tokens"),
    ("pos_embed", r"embeddings\.position_embeddings"),
    (r"patch_embed.proj.\1", r"embeddings\.patch_embeddings\.(?:projection\.)?(weight|bias)"),
    (r"norm.\1", r"(?:layernorm|norm)\.(weight|bias)"),
)
BLOCK = re.compile(r"(?:model\.)?(?:encoder\.layer|layers|layer)\.(\d+)\.(.+)")
IN_BLOCK = (
    (r"norm1.\1", r"(?:layernorm_before|norm1)\.(weight|bias)"),
    (r"norm2.\1", r"(?:layernorm_after|norm2)\.(weight|bias)"),
    (r"attn.q.\1", r"attention\.(?:attention\.query|q_proj)\.(weight|bias)"),
    (r"attn.k.\1", r"attention\.(?:attention\.key|k_proj)\.(weight|bias)"),
    (r"attn.v.\1", r"attention\.(?:attention\.value|v_proj)\.(weight|bias)"),
    (r"attn.proj.\1", r"attention\.(?:output\.dense|o_proj)\.(weight|bias)"),
    (r"mlp.fc1.\1", r"(?:intermediate\.dense|mlp\.fc1|mlp\.up_proj)\.(weight|bias)"),
    (r"mlp.fc2.\1", r"(?:output\.dense|mlp\.fc2|mlp\.down_proj)\.(weight|bias)"),
    (r"ls\1.gamma", r"layer_scale([12])\.lambda1"),
)


class Read(NamedTuple):
    """A model of Hugging Face in timm's terms."""

    model: str
    arguments: dict[str, Any]  # of timm's constructor
    eps: float  # of the LayerNorms
    tensors: dict[str, Tensor]
    left: dict[str, int]  # tensors that are left out, by part


class _Shape(NamedTuple):
    width: int
    depth: int
    heads: int
    patch: int  # px
    hidden: int  # width of the MLPs
    side: int  # of the image, px
    registers: int


def read(config: Mapping[str, Any], given: Mapping[str, Tensor], source: str) -> Read:
    """Translates config.json and tensors.

    Raises:
        UserError: timm's ViT cannot hold the model, or config.json and tensors are not of one model (4).
    """
    kind = config.get("model_type")
    if kind not in DEFAULTS:
        raise UserError(f"{source}: model_type {kind!r} cannot be read; {', '.join(DEFAULTS)} can", 4)
    try:
        return _read(str(kind), {**DEFAULTS[str(kind)], **config}, given, source)
    except (KeyError, TypeError, ValueError, OverflowError, ZeroDivisionError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{source}: config.json and its tensors cannot be understood ({error!r:.200})", 4) from None


def _read(kind: str, config: Mapping[str, Any], given: Mapping[str, Tensor], source: str) -> Read:
    tensors, left = _renamed(given)
    shape = _shape(config, source)
    _check_supported(kind, config, shape, source)
    _check_size(tensors, shape, source)
    tensors = _fused(tensors, shape.depth, split_bias=kind == "dinov3_vit")
    if kind == "dinov3_vit":
        model, arguments, tensors = _dinov3(config, shape, tensors)
    else:
        options: dict[str, Any] = {"qkv_bias": bool(config.get("qkv_bias", True))}
        if kind != "vit":
            options["init_values"] = 1e-5
        if shape.registers:
            tensors = state_dict.merged(tensors)
            options |= {"reg_tokens": shape.registers, "no_embed_class": True}
        model, arguments = state_dict.plain(*shape[:6], **options)
    return Read(model, arguments, float(config["layer_norm_eps"]), tensors, left)


def _shape(config: Mapping[str, Any], source: str) -> _Shape:
    width, depth, heads = (int(config[k]) for k in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
    patch, side = (_square(config.get(k, 224), k, source) for k in ("patch_size", "image_size"))
    hidden = int(config["intermediate_size"] if "intermediate_size" in config else width * config.get("mlp_ratio", 4))
    return _Shape(width, depth, heads, patch, hidden, side, int(config.get("num_register_tokens", 0)))


def _check_supported(kind: str, config: Mapping[str, Any], shape: _Shape, source: str) -> None:
    """Raises UserError (4) where timm's plain ViT lacks a part of the model."""
    checks = {
        f"hidden_act {config.get('hidden_act')!r} is not gelu": config.get("hidden_act", "gelu") != "gelu",
        "its MLPs are gated (SwiGLU)": config.get("use_swiglu_ffn") or config.get("use_gated_mlp"),
        f"it sees {config.get('num_channels')} channels, not 3": config.get("num_channels", 3) != 3,
        "its keys have a bias of their own": kind == "dinov3_vit" and config.get("key_bias"),
        "queries, values, MLPs and projections do not all have a bias": kind == "dinov3_vit"
        and not all(config.get(k, True) for k in ("query_bias", "value_bias", "mlp_bias", "proj_bias")),
        "its heads are of another width than the tokens": config.get("head_dim")
        not in (None, shape.width // shape.heads),
    }
    if reasons := [reason for reason, applies in checks.items() if applies]:
        raise UserError(
            f"{source}: {'; '.join(reasons)}: a plain ViT of timm cannot hold it; look for it with timm:NAME", 4
        )


def _check_size(tensors: Mapping[str, Tensor], shape: _Shape, source: str) -> None:
    """Raises UserError (4) unless the tensors have the width and depth that config.json states."""
    width = len(tensors["patch_embed.proj.weight"])
    depth = len({k.split(".")[1] for k in tensors if k.startswith("blocks.")})
    if (width, depth) != (shape.width, shape.depth):
        raise UserError(
            f"{source}: config.json states {shape.depth} blocks of width {shape.width}, the tensors have {depth} of "
            f"{width}; the files are not of one model: get both again",
            4,
        )


def _dinov3(
    config: Mapping[str, Any], shape: _Shape, tensors: dict[str, Tensor]
) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """timm's name, arguments and tensors of a DINOv3 ViT."""
    tensors = {re.sub(r"\bls([12])\.gamma", r"gamma_\1", k): v for k, v in tensors.items()}
    if not shape.registers:
        tensors.pop("reg_token", None)  # of length 0
    size = {384: "small", 768: "base", 1024: "large"}.get(shape.width, "small")
    sizes = {"patch_size": shape.patch, "embed_dim": shape.width, "depth": shape.depth, "num_heads": shape.heads}
    arguments = {
        "img_size": shape.side,
        **sizes,
        "mlp_ratio": state_dict.ratio(shape.hidden, shape.width),
        "num_reg_tokens": shape.registers,
        "rope_temperature": config["rope_theta"],
    }
    return f"vit_{size}_patch16_dinov3_qkvb", arguments, tensors


def normalisation(preprocessor: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel, of pixels in [0, 1], from a preprocessor_config.json.

    Raises:
        ValueError: the preprocessor scales pixels in another way.
    """
    if not preprocessor.get("do_rescale", True) or abs(255 * preprocessor.get("rescale_factor", 1 / 255) - 1) > 1e-3:
        raise ValueError("pixels are not scaled to [0, 1]")
    if not preprocessor.get("do_normalize", True):
        return [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]
    return preprocessor["image_mean"], preprocessor["image_std"]


def convert(backbone: Backbone) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    """config.json, tensors (in the names of transformers 4) and preprocessor_config.json of a ViTModel, no pooler.

    Raises:
        UserError: a ViTModel cannot hold the backbone (4).
    """
    _check_plain(backbone)
    vit, side = backbone.vit, backbone.arguments["img_size"]
    first = vit.blocks[0]
    mean, std = backbone.normalisation
    config = {
        "architectures": ["ViTModel"],
        "model_type": "vit",
        "hidden_size": backbone.embed_dim,
        "num_hidden_layers": len(vit.blocks),
        "num_attention_heads": first.attn.num_heads,
        "intermediate_size": first.mlp.fc1.out_features,
        "hidden_act": "gelu",
        "layer_norm_eps": first.norm1.eps,
        "image_size": side,
        "patch_size": backbone.patch_size,
        "num_channels": 3,
        "qkv_bias": first.attn.qkv.bias is not None,
        "attention_probs_dropout_prob": 0.0,
        "hidden_dropout_prob": 0.0,
    }
    preprocessor = {
        "image_processor_type": "BitImageProcessor",  # as for DINOv2: short side resized, centre cut
        "size": {"shortest_edge": side},
        "crop_size": {"height": side, "width": side},
        "resample": 2,  # bilinear, as in the timm export
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
        "range16": list(backbone.range16),  # for gtsa; transformers ignores it
    }
    tensors = dict(pair for k, v in vit.state_dict().items() for pair in _exported(k, v.detach().float().cpu()))
    return config, tensors, preprocessor


def _check_plain(backbone: Backbone) -> None:
    """Raises UserError (4) unless the backbone is a ViT with a CLS token, learnt positions and nothing else."""
    vit = backbone.vit
    if (
        any(type(block) is not Block or type(block.mlp.act) is not nn.GELU for block in vit.blocks)
        or any(not state_dict.PLAIN.fullmatch(name) or name.endswith("gamma") for name in vit.state_dict())
        or backbone.num_prefix_tokens != 1
        or vit.pos_embed.shape[1] != 1 + math.prod(vit.patch_embed.grid_size)
    ):
        raise UserError(
            f"{backbone.model} is no plain ViT with a CLS token and positions for it, which is all that a ViTModel of "
            "Hugging Face holds (no registers, layer scale or rotary positions); use --to timm",
            4,
        )


EXPORTED = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


def _exported(name: str, value: Tensor) -> list[tuple[str, Tensor]]:
    """A tensor under its name in transformers 4. Queries, keys and values become three tensors."""
    if name in EXPORTED:
        return [(EXPORTED[name], value)]
    stem, kind = name.rsplit(".", 1)
    start = ""
    if stem.startswith("blocks."):
        _, number, stem = stem.split(".", 2)
        start = f"encoder.layer.{number}."
    if stem == "attn.qkv":
        parts = zip(("query", "key", "value"), value.chunk(3), strict=True)
        return [(f"{start}attention.attention.{part}.{kind}", each.contiguous()) for part, each in parts]
    return [(f"{start}{EXPORTED[stem]}.{kind}", value)]


def _renamed(given: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Tensors under timm's names, and the parts left out. An unknown name is kept, and loading then refuses it."""
    tensors: dict[str, Tensor] = {}
    left: Counter[str] = Counter()
    for key, value in given.items():
        name = re.sub(r"^(vit|dinov2|dinov2_with_registers|dinov3_vit)\.", "", key)
        if part := LEFT_OUT.match(name):
            left[part[1]] += 1
        elif block := BLOCK.fullmatch(name):
            tensors[f"blocks.{block[1]}.{_translated(block[2], IN_BLOCK)}"] = value
        else:
            tensors[_translated(name, NAMES)] = value
    return tensors, dict(left)


def _translated(name: str, table: tuple[tuple[str, str], ...]) -> str:
    for timm_name, pattern in table:
        if match := re.fullmatch(pattern, name):
            return match.expand(timm_name)
    return name


def _fused(tensors: dict[str, Tensor], depth: int, split_bias: bool) -> dict[str, Tensor]:
    """Queries, keys and values as one tensor. DINOv3's keys have no bias; timm keeps the other two biases apart."""
    for start in (f"blocks.{number}.attn." for number in range(depth)):
        tensors[f"{start}qkv.weight"] = torch.cat([tensors.pop(f"{start}{part}.weight") for part in "qkv"])
        if split_bias:
            tensors |= {f"{start}{part}_bias": tensors.pop(f"{start}{part}.bias") for part in "qv"}
        elif f"{start}q.bias" in tensors:
            tensors[f"{start}qkv.bias"] = torch.cat([tensors.pop(f"{start}{part}.bias") for part in "qkv"])
    return tensors


def _square(value: Any, name: str, source: str) -> int:
    """The side in px of a size in config.json. Raises UserError (4) unless it is square."""
    both = list(value) if isinstance(value, list | tuple) else [value, value]
    if len(set(both)) != 1 or int(both[0]) != both[0] or both[0] < 1:
        raise UserError(f"{source}: {name} {value} is no square in px; only squares can be read", 4)
    return int(both[0])
