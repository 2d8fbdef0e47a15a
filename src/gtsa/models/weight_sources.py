"""Reads the weights of an encoder from each kind of place: runs, checkpoints, folders, files, timm."""

from __future__ import annotations

import argparse
import inspect
import json
import pickle
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from gtsa.core import files
from gtsa.core.errors import UserError
from gtsa.data.images.pixels import Range
from gtsa.models import huggingface, published, state_dict
from gtsa.models.backbone import Backbone
from gtsa.models.formats import no_weights
from gtsa.models.transform import FULL_RANGE, Normalisation, parse_normalisation, parse_range16
from gtsa.training import checkpoint


@dataclass
class Weights:
    """Tensors of an encoder under timm's names, and what its source says of it."""

    tensors: dict[str, Tensor]
    source: str
    model: str | None = None
    normalisation: Normalisation | None = None
    arguments: dict[str, Any] = field(default_factory=dict)  # of timm's constructor
    eps: float | None = None  # of its LayerNorms; None: timm's default for the model
    left: dict[str, int] = field(default_factory=dict)  # tensors of other parts than the encoder, counted by part
    guessed: bool = False  # model and arguments are inferred from the tensors alone
    remark: str = ""  # how the model was inferred, or why it could not be
    pooling: Literal["mean", "cls"] = "mean"  # how tokens become one vector an image
    range16: Range = FULL_RANGE  # of the images in training
    network: str = ""  # "EMA teacher" or "student" of a run


def read_weights(spec: str, network: str = "teacher") -> Weights:
    """Reads the weights that ``spec`` names.

    Args:
        spec: a run or one of its checkpoints, an export, a folder of timm or of a Hugging Face ViT, a .safetensors or
            DINO-style .pth file, timm:NAME, random:NAME (docs/weights.md).
        network: ``teacher`` or ``student``, where the source has both.

    Raises:
        UserError: the weights are missing or invalid (4), or an index points out of its folder (8).
    """
    if network not in ("teacher", "student"):
        raise UserError(f"--network {network}: choose from teacher, student")
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


def check_present(spec: str) -> None:
    """Raises UserError (4) where there is nothing at ``spec``. No weights are read."""
    if spec.startswith("timm:"):
        published.check_reachable(spec)
    elif not spec.startswith("random:") and not Path(spec).exists():
        raise no_weights(spec)


def _from_timm(spec: str) -> Weights:
    model = published.fetch(spec)
    config: dict[str, Any] = model.pretrained_cfg
    arguments = {"img_size": config["input_size"][-1]}
    name = spec.removeprefix("timm:")
    return Weights(model.state_dict(), spec, name, parse_normalisation(config["mean"], config["std"]), arguments)


# Runs and checkpoints


def _from_run(path: Path, network: str) -> Weights:
    newest, problems = checkpoint.newest(path / "checkpoints")
    if newest is None:
        raise UserError(f"{path} has no whole checkpoint{': ' + '; '.join(problems) if problems else ' yet'}", 4)
    if problems:
        raise UserError(
            f"{path}: its newest checkpoint cannot be used: {'; '.join(problems)}. The newest whole checkpoint is "
            f"{newest.name}; to use it, give {newest}",
            4,
        )
    return _from_checkpoint(newest, network)


def _from_checkpoint(folder: Path, network: str) -> Weights:
    try:
        checkpoint.verify(folder)
    except checkpoint.Damaged as damage:
        raise UserError(f"{folder} is damaged ({damage}); give another checkpoint, or the run", 4) from None
    with checkpoint.understood(folder):
        tensors, state = checkpoint.read(folder)
        names = [n for n in (network, "student") if any(k.startswith(f"{n}.encoder.") for k in tensors["objective"])]
        prefix = f"{names[0]}.encoder.vit."  # a method without a teacher has a student alone
        encoder = {k.removeprefix(prefix): v for k, v in tensors["objective"].items() if k.startswith(prefix)}
        config = state["encoder"]
        return Weights(
            encoder,
            str(folder),
            config["model"],
            parse_normalisation(*config["normalisation"]),
            config["arguments"],
            pooling=config.get("pooling", "mean"),
            range16=parse_range16(state.get("settings", {})),
            network="EMA teacher" if names[0] == "teacher" else "student",
        )


# Folders with a config.json


def _from_folder(path: Path) -> Weights:
    """An export or a folder of timm (``architecture``), or one of Hugging Face (``model_type``)."""
    try:
        _check_sums(path)
        config = _read_json(path / "config.json")
        tensors = _read_tensors(path)
        if "architecture" not in config and "model_type" in config:
            return _from_hugging_face(path, config, tensors)
        return _from_timm_folder(path, config, tensors)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise UserError(
            f"{path} is no export and no timm or Hugging Face folder ({type(error).__name__}: {error}); it needs "
            "config.json and model.safetensors as these write them",
            4,
        ) from None


def _from_hugging_face(path: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Weights:
    read = huggingface.read(config, tensors, str(path))
    preprocessor = path / "preprocessor_config.json"
    values: dict[str, Any] = {}
    normalisation = None
    remark = "no preprocessor_config.json: images are normalised as for ImageNet"
    if preprocessor.is_file():
        values = _read_json(preprocessor)
        normalisation = parse_normalisation(*huggingface.normalisation(values))
        remark = ""
    return Weights(
        read.tensors, str(path), read.model, normalisation, read.arguments, read.eps, read.left, remark=remark,
        range16=parse_range16(values),
    )  # fmt: skip


def _from_timm_folder(path: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Weights:
    cfg = config.get("pretrained_cfg", config)  # timm's older folders have one level
    arguments = {"img_size": cfg.get("input_size", [3, 224, 224])[-1], **config.get("model_args", {})}
    normalisation = parse_normalisation(cfg["mean"], cfg["std"]) if "mean" in cfg else None
    allowed = {name for kind in (VisionTransformer, Eva) for name in inspect.signature(kind).parameters}
    if unknown := sorted(arguments.keys() - allowed):  # timm would load files and fetch weights for some
        raise UserError(f"{path}: config.json has model_args {unknown[0]}, which is no argument of a ViT", 4)
    if isinstance(arguments["img_size"], list):
        (arguments["img_size"],) = set(arguments["img_size"])  # squares alone
    pooling: Literal["mean", "cls"] = "cls" if arguments.get("global_pool") == "token" else "mean"
    return Weights(
        tensors, str(path), str(config["architecture"]), normalisation, arguments, pooling=pooling,
        range16=parse_range16(config),
    )  # fmt: skip


def _check_sums(folder: Path) -> None:
    """Raises UserError where a file of an export has changed. Folders without checksums are not checked."""
    if name := files.find_changed_file(folder):
        raise UserError(
            f"{folder} is damaged: {name} was changed or cut short since it was exported ({files.SUMS}); export it "
            f"again, or remove {files.SUMS} if you changed it on purpose",
            4,
        )


# Files


def _from_file(path: Path, network: str) -> Weights:
    if path.suffix == ".onnx":
        raise UserError(f"{path}: gtsa does not read ONNX files; give the run, or a timm export of it", 4)
    if path.name == "model.safetensors":
        _check_sums(path.parent)
    if files.is_changed(path):
        checksum = files.sum_of(path).name
        raise UserError(
            f"{path} was changed or cut short since {checksum} was written; get both again, or remove {checksum} if "
            "you changed the file on purpose",
            4,
        )
    content = _read_file(path)
    if isinstance(content, dict) and any("patch_embeddings" in str(key) for key in content):
        raise UserError(f"{path} is of Hugging Face: give the folder that it lies in, with its config.json", 4)
    try:
        normalisation, range16 = _pop_preparation(content)
        tensors, left, chosen = state_dict.encoder(content, network, str(path))
        model, arguments, remark = state_dict.guess(tensors)
    except UserError:
        raise
    except (IndexError, TypeError, ValueError, RuntimeError) as error:  # tensors of odd shapes
        raise UserError(f"{path} holds no vision transformer: {error}", 4) from None
    source = f"{path} ({chosen})" if chosen else str(path)
    remark += "" if normalisation else "; images normalised as for ImageNet"
    return Weights(tensors, source, model, normalisation, arguments, None, left, True, remark, range16=range16)


def _pop_preparation(content: object) -> tuple[Normalisation | None, Range]:
    """Takes out mean, deviation and range of the images, which ``gtsa export --to dino`` writes beside the network."""
    if not isinstance(content, dict) or not all(isinstance(content.get(name), Tensor) for name in ("mean", "std")):
        return None, FULL_RANGE
    values = {name: content.pop(name).tolist() for name in ("mean", "std", "range16") if name in content}
    return parse_normalisation(values["mean"], values["std"]), parse_range16(values)


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder: model.safetensors, or the shards that its index lists."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file() or not index.is_file():
        return dict(_read_file(folder / "model.safetensors"))
    shard_of: dict[str, str] = _read_json(index)["weight_map"]
    if outside := [name for name in shard_of.values() if Path(name).name != name or name in ("", "..") or "\\" in name]:
        raise UserError(f"{index} points out of its folder: {outside[0]!r}; shards must lie beside it", 8)
    shards = {name: _read_file(folder / name) for name in sorted(set(shard_of.values()))}
    held = {(key, name) for name, shard in shards.items() for key in shard}
    if different := held ^ set(shard_of.items()):
        key, name = min(different)
        raise UserError(f"{index} and {name} do not agree about {key}: get both again", 4)
    return {key: shards[name][key] for key, name in shard_of.items()}


def _read_file(path: Path) -> Any:
    """The content of a .safetensors or .pth file. Nothing in it is run."""
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
            f"{path} cannot be read as weights, and nothing in it was run ({_reason(error)}); get it again, or save "
            "its tensors alone",
            4,
        ) from None


def _reason(error: Exception) -> str:
    """What is wrong with a file. torch's advice is left out: it would run the content."""
    text = " ".join(str(error).split())
    if isinstance(error, EOFError):
        return "it is empty or cut short"
    if refused := re.search(r"GLOBAL ([\w.]+)", text):
        return f"it holds {refused[1]}, which is no tensor"
    if isinstance(error, pickle.UnpicklingError):
        return "it holds more than tensors, or is damaged"
    return f"{type(error).__name__}: {text[:200]}"


def _read_json(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text())
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} is no dictionary")
    return content
