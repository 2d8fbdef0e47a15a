"""Files of tensors without a description, as DINO and its successors write them: the encoder in them, and its model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gtsa.core.errors import UserError
from gtsa.models.backbone import names

NETWORKS = ("teacher", "student")
CONTAINERS = ("state_dict", "model", "module", "backbone", "encoder", "vit", "_orig_mod")
HEADS = (
    *("head", "head_dist", "attn_pool", "classifier", "projector", "predictor", "projection_head", "prediction_head"),
    *("prototypes", "dino_head", "ibot_head", "decoder", "mask_token", "masked_embed"),
)
PREFIX = re.compile(rf"((?:{'|'.join((*NETWORKS, *CONTAINERS))})\.)*")
SIZES = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1280: "huge"}
PLAIN = re.compile(
    r"cls_token|reg_token|pos_embed|patch_embed\.proj\.(weight|bias)|(fc_)?norm\.(weight|bias)|blocks\.\d+\."
    r"((norm[12]|attn\.qkv|attn\.proj|mlp\.fc[12])\.(weight|bias)|ls[12]\.gamma)"
)


def encoder(found: Any, network: str, source: str) -> tuple[dict[str, Tensor], dict[str, int], str]:
    """The encoder's tensors under timm's names, how many of which other parts were left out, and whose encoder it is.

    Args:
        found: what the file holds: tensors by name, perhaps within other dictionaries, under any prefixes.
        network: which to take where there are both ``teacher`` and ``student``; a lone student is taken, too.

    Raises:
        UserError: there are no tensors, no student though it is asked for, or two tensors for one place (4).
    """
    left: Counter[str] = Counter()
    chosen = ""
    for _ in range(5):  # dictionaries in one another
        inner = [name for name in (network, *NETWORKS, *CONTAINERS) if _holds(found, name)]
        if not inner:
            break
        chosen = inner[0] if inner[0] in NETWORKS else chosen
        for name in found:
            if name != inner[0]:
                left[str(name)] += _count(found[name])
        found = found[inner[0]]
    if not isinstance(found, dict) or not any(isinstance(value, Tensor) for value in found.values()):
        raise UserError(f"{source} holds no dictionary of tensors", 4)
    before = {str(key): PREFIX.match(str(key)).group() for key in found}  # type: ignore[union-attr]
    there = [name for name in NETWORKS if any(name in prefix.split(".") for prefix in before.values())]
    flat = network if network in there else "".join(there)
    chosen = chosen or flat
    if network == "student" and chosen == "teacher":
        raise UserError(f"{source} holds a teacher and no student; leave out --network student", 4)
    tensors: dict[str, Tensor] = {}
    for key, value in found.items():
        prefix, bare = before[str(key)], str(key).removeprefix(before[str(key)])
        part = bare.split(".")[0]
        part = "decoder" if part.startswith("decoder_") else part  # as masked autoencoders call its parts
        if flat and flat not in prefix.split("."):
            other = [name for name in there if name in prefix.split(".")]
            left[other[0] if other else part] += _count(value)
        elif part in HEADS or not isinstance(value, Tensor):
            left[part] += _count(value)
        elif bare in tensors:
            raise UserError(f"{source} holds {bare} twice, the second time as {key}; leave one network in it", 4)
        else:
            tensors[bare] = value
    return _renamed(tensors), dict(+left), chosen


def guess(tensors: Mapping[str, Tensor]) -> tuple[str | None, dict[str, Any], str]:
    """timm's name and arguments of the model that plain tensors are of, and a remark: how it was told, or why not.

    Heads are taken to be 64 wide, as in every ViT of DeiT, DINO, DINOv2 and timm's own sizes up to large.
    """
    strange = [name for name in tensors if not PLAIN.fullmatch(name)]
    if "patch_embed.proj.weight" not in tensors or tensors["patch_embed.proj.weight"].ndim != 4:
        return None, {}, "it has no patch_embed.proj.weight"
    width, channels, patch, _ = tensors["patch_embed.proj.weight"].shape
    side = _side(tensors, patch)
    size = {"img_size": side} if side else {}
    depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    hidden = len(tensors.get("blocks.0.mlp.fc1.weight", ()))
    if strange:
        return None, size, f"{strange[0]} is in no plain ViT"
    if width not in SIZES or width % 64 or SIZES[width] == "huge" or patch not in (8, 14, 16) or channels != 3:
        return None, size, f"{width} wide, patches of {patch} px and {channels} channels are no usual ViT"
    if not side or not hidden or "cls_token" not in tensors:
        return None, size, "its position embeddings, MLP or CLS token are not a plain ViT's"
    registers = tensors["reg_token"].shape[1] if "reg_token" in tensors else 0
    options: dict[str, Any] = {"init_values": 1e-5} if "blocks.0.ls1.gamma" in tensors else {}
    if registers:
        options["reg_tokens"] = registers
    if tensors["pos_embed"].shape[1] == (side // patch) ** 2:
        options["no_embed_class"] = True
    bias = "blocks.0.attn.qkv.bias" in tensors
    model, arguments = plain(width, depth, width // 64, patch, hidden, side, qkv_bias=bias, **options)
    how = f"taken for {model}: {depth} blocks, {width // 64} heads, {registers} registers (if not, give --model)"
    return model, arguments, how


def plain(
    width: int, depth: int, heads: int, patch: int, hidden: int, image_size: int, **more: Any
) -> tuple[str, dict[str, Any]]:
    """timm's name for a plain ViT, and all arguments that make it one: the name alone decides nothing."""
    named = f"vit_{SIZES.get(width, 'base')}_patch{patch}_224"
    shape = {"patch_size": patch, "embed_dim": width, "depth": depth, "num_heads": heads}
    arguments = {"img_size": image_size, **shape, "mlp_ratio": ratio(hidden, width), **more}
    known = named if named in names("vit_*") else f"vit_{SIZES.get(width, 'base')}_patch16_224"
    return known if known in names("vit_*") else "vit_base_patch16_224", arguments


def ratio(hidden: int, width: int) -> float:
    """timm's mlp_ratio, of which it takes int(width * ratio)."""
    return hidden / width if int(width * (hidden / width)) == hidden else (hidden + 0.5) / width


def merged(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """DINOv2's positions beside registers, one of them the CLS token's, as timm's: the CLS token holds its own."""
    positions = tensors["pos_embed"].float()
    return {**tensors, "cls_token": tensors["cls_token"] + positions[:, :1], "pos_embed": positions[:, 1:]}


def _renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """DINOv2's own names as timm's: blocks in chunks, and registers."""
    tensors = {re.sub(r"^blocks\.\d+\.(\d+\.)", r"blocks.\1", name): value for name, value in tensors.items()}
    if "register_tokens" in tensors and "pos_embed" in tensors and "cls_token" in tensors:
        tensors["reg_token"] = tensors.pop("register_tokens")
        tensors = merged(tensors)
    return tensors


def _side(tensors: Mapping[str, Tensor], patch: int) -> int | None:
    """Image side in px that position embeddings were made for, where it is the only square that fits."""
    if "pos_embed" not in tensors or tensors["pos_embed"].ndim != 3:
        return None
    count = tensors["pos_embed"].shape[1]
    prefix = sum(tensors[name].shape[1] for name in ("cls_token", "reg_token") if name in tensors)
    grids = {round(n**0.5) for n in {count, count - prefix} if n > 0 and round(n**0.5) ** 2 == n}
    return patch * grids.pop() if len(grids) == 1 else None


def _holds(found: Any, name: str) -> bool:
    return isinstance(found, dict) and isinstance(found.get(name), dict)


def _count(value: Any, depth: int = 5) -> int:
    """Tensors in a value, however deep."""
    if isinstance(value, dict) and depth:
        return sum(_count(inner, depth - 1) for inner in value.values())
    return int(isinstance(value, Tensor))
