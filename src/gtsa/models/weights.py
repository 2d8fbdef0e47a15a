"""Weights from wherever they come, loaded strictly and counted."""

from __future__ import annotations

import argparse
import inspect
import json
import math
import pickle
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from gtsa.core import files
from gtsa.core.errors import UserError
from gtsa.models import huggingface, state_dict, weights
from gtsa.models.backbone import Backbone
from gtsa.models.formats import no_weights
from gtsa.training import checkpoint

BEYOND = ("head", "head_dist", "attn_pool", "head_drop")  # parts of a published model after its last norm
EXPORTED = ("global_pool", "fc_norm", "use_fc_norm")  # arguments of an export that a Backbone sets itself
Normalisation = tuple[tuple[float, ...], tuple[float, ...]]


@dataclass
class Weights:
    """Tensors of an encoder under timm's names, and what is known of it."""

    tensors: dict[str, Tensor]
    source: str
    model: str | None = None
    normalisation: Normalisation | None = None
    arguments: dict[str, Any] = field(default_factory=dict)  # of timm's constructor
    eps: float | None = None  # of its LayerNorms; None: timm's own for the model
    left: dict[str, int] = field(default_factory=dict)  # tensors that are not the encoder's, by part
    guessed: bool = False  # model and arguments, from the tensors alone
    remark: str = ""  # how they were told, or why not
    pooling: Literal["mean", "cls"] = "mean"  # what one vector an image is to be, where they say so


def find(spec: str, network: str = "teacher") -> Weights:
    """The weights that ``spec`` names.

    Args:
        spec: a run or one checkpoint of it, an export, a folder of timm or of a Hugging Face ViT, a .safetensors or
            DINO-style .pth file, timm:NAME, random:NAME (docs/weights.md).
        network: ``teacher`` or ``student``, where there are both.

    Raises:
        UserError: there is nothing there, or it is not what it should be (4), or it reaches out of its folder (8).
    """
    if spec.startswith("timm:"):
        return _from_timm(spec)
    if spec.startswith("random:"):
        with torch.random.fork_rng(devices=[]):  # the same untrained network every time
            torch.manual_seed(0)
            backbone = Backbone(spec.removeprefix("random:"))
        return Weights(backbone.vit.state_dict(), spec, backbone.model)
    path = Path(spec)
    if (path / "checkpoints").is_dir():
        return _from_run(path, network)
    if checkpoint.NAME.fullmatch(path.name) and (path / checkpoint.MANIFEST).is_file():
        return _from_checkpoint(path, network)
    exported = path / "exports" / "timm"
    if network == "teacher" and (exported / "config.json").is_file():  # a run whose checkpoints were removed
        return _from_folder(exported)
    if (path / "config.json").is_file():
        return _from_folder(path)
    if path.is_file():
        return _from_file(path, network)
    raise no_weights(spec)


def described(weights: Weights, model: str | None = None) -> tuple[str, dict[str, Any], str]:
    """The model that weights are of, further arguments of timm's constructor, and a remark about them.

    Args:
        model: timm's name of it, where it is known; what the weights say counts only if they say the same.

    Raises:
        UserError: neither says which model it is (4).
    """
    name, arguments, remark = weights.model, weights.arguments, weights.remark
    if model and (weights.guessed or model != name):
        name, remark = model, ""
        arguments = {"img_size": arguments["img_size"]} if "img_size" in arguments else {}
    if name is None:
        raise UserError(f"{weights.source} does not say which model it is ({remark}); name it with --model", 4)
    return name, {k: v for k, v in arguments.items() if k not in ("num_classes", *EXPORTED)}, remark


def built(
    weights: Weights, model: str | None = None, train_at: int | None = None, drop_path: float = 0.0
) -> tuple[Backbone, str]:
    """A backbone with these weights, and how many tensors were loaded.

    Args:
        model: as for ``described``.
        train_at: it is to be trained, on crops of this side in px, which its position embeddings are resampled to. Its
            LayerNorms then have timm's own eps, so that every export can say it.
    """
    name, arguments, remark = described(weights, model)
    size = arguments.pop("img_size", 224)
    known: dict[str, Any] = {"normalisation": weights.normalisation} if weights.normalisation else {}
    try:
        backbone = Backbone(name, train_at or size, drop_path, arguments=arguments, **known)
    except (LookupError, ArithmeticError, AttributeError) as error:  # what timm makes of values that it never met
        raise UserError(f"{weights.source}: timm makes no {name} of its arguments ({error!r:.200})", 4) from None
    if train_at is None:
        backbone.pooling = weights.pooling
        for norm in norms(backbone):
            norm.eps = norm.eps if weights.eps is None else weights.eps
    return backbone, load(weights, backbone) + (f"; {remark}" if remark else "")


def load(weights: Weights, backbone: Backbone) -> str:
    """Puts every tensor in its place and says how many there were; position embeddings are resampled to the grid.

    Raises:
        UserError: a tensor is missing, left over, of another shape, or not finite (4).
    """
    wanted = backbone.vit.state_dict()
    given = {k: v for k, v in weights.tensors.items() if k.split(".")[0] not in BEYOND}
    left = {**weights.left}
    for name in weights.tensors.keys() - given.keys():
        left[name.split(".")[0]] = left.get(name.split(".")[0], 0) + 1
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
        raise UserError(
            f"{weights.source} does not fit {backbone.model}: {fitting} of {len(wanted)} tensors fit; "
            f"{'; '.join(problems[:3])}{f' and {len(problems) - 3} more' if len(problems) > 3 else ''}. "
            "Give the --model that they were made with",
            4,
        )
    if bad := [k for k, v in given.items() if v.is_floating_point() and not torch.isfinite(v).all()]:
        raise UserError(f"{weights.source}: {bad[0]} holds NaN or infinite values; the file is damaged", 4)
    backbone.vit.load_state_dict(given, strict=True)
    told = f"{len(wanted)} of {len(wanted)} tensors loaded from {weights.source}"
    if left:
        told += f"; left out: {', '.join(f'{count} of {part}' for part, count in sorted(left.items()))}"
    if weights.eps is not None and weights.eps != (here := eps_of(backbone)):
        told += f"; LayerNorm eps is {weights.eps:g} there and {here:g} here"
    return told


def norms(backbone: Backbone) -> list[nn.LayerNorm]:
    """The LayerNorms of a backbone."""
    return [module for module in backbone.vit.modules() if isinstance(module, nn.LayerNorm)]


def eps_of(backbone: Backbone) -> float:
    """What its LayerNorms add to the variance."""
    return norms(backbone)[0].eps


def _from_timm(spec: str) -> Weights:
    name = spec.removeprefix("timm:")
    try:
        model = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # whatever the hub, the network or the name brings
        told = str(error).split("\n")[0][:200]
        raise UserError(
            f"{spec} could not be fetched: {told}; check the name and the network, or give a file", 4
        ) from None
    config = model.pretrained_cfg
    side = {"img_size": config["input_size"][-1]}
    return Weights(model.state_dict(), spec, name, _normalisation(config["mean"], config["std"]), side)


def _from_run(path: Path, network: str) -> Weights:
    place, problems = checkpoint.newest(path / "checkpoints")
    if place is None:
        raise UserError(f"{path} has no whole checkpoint{': ' + '; '.join(problems) if problems else ' yet'}", 4)
    if problems:
        raise UserError(
            f"{path} is not at its newest state: {'; '.join(problems)}. The newest whole checkpoint is "
            f"{place.name}: to take that one, name it: {place}",
            4,
        )
    return _from_checkpoint(place, network)


def _from_checkpoint(place: Path, network: str) -> Weights:
    try:
        checkpoint.verify(place)
    except checkpoint.Damaged as damage:
        raise UserError(f"{place} is damaged ({damage}); name another checkpoint, or the run", 4) from None
    with checkpoint.understood(place):
        tensors, state = checkpoint.read(place)
        names = [n for n in (network, "student") if any(k.startswith(f"{n}.encoder.") for k in tensors["objective"])]
        start = f"{names[0]}.encoder.vit."  # a method without a teacher has a student alone
        encoder = {k.removeprefix(start): v for k, v in tensors["objective"].items() if k.startswith(start)}
        known = state["encoder"]
        return Weights(
            encoder,
            str(place),
            known["model"],
            _normalisation(*known["normalisation"]),
            known["arguments"],
            pooling=known.get("pooling", "mean"),
        )


def _from_folder(path: Path) -> Weights:
    """An export or timm's own folder (``architecture``), or one of Hugging Face (``model_type``)."""
    try:
        _unchanged(path)
        config = _json(path / "config.json")
        tensors = _tensors(path)
        if "architecture" not in config and "model_type" in config:
            model, arguments, eps, tensors, left = huggingface.read(config, tensors, str(path))
            before = path / "preprocessor_config.json"
            known = _normalisation(*huggingface.normalisation(_json(before))) if before.is_file() else None
            remark = "" if known else "no preprocessor_config.json: images are normalised as for ImageNet"
            return Weights(tensors, str(path), model, known, arguments, eps, left, remark=remark)
        cfg = config.get("pretrained_cfg", config)  # timm's older folders have one level
        arguments = {"img_size": cfg.get("input_size", [3, 224, 224])[-1], **config.get("model_args", {})}
        known = _normalisation(cfg["mean"], cfg["std"]) if "mean" in cfg else None
        allowed = {name for kind in (VisionTransformer, Eva) for name in inspect.signature(kind).parameters}
        if strange := sorted(arguments.keys() - allowed):  # timm would load files and fetch weights for some
            raise UserError(f"{path}: config.json has model_args {strange[0]}, which is no argument of a ViT", 4)
        if isinstance(arguments["img_size"], list):
            (arguments["img_size"],) = set(arguments["img_size"])  # squares alone
        pooling: Literal["mean", "cls"] = "cls" if arguments.get("global_pool") == "token" else "mean"
        return Weights(tensors, str(path), str(config["architecture"]), known, arguments, pooling=pooling)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise UserError(
            f"{path} is no export and no timm or Hugging Face folder ({type(error).__name__}: {error}); it needs "
            "config.json and model.safetensors as these write them",
            4,
        ) from None


def _unchanged(folder: Path) -> None:
    """Raises UserError where a file of an export is not what was written; of others there is nothing to check by."""
    if name := files.changed(folder):
        raise UserError(
            f"{folder} is damaged: {name} was changed or cut short since it was exported ({files.SUMS}); export it "
            f"again, or remove {files.SUMS} if the change was meant",
            4,
        )


def _from_file(path: Path, network: str) -> Weights:
    if path.name == "model.safetensors":
        _unchanged(path.parent)
    if files.changed_since(path):
        raise UserError(
            f"{path} was changed or cut short since {files.sum_of(path).name} was written; get both again, or remove "
            "that one if the change was meant",
            4,
        )
    found = _read(path)
    if isinstance(found, dict) and any("patch_embeddings" in str(key) for key in found):
        raise UserError(f"{path} is of Hugging Face: give the folder that it lies in, with its config.json", 4)
    try:
        normalisation = _beside(found)
        tensors, left, chosen = state_dict.encoder(found, network, str(path))
        model, arguments, remark = state_dict.guess(tensors)
    except UserError:
        raise
    except (IndexError, TypeError, ValueError, RuntimeError) as error:  # tensors of odd shapes
        raise UserError(f"{path} holds no vision transformer: {error}", 4) from None
    source = f"{path} ({chosen})" if chosen else str(path)
    remark += "" if normalisation else "; images normalised as for ImageNet"
    return Weights(tensors, source, model, normalisation, arguments, None, left, True, remark)


def _beside(found: Any) -> Normalisation | None:
    """Takes out what ``gtsa export --to dino`` writes beside the network: mean and deviation of its images."""
    if not isinstance(found, dict) or not all(isinstance(found.get(name), Tensor) for name in ("mean", "std")):
        return None
    return _normalisation(found.pop("mean").tolist(), found.pop("std").tolist())


def _tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder: model.safetensors, or the shards that its index lists."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file() or not index.is_file():
        return dict(_read(folder / "model.safetensors"))
    places: dict[str, str] = _json(index)["weight_map"]
    if outside := [name for name in places.values() if Path(name).name != name or name in ("", "..") or "\\" in name]:
        raise UserError(f"{index} points out of its folder: {outside[0]!r}; shards must lie beside it", 8)
    shards = {name: _read(folder / name) for name in sorted(set(places.values()))}
    listed = set(places.items())
    if strange := listed ^ {(key, name) for name, shard in shards.items() for key in shard}:
        key, name = min(strange)
        raise UserError(f"{index} and {name} do not agree about {key}: get both again", 4)
    return {key: shards[name][key] for key, name in places.items()}


def _read(path: Path) -> Any:
    """What a .safetensors file holds, or a .pth file, read without running anything in it."""
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            # DINO keeps its settings in a Namespace: plain attributes
            warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file", 4) from None
    except Exception as error:  # damaged files and refused pickles raise nearly anything
        raise UserError(
            f"{path} cannot be read as weights, and nothing in it was run ({_why(error)}); get it again, or save its "
            "tensors alone",
            4,
        ) from None


def _why(error: Exception) -> str:
    """What is wrong with a file, without torch's advice: that would run what is in it."""
    told = " ".join(str(error).split())
    if isinstance(error, EOFError):
        return "it is empty or cut short"
    if named := re.search(r"GLOBAL ([\w.]+)", told):
        return f"it holds {named[1]}, which is no tensor"
    if isinstance(error, pickle.UnpicklingError):
        return "it holds more than tensors, or is damaged"
    return f"{type(error).__name__}: {told[:200]}"


def _json(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text())
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} is no dictionary")
    return found


def _normalisation(mean: Any, std: Any) -> Normalisation:
    """Raises ValueError where it is none for three channels."""
    both = tuple(float(value) for value in mean), tuple(float(value) for value in std)
    if not len(both[0]) == len(both[1]) == 3 or not all(map(math.isfinite, both[0])) or not min(both[1]) > 0:
        raise ValueError(f"mean {mean} and deviation {std} are not of three channels")
    return both


def _positions(given: Tensor, wanted: Tensor, backbone: Backbone) -> Tensor:
    """Square position embeddings of another grid, resampled by timm; ones of another width are left to fail."""
    grid = backbone.vit.patch_embed.grid_size
    if given.shape == wanted.shape or given.ndim != 3 or given.shape[-1] != wanted.shape[-1]:
        return given
    prefix = wanted.shape[1] - grid[0] * grid[1]
    side = round(max(0, given.shape[1] - prefix) ** 0.5)
    if side**2 + prefix != given.shape[1]:
        return given
    return resample_abs_pos_embed(given.float(), list(grid), [side, side], num_prefix_tokens=prefix)  # type: ignore[no-any-return]


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"


def load_backbone(source: str, network: str = "teacher", model: str | None = None) -> tuple[Backbone, str]:
    """The encoder that ``source`` names, with its weights, and how many tensors were loaded.

    Args:
        model: timm's name of it, where the source is a bare file that does not say.
    """
    return weights.built(weights.find(source, network), model)
