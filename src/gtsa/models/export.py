"""gtsa export: the trained encoder as others can open it."""

from __future__ import annotations

import errno
import glob
import inspect
import io
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor

from gtsa.core import files
from gtsa.core.errors import UserError
from gtsa.models import huggingface, weights
from gtsa.models.backbone import Backbone
from gtsa.models.formats import Format
from gtsa.models.weights import load_backbone


def export(
    source: str,
    out: str,
    to: Format = "timm",
    network: Literal["teacher", "student"] = "teacher",
    model: str | None = None,
) -> Path:
    """Writes the encoder of a run as others can open it, with the same numbers.

    Args:
        source: a run, an export folder, or other weights (docs/weights.md).
        out: folder to make, or file for ``dino``; it must not exist, or be an empty folder.
        to: what can open it: ``timm`` (the model's own output is then the vector that was trained: the mean of its
            patch tokens, and the CLS token after DINO and iBOT), ``hf`` (a ViTModel of Hugging Face's transformers,
            without its pooler; plain ViTs alone), ``dino`` (a .pth file of tensors under ``teacher``, with timm's names
            behind ``backbone.``; mean and deviation of its images lie beside, as ``mean`` and ``std``). Checksums lie
            beside all of them, which are checked when gtsa reads them again.
        network: where there are both, the teacher (as evaluated) or the student.
        model: timm's name of it, where the source is a bare file that does not say.

    Raises:
        UserError: the weights are not whole, or what is to open them cannot hold them (4); the place is taken (2).
    """
    place, kind = Path(out), "file" if to == "dino" else "folder"
    if place.exists() and (not place.is_dir() or to == "dino" or any(place.iterdir())):
        raise UserError(f"--out {out} is there already; give another {kind}, or remove it first")
    if place.is_symlink():
        place = place.resolve()  # an empty folder on another disk
    backbone, _ = load_backbone(source, network, model)
    try:
        if to == "hf":
            config, tensors, preprocessor = huggingface.written(backbone)
            described = {"config.json": config, "preprocessor_config.json": preprocessor}
            return _folder(place, tensors, described)
        _same_eps(backbone)
        if to == "dino":
            place.parent.mkdir(parents=True, exist_ok=True)
            return _file(place, backbone)
        return write(backbone, place, _name(source))
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}; give another {kind}", 6) from None


def write(backbone: Backbone, place: Path, name: str = "scenes") -> Path:
    """Writes a folder that timm opens, ``config.json`` and ``model.safetensors``, or nothing."""
    return _folder(place, _tensors(backbone), {"config.json": timm_config(backbone, name)})


def _tensors(backbone: Backbone) -> dict[str, Tensor]:
    return {k: v.detach().float().cpu().contiguous() for k, v in backbone.vit.state_dict().items()}


def _folder(place: Path, tensors: dict[str, Tensor], described: dict[str, dict[str, Any]]) -> Path:
    contents = {name: (json.dumps(config, indent=2) + "\n").encode() for name, config in described.items()}
    contents["model.safetensors"] = safetensors.torch.save(tensors, metadata={"format": "pt"})
    draft = files.draft_of(place)
    shutil.rmtree(draft, ignore_errors=True)
    files.clear_drafts(place.parent, glob.escape(place.name))
    try:
        draft.mkdir(parents=True)
        _fill(draft, contents)
        _put(draft, place)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return place


def _fill(folder: Path, contents: Mapping[str, bytes]) -> None:
    digests = {name: files.write(folder / name, data) for name, data in contents.items()}
    files.write(folder / files.SUMS, files.sealed(files.sums(digests)).encode())
    files.flush(folder)


def _put(draft: Path, place: Path) -> None:
    """Makes a finished folder the one at ``place``; of a folder that is there already, files of others stay."""
    try:
        draft.rename(place)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        for file in sorted(draft.iterdir(), key=lambda file: file.name == files.SUMS):  # last, when they are true
            file.replace(place / file.name)
        draft.rmdir()
        files.flush(place)
    files.flush(place.parent)


def _file(place: Path, backbone: Backbone) -> Path:
    state = {f"backbone.{name}": tensor for name, tensor in _tensors(backbone).items()}
    held = io.BytesIO()
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in backbone.normalisation)
    torch.save({"teacher": state, "mean": mean, "std": std}, held)
    files.clear_drafts(place.parent, glob.escape(place.name))
    files.store(place, held.getvalue())
    files.store(files.sum_of(place), files.sums({place.name: files.digest(place)}).encode())
    return place


def _same_eps(backbone: Backbone) -> None:
    """Raises UserError where timm would open the model with another eps in its LayerNorms."""
    with torch.device("meta"):
        usual = weights.eps_of(Backbone(backbone.model, arguments=backbone.arguments))
    if (here := weights.eps_of(backbone)) != usual:
        raise UserError(
            f"its LayerNorms have an eps of {here:g}, those of timm's {backbone.model} {usual:g}, and neither a timm "
            "folder nor a .pth file can say so: the features would differ. Use --to hf",
            4,
        )


def timm_config(backbone: Backbone, name: str) -> dict[str, Any]:
    """timm's description of the encoder, whose ``model(x)`` is the vector that was trained."""
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
        "model_args": {**backbone.arguments, "global_pool": pool, no_norm: False},
        "pretrained_cfg": {
            "tag": f"gtsa_{name}",
            "custom_load": False,
            "input_size": [3, side, side],
            "fixed_input_size": False,
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "crop_mode": "center",
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
