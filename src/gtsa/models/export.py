"""gtsa export: writes the trained encoder in formats that other libraries open."""

from __future__ import annotations

import errno
import glob
import inspect
import io
import json
import os
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor

from gtsa.core import files
from gtsa.core.errors import UserError
from gtsa.models import huggingface, onnx
from gtsa.models.backbone import Backbone
from gtsa.models.card import CARD, Origin, is_unchanged, model_card, origin_of
from gtsa.models.formats import FILES, Format, weights_path
from gtsa.models.transform import CROP_MODE, CROP_PCT, INTERPOLATION
from gtsa.models.weight_sources import read_weights
from gtsa.models.weights import build_backbone, eps_of


def export(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    to: Format = "timm",
    network: Literal["teacher", "student"] = "teacher",
    model: str | None = None,
) -> Path:
    """Writes the encoder of a run in a format that other libraries open. Its features stay the same.

    Args:
        source: a run, an export folder, or other weights (docs/weights.md).
        out: folder to write, or file for ``dino`` and ``onnx``; it must not exist, or be an empty folder.
        to: the format: ``timm`` (the model's own output is then the vector that was trained: the mean of its
            patch tokens, and the CLS token after DINO and iBOT), ``hf`` (a ViTModel of Hugging Face's transformers,
            without its pooler; plain ViTs alone), ``dino`` (a .pth file of tensors under ``teacher``, with timm's names
            behind ``backbone.``, and ``mean``, ``std`` and ``range16`` of the images), ``onnx`` (a graph for
            any batch and image size, compared with PyTorch before it is written). Checksums and a model card are
            written beside each; gtsa checks the checksums when it reads the export.
        network: the teacher (as evaluated) or the student, where the source has both.
        model: its timm name, where the source is a bare file that does not name it.

    Raises:
        UserError: the weights are damaged, or the format cannot hold them (4); ``out`` exists already, or the
            libraries of the format are missing (2).
    """
    spec = weights_path(source)
    if to == "onnx":
        onnx.check_installed()
    path = _check_out(Path(out), to)
    weights = read_weights(spec, network)
    backbone, _ = build_backbone(weights, model)
    card = model_card(backbone, to, path.name, origin_of(spec, weights.source, weights.network))
    try:
        if to == "hf":
            config, tensors, preprocessor = huggingface.convert(backbone)
            configs = {"config.json": config, "preprocessor_config.json": preprocessor}
            return _write_folder(path, tensors, configs, card)
        if to == "onnx":
            return _write_file(path, onnx.convert(backbone, _properties(backbone))[0], card)
        _check_eps(backbone)
        if to == "dino":
            return _write_file(path, _dino_file(backbone), card)
        return _write_folder(path, _tensors(backbone), {"config.json": timm_config(backbone, _name(spec))}, card)
    except OSError as error:
        raise _not_writable(out, to, error) from None


def _check_out(path: Path, to: Format) -> Path:
    """Where to write. Raises UserError where ``path`` exists (2) or cannot be written (6)."""
    try:
        if path.exists() and (not path.is_dir() or to in FILES or any(path.iterdir())):
            raise UserError(f"--out {path} exists already; give another {_kind(to)}, or remove it first")
        if path.is_symlink():
            path = path.resolve()  # an empty folder on another disk
        files.check_writable(path)
    except OSError as error:
        raise _not_writable(path, to, error) from None
    return path


def _not_writable(out: str | os.PathLike[str], to: Format, error: OSError) -> UserError:
    return UserError(f"--out {out} cannot be written: {error.strerror or error}; give another {_kind(to)}", 6)


def _kind(to: Format) -> str:
    return "file" if to in FILES else "folder"


def write(
    backbone: Backbone, path: Path, name: str = "scenes", origin: Origin | None = None, half: bool = False
) -> Path:
    """Writes a folder that timm opens, with ``config.json`` and ``model.safetensors``. If it fails, nothing is left.

    Args:
        origin: where the weights come from, for the model card.
        half: round the weights to half precision, for half the bytes.
    """
    card = model_card(backbone, "timm", path.name, origin or Origin(name))
    tensors = _tensors(backbone)
    if half:
        tensors = {key: value.half() if value.is_floating_point() else value for key, value in tensors.items()}
    return _write_folder(path, tensors, {"config.json": timm_config(backbone, name)}, card)


def _tensors(backbone: Backbone) -> dict[str, Tensor]:
    return {k: v.detach().float().cpu().contiguous() for k, v in backbone.vit.state_dict().items()}


def _write_folder(path: Path, tensors: dict[str, Tensor], configs: dict[str, dict[str, Any]], card: str) -> Path:
    contents = {name: (json.dumps(config, indent=2) + "\n").encode() for name, config in configs.items()}
    contents["model.safetensors"] = safetensors.torch.save(tensors, metadata={"format": "pt"})
    draft = files.draft_of(path)
    shutil.rmtree(draft, ignore_errors=True)
    files.clear_drafts(path.parent, glob.escape(path.name))
    try:
        draft.mkdir(parents=True)
        _write_contents(draft, contents)
        if _may_replace(path / CARD):
            files.write(draft / CARD, card.encode())
        _move(draft, path)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return path


def _write_contents(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Files and their checksums. The card has none: its reader is to name a licence in it."""
    digests = {name: files.write(folder / name, data) for name, data in contents.items()}
    files.write(folder / files.SUMS, files.sealed(files.sums(digests)).encode())
    files.flush(folder)


def _may_replace(card: Path) -> bool:
    """Whether a card may be written: there is none, or one that nobody changed."""
    try:
        return not card.exists() or is_unchanged(card.read_text())
    except (OSError, ValueError):
        return False


def _move(draft: Path, path: Path) -> None:
    """Moves a finished folder to ``path``. Other files of an existing folder are kept."""
    try:
        draft.rename(path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        for file in sorted(draft.iterdir(), key=lambda file: file.name == files.SUMS):  # checksums last
            file.replace(path / file.name)
        draft.rmdir()
        files.flush(path)
    files.flush(path.parent)


def _write_file(path: Path, data: bytes, card: str) -> Path:
    """A file, with its checksum and its card beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.clear_drafts(path.parent, glob.escape(path.name))
    beside = path.with_name(f"{path.name}.md")
    try:
        files.store(path, data)
        files.store(files.sum_of(path), files.sums({path.name: files.digest(path)}).encode())
        if _may_replace(beside):
            files.store(beside, card.encode())
    except BaseException:  # else the same command would be refused, as its file exists
        for file in (path, files.sum_of(path)):
            file.unlink(missing_ok=True)
        raise
    return path


def _dino_file(backbone: Backbone) -> bytes:
    state = {f"backbone.{name}": tensor for name, tensor in _tensors(backbone).items()}
    buffer = io.BytesIO()
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in backbone.normalisation)
    range16 = torch.tensor(backbone.range16, dtype=torch.float64)
    torch.save({"teacher": state, "mean": mean, "std": std, "range16": range16}, buffer)
    return buffer.getvalue()


def _properties(backbone: Backbone) -> dict[str, str]:
    """What an ONNX file says of itself (``metadata_props``): how images are prepared, and which weights these are."""
    mean, std = backbone.normalisation
    values = {
        "model": backbone.model,
        "image_size": backbone.arguments["img_size"],
        "patch_size": backbone.patch_size,
        "pooling": backbone.pooling,
        "mean": list(mean),
        "std": list(std),
        "range16": list(backbone.range16),
        "fingerprint": backbone.fingerprint,
        "gtsa_version": version("gtsa"),
    }
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}


def _check_eps(backbone: Backbone) -> None:
    """Raises UserError (4) where timm would open the model with another eps in its LayerNorms."""
    with torch.device("meta"):
        usual = eps_of(Backbone(backbone.model, arguments=backbone.arguments))
    if (eps := eps_of(backbone)) != usual:
        raise UserError(
            f"its LayerNorms have an eps of {eps:g}, those of timm's {backbone.model} {usual:g}, and neither a timm "
            "folder nor a .pth file can say so: the features would differ. Use --to hf",
            4,
        )


def timm_config(backbone: Backbone, name: str) -> dict[str, Any]:
    """timm's config.json of the encoder. With it ``model(x)`` is the pooled vector that was trained."""
    parameters = inspect.signature(type(backbone.vit)).parameters
    no_norm = "fc_norm" if "fc_norm" in parameters else "use_fc_norm"  # keys stay: the norm is the encoder's own
    side = backbone.arguments["img_size"]
    mean, std = backbone.normalisation
    pool = "token" if backbone.pooling == "cls" else "avg"
    return {
        "architecture": backbone.model.split(".")[0],
        "num_classes": 0,
        "num_features": backbone.embed_dim,
        "global_pool": pool,
        "range16": list(backbone.range16),  # timm ignores it; in its pretrained_cfg it would refuse it
        "model_args": {**backbone.arguments, "global_pool": pool, no_norm: False, "dynamic_img_size": True},
        "pretrained_cfg": {
            "tag": f"gtsa_{name}",
            "custom_load": False,
            "input_size": [3, side, side],
            "fixed_input_size": False,
            "interpolation": INTERPOLATION,
            "crop_pct": CROP_PCT,
            "crop_mode": CROP_MODE,
            "mean": list(mean),
            "std": list(std),
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def _name(source: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in Path(source).resolve().name)[:40] or "scenes"
