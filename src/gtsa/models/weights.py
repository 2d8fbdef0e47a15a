"""Loads weights into a backbone: strict, and every tensor is counted."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from gtsa.core.errors import UserError
from gtsa.data.images.pixels import Range
from gtsa.models.backbone import Backbone
from gtsa.models.transform import FULL_RANGE
from gtsa.models.weight_sources import Weights, read_weights

BEYOND = ("head", "head_dist", "attn_pool", "head_drop")  # parts of a published model after its last norm
EXPORTED = (
    "global_pool",
    "fc_norm",
    "use_fc_norm",
    "dynamic_img_size",
)  # arguments of an export that a Backbone sets itself


def load_backbone(source: str, network: str = "teacher", model: str | None = None) -> tuple[Backbone, str]:
    """The encoder that ``source`` names, with its weights, and a line on how many tensors were loaded.

    Args:
        source: as for ``read_weights``.
        network: ``teacher`` or ``student``, where the source has both.
        model: its timm name, where the source is a bare file that does not name it.
    """
    return build_backbone(read_weights(source, network), model)


def model_of(weights: Weights, model: str | None = None) -> tuple[str, dict[str, Any], str]:
    """The timm name of the model that has these weights, further arguments of timm's constructor, and a remark.

    Args:
        model: its timm name, if known. If the weights name another model, their arguments are not used.

    Raises:
        UserError: the model is not known (4).
    """
    name, arguments, remark = weights.model, weights.arguments, weights.remark
    if model and (weights.guessed or model != name):
        name, remark = model, ""
        arguments = {"img_size": arguments["img_size"]} if "img_size" in arguments else {}
    if name is None:
        raise UserError(f"{weights.source} does not say which model it is ({remark}); name it with --model", 4)
    return name, {k: v for k, v in arguments.items() if k not in ("num_classes", *EXPORTED)}, remark


def facts_of(weights: Weights, model: str | None = None) -> tuple[str, Range, int]:
    """What training from these weights has to know: model, range of 16-bit images, and patch size, px.

    The patch size is 0 where it is the model's own. Arguments and errors are those of ``model_of``.
    """
    name, arguments, _ = model_of(weights, model)
    return name, weights.range16, arguments.get("patch_size", 0)


def build_backbone(
    weights: Weights, model: str | None = None, train_at: int | None = None, drop_path: float = 0.0
) -> tuple[Backbone, str]:
    """A backbone with these weights, and a line on how many tensors were loaded.

    Args:
        model: as for ``model_of``.
        train_at: side in px of the crops that it will be trained on; None: it is not trained. Position embeddings are
            resampled to this size. LayerNorms then have timm's own eps, so that every export format can hold them.
        drop_path: stochastic depth of the last block.
    """
    name, arguments, remark = model_of(weights, model)
    size = arguments.pop("img_size", 224)
    options: dict[str, Any] = {"normalisation": weights.normalisation} if weights.normalisation else {}
    try:
        backbone = Backbone(name, train_at or size, drop_path, arguments=arguments, **options)
    except (LookupError, ArithmeticError, AttributeError) as error:  # timm raises these for unexpected values
        raise UserError(f"{weights.source}: timm makes no {name} of its arguments ({error!r:.200})", 4) from None
    if train_at is None:
        backbone.pooling, backbone.range16 = weights.pooling, weights.range16
        for norm in norms(backbone):
            norm.eps = norm.eps if weights.eps is None else weights.eps
    if weights.range16 != FULL_RANGE:
        black, white = weights.range16
        remark = "; ".join([*([remark] if remark else []), f"trained with --range16 {black:g} {white:g}"])
    return backbone, load(weights, backbone) + (f"; {remark}" if remark else "")


def load(weights: Weights, backbone: Backbone) -> str:
    """Loads every tensor and returns a line with their number. Position embeddings are resampled to the grid.

    Raises:
        UserError: a tensor is missing, superfluous, of another shape, or not finite (4).
    """
    expected = backbone.vit.state_dict()
    given, left = _without_heads(weights)
    if "norm.weight" not in given and "fc_norm.weight" in given:  # models that averaged before their last norm
        given = {k.replace("fc_norm.", "norm.") if k.startswith("fc_norm.") else k: v for k, v in given.items()}
    if "pos_embed" in expected and "pos_embed" in given:
        given["pos_embed"] = _resampled_positions(given["pos_embed"], expected["pos_embed"], backbone)
    _check_shapes(given, expected, weights.source, backbone.model)
    if bad := [k for k, v in given.items() if v.is_floating_point() and not torch.isfinite(v).all()]:
        raise UserError(f"{weights.source}: {bad[0]} holds NaN or infinite values; the file is damaged", 4)
    backbone.vit.load_state_dict(given, strict=True)
    message = f"{len(expected)} of {len(expected)} tensors loaded from {weights.source}"
    if left:
        message += f"; left out: {', '.join(f'{count} of {part}' for part, count in sorted(left.items()))}"
    if weights.eps is not None and weights.eps != (eps := eps_of(backbone)):
        message += f"; LayerNorm eps is {weights.eps:g} in the weights and {eps:g} here"
    return message


def _without_heads(weights: Weights) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The encoder's tensors, and how many tensors of each other part are left out."""
    given = {k: v for k, v in weights.tensors.items() if k.split(".")[0] not in BEYOND}
    left = {**weights.left}
    for name in weights.tensors.keys() - given.keys():
        part = name.split(".")[0]
        left[part] = left.get(part, 0) + 1
    return given, left


def _check_shapes(given: dict[str, Tensor], expected: dict[str, Tensor], source: str, model: str) -> None:
    """Raises UserError (4) unless names and shapes are those of the model."""
    problems = [f"{k} is missing" for k in expected if k not in given]
    problems += [f"{k} has no place" for k in given if k not in expected]
    common = [k for k in expected if k in given]
    fitting = [k for k in common if given[k].shape == expected[k].shape]
    problems += [
        f"{k} is {_shape(given[k])}, {_shape(expected[k])} is needed"
        for k in common
        if given[k].shape != expected[k].shape
    ]
    if problems:
        raise UserError(
            f"{source} does not fit {model}: {len(fitting)} of {len(expected)} tensors fit; "
            f"{'; '.join(problems[:3])}{f' and {len(problems) - 3} more' if len(problems) > 3 else ''}. "
            "Give the --model that they were made with",
            4,
        )


def norms(backbone: Backbone) -> list[nn.LayerNorm]:
    """The LayerNorms of a backbone."""
    return [module for module in backbone.vit.modules() if isinstance(module, nn.LayerNorm)]


def eps_of(backbone: Backbone) -> float:
    """The eps of a backbone's LayerNorms."""
    return norms(backbone)[0].eps


def _resampled_positions(given: Tensor, expected: Tensor, backbone: Backbone) -> Tensor:
    """Square position embeddings of another grid, resampled by timm. Others are unchanged, so that the check fails."""
    grid = backbone.vit.patch_embed.grid_size
    if given.shape == expected.shape or given.ndim != 3 or given.shape[-1] != expected.shape[-1]:
        return given
    prefix = expected.shape[1] - grid[0] * grid[1]
    side = round(max(0, given.shape[1] - prefix) ** 0.5)
    if side**2 + prefix != given.shape[1]:
        return given
    return resample_abs_pos_embed(given.float(), list(grid), [side, side], num_prefix_tokens=prefix)  # type: ignore[no-any-return]


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"
