"""Weights from wherever they come, loaded strictly and counted."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from gtsa import checkpoint
from gtsa.backbone import Backbone
from gtsa.core import Remedy

BEYOND = ("head.", "head_dist.", "attn_pool.", "head_drop.")  # parts of a published model after its last norm
PREFIXES = ("module.", "backbone.", "teacher.", "student.", "encoder.", "vit.")


@dataclass
class Weights:
    """Tensors of an encoder under timm's names, and what is known of it."""

    tensors: dict[str, Tensor]
    source: str
    model: str | None = None
    normalisation: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    arguments: dict[str, Any] | None = None


def find(spec: str, network: str = "teacher") -> Weights:
    """The weights that ``spec`` names: a run, an export folder, a .safetensors or .pth file, timm:NAME, random:NAME.

    Args:
        network: of a run, the ``teacher`` or the ``student``.

    Raises:
        Remedy: there is nothing there, or it is not what it should be (4).
    """
    if spec.startswith("timm:"):
        return _from_timm(spec)
    if spec.startswith("random:"):
        backbone = Backbone(spec.removeprefix("random:"))
        return Weights(backbone.vit.state_dict(), spec, backbone.model)
    path = Path(spec)
    if (path / "checkpoints").is_dir():
        return _from_run(path, network)
    if (path / "config.json").is_file():
        return _from_export(path)
    if path.is_file():
        return Weights(_from_file(path), spec)
    raise Remedy(
        f"{spec}: no weights there; give a run, an export folder, a .safetensors or .pth file, or timm:NAME",
        4,
    )


def load(weights: Weights, backbone: Backbone) -> str:
    """Puts every tensor in its place and says how many there were; position embeddings are resampled to the grid.

    Raises:
        Remedy: a tensor is missing, left over or of another shape (4).
    """
    wanted = backbone.vit.state_dict()
    given = {k: v for k, v in weights.tensors.items() if not k.startswith(BEYOND)}
    dropped = len(weights.tensors) - len(given)
    if "norm.weight" not in given and "fc_norm.weight" in given:  # models that averaged before their last norm
        given = {k.replace("fc_norm.", "norm.") if k.startswith("fc_norm.") else k: v for k, v in given.items()}
    if "pos_embed" in wanted and "pos_embed" in given:
        given["pos_embed"] = _positions(given["pos_embed"], wanted["pos_embed"], backbone)
    problems = [f"{k} is missing" for k in wanted if k not in given]
    problems += [f"{k} has no place" for k in given if k not in wanted]
    problems += [
        f"{k} is {_shape(given[k])}, {_shape(wanted[k])} is needed"
        for k in wanted
        if k in given and given[k].shape != wanted[k].shape
    ]
    if problems:
        fitting = sum(1 for k in wanted if k in given and given[k].shape == wanted[k].shape)
        raise Remedy(
            f"{weights.source} does not fit {backbone.model}: {fitting} of {len(wanted)} tensors fit; "
            f"{'; '.join(problems[:3])}{f' and {len(problems) - 3} more' if len(problems) > 3 else ''}. "
            "Give the --model that they were made with",
            4,
        )
    if bad := [k for k, v in given.items() if v.is_floating_point() and not torch.isfinite(v).all()]:
        raise Remedy(f"{weights.source}: {bad[0]} holds NaN or infinite values; the file is damaged", 4)
    backbone.vit.load_state_dict(given, strict=True)
    left = f", {dropped} of its head left out" if dropped else ""
    return f"{len(wanted)} of {len(wanted)} tensors loaded from {weights.source}{left}"


def _from_timm(spec: str) -> Weights:
    name = spec.removeprefix("timm:")
    try:
        model = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # whatever the hub, the network or the name brings
        told = str(error).split("\n")[0][:200]
        raise Remedy(
            f"{spec} could not be fetched: {told}; check the name and the network, or give a file", 4
        ) from None
    config = model.pretrained_cfg
    return Weights(model.state_dict(), spec, name, (tuple(config["mean"]), tuple(config["std"])))


def _from_run(path: Path, network: str) -> Weights:
    place, problems = checkpoint.newest(path / "checkpoints")
    if place is None:
        raise Remedy(f"{path} has no whole checkpoint{': ' + '; '.join(problems) if problems else ' yet'}", 4)
    tensors, state = checkpoint.read(place)
    start = f"{network}.encoder.vit."
    encoder = {k.removeprefix(start): v for k, v in tensors["objective"].items() if k.startswith(start)}
    known = state["encoder"]
    mean, std = known["normalisation"]
    return Weights(
        encoder, f"{path}/checkpoints/{place.name}", known["model"], (tuple(mean), tuple(std)), known["arguments"]
    )


def _from_export(path: Path) -> Weights:
    try:
        config = json.loads((path / "config.json").read_text())
        cfg = config.get("pretrained_cfg", {})
        normalisation = (tuple(cfg["mean"]), tuple(cfg["std"])) if "mean" in cfg else None
        tensors = _from_file(path / "model.safetensors")
    except (OSError, ValueError) as error:
        raise Remedy(f"{path} is no export folder: {error}", 4) from None
    return Weights(tensors, str(path), config.get("architecture"), normalisation, config.get("model_args"))


def _from_file(path: Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors file, or of a .pth file read without running anything in it."""
    try:
        if path.suffix == ".safetensors":
            loaded: Any = safetensors.torch.load_file(path)
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise Remedy(f"{path}: no such file", 4) from None
    except Exception as error:  # damaged files and refused pickles raise nearly anything
        told = " ".join(str(error).split())[:200]
        raise Remedy(f"{path} cannot be read as weights: {told}", 4) from None
    for name in ("teacher", "state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(name), dict):
            loaded = loaded[name]
            break
    if not isinstance(loaded, dict) or not any(isinstance(v, Tensor) for v in loaded.values()):
        raise Remedy(f"{path} holds no dictionary of tensors", 4)
    tensors = {}
    for key, value in loaded.items():
        bare = re.sub(rf"^({'|'.join(map(re.escape, PREFIXES))})+", "", key)
        if isinstance(value, Tensor) and not key.startswith(("projector", "predictor")):
            tensors[bare] = value
    return tensors


def _positions(given: Tensor, wanted: Tensor, backbone: Backbone) -> Tensor:
    """Square position embeddings of another grid, resampled by timm; ones of another width are left to fail."""
    grid = backbone.vit.patch_embed.grid_size
    prefix = wanted.shape[1] - grid[0] * grid[1]
    side = round(max(0, given.shape[1] - prefix) ** 0.5)
    if given.shape == wanted.shape or given.shape[-1] != wanted.shape[-1] or side**2 + prefix != given.shape[1]:
        return given
    return resample_abs_pos_embed(given, list(grid), [side, side], num_prefix_tokens=prefix)  # type: ignore[no-any-return]


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"
