"""Files of tensors without a config, as DINO and its successors write them: finds the encoder and infers its model."""

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


def encoder(content: Any, network: str, source: str) -> tuple[dict[str, Tensor], dict[str, int], str]:
    """The encoder's tensors under timm's names, the number of tensors left out by part, and the network it is of.

    Args:
        content: of the file: tensors by name, perhaps within other dictionaries, under any prefixes.
        network: ``teacher`` or ``student``, where the file has both; a lone student is always taken.

    Raises:
        UserError: there are no tensors, the requested student is missing, or two tensors have one name (4).
    """
    content, left, chosen = _unpacked(content, network)
    if not isinstance(content, dict) or not any(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{source} holds no dictionary of tensors", 4)
    prefixes = {str(key): PREFIX.match(str(key)).group() for key in content}  # type: ignore[union-attr]
    present = [name for name in NETWORKS if any(name in prefix.split(".") for prefix in prefixes.values())]
    prefixed = network if network in present else "".join(present)  # network that is named in prefixes
    chosen = chosen or prefixed
    if network == "student" and chosen == "teacher":
        raise UserError(f"{source} holds a teacher and no student; leave out --network student", 4)
    tensors: dict[str, Tensor] = {}
    for key, value in content.items():
        prefix = prefixes[str(key)]
        bare = str(key).removeprefix(prefix)
        part = bare.split(".")[0]
        part = "decoder" if part.startswith("decoder_") else part  # names of masked autoencoders
        if prefixed and prefixed not in prefix.split("."):
            other = [name for name in present if name in prefix.split(".")]
            left[other[0] if other else part] += _count(value)
        elif part in HEADS or not isinstance(value, Tensor):
            left[part] += _count(value)
        elif bare in tensors:
            raise UserError(f"{source} holds {bare} twice, the second time as {key}; leave one network in it", 4)
        else:
            tensors[bare] = value
    return _renamed(tensors), dict(+left), chosen


def _unpacked(content: Any, network: str) -> tuple[Any, Counter[str], str]:
    """The innermost dictionary, the number of tensors beside it by name, and the network that its path names."""
    left: Counter[str] = Counter()
    chosen = ""
    for _ in range(5):  # dictionaries in one another
        inner = [name for name in (network, *NETWORKS, *CONTAINERS) if _holds(content, name)]
        if not inner:
            break
        chosen = inner[0] if inner[0] in NETWORKS else chosen
        for name in content:
            if name != inner[0]:
                left[str(name)] += _count(content[name])
        content = content[inner[0]]
    return content, left, chosen


def guess(tensors: Mapping[str, Tensor]) -> tuple[str | None, dict[str, Any], str]:
    """Infers the model from plain tensors: timm's name, arguments, and a remark on how, or why it cannot be inferred.

    Heads are assumed to be 64 wide, as in every ViT of DeiT, DINO, DINOv2 and timm's own sizes up to large.
    """
    unknown = [name for name in tensors if not PLAIN.fullmatch(name)]
    if "patch_embed.proj.weight" not in tensors or tensors["patch_embed.proj.weight"].ndim != 4:
        return None, {}, "it has no patch_embed.proj.weight"
    width, channels, patch, _ = tensors["patch_embed.proj.weight"].shape
    side = _side(tensors, patch)
    size = {"img_size": side} if side else {}
    depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    hidden = len(tensors.get("blocks.0.mlp.fc1.weight", ()))
    if unknown:
        return None, size, f"{unknown[0]} is in no plain ViT"
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
    remark = f"taken for {model}: {depth} blocks, {width // 64} heads, {registers} registers (if not, give --model)"
    return model, arguments, remark


def plain(
    width: int, depth: int, heads: int, patch: int, hidden: int, image_size: int, **more: object
) -> tuple[str, dict[str, Any]]:
    """timm's name for a plain ViT, and all arguments that define it: the name alone defines nothing."""
    name = f"vit_{SIZES.get(width, 'base')}_patch{patch}_224"
    shape = {"patch_size": patch, "embed_dim": width, "depth": depth, "num_heads": heads}
    arguments = {"img_size": image_size, **shape, "mlp_ratio": ratio(hidden, width), **more}
    known = name if name in names("vit_*") else f"vit_{SIZES.get(width, 'base')}_patch16_224"
    return known if known in names("vit_*") else "vit_base_patch16_224", arguments


def ratio(hidden: int, width: int) -> float:
    """timm's mlp_ratio: timm computes the hidden width as int(width * ratio)."""
    return hidden / width if int(width * (hidden / width)) == hidden else (hidden + 0.5) / width


def merged(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Positions of DINOv2 with registers, as timm has them: the CLS token's position is added to the CLS token."""
    positions = tensors["pos_embed"].float()
    return {**tensors, "cls_token": tensors["cls_token"] + positions[:, :1], "pos_embed": positions[:, 1:]}


def _renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """DINOv2's names of blocks (in chunks) and registers become timm's."""
    tensors = {re.sub(r"^blocks\.\d+\.(\d+\.)", r"blocks.\1", name): value for name, value in tensors.items()}
    if "register_tokens" in tensors and "pos_embed" in tensors and "cls_token" in tensors:
        tensors["reg_token"] = tensors.pop("register_tokens")
        tensors = merged(tensors)
    return tensors


def _side(tensors: Mapping[str, Tensor], patch: int) -> int | None:
    """Image side in px of the position embeddings, where only one square fits them."""
    if "pos_embed" not in tensors or tensors["pos_embed"].ndim != 3:
        return None
    count = tensors["pos_embed"].shape[1]
    prefix = sum(tensors[name].shape[1] for name in ("cls_token", "reg_token") if name in tensors)
    grids = {round(n**0.5) for n in {count, count - prefix} if n > 0 and round(n**0.5) ** 2 == n}
    return patch * grids.pop() if len(grids) == 1 else None


def _holds(content: object, name: str) -> bool:
    return isinstance(content, dict) and isinstance(content.get(name), dict)


def _count(value: object, depth: int = 5) -> int:
    """The number of tensors in a value, down to ``depth`` levels."""
    if isinstance(value, dict) and depth:
        return sum(_count(inner, depth - 1) for inner in value.values())
    return int(isinstance(value, Tensor))
