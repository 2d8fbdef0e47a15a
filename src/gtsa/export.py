"""gtsa export: the trained encoder as others can open it."""

from __future__ import annotations

import inspect
import json
import os
import shutil
from pathlib import Path
from typing import Any, Literal

import safetensors.torch

from gtsa import weights
from gtsa.backbone import Backbone
from gtsa.core import Remedy


def export(
    source: str, out: str, to: Literal["timm"] = "timm", network: Literal["teacher", "student"] = "teacher"
) -> Path:
    """Writes the encoder of a run as a folder that others can open.

    It opens with ``timm.create_model("local-dir:FOLDER", pretrained=True)``. The model's own output is the mean of its
    patch tokens: GTSA trains no CLS token.

    Args:
        source: a run, an export folder, or other weights as for --init of a known model.
        out: folder to make; it must not exist or be empty.
        to: what can open it.
        network: of a run, the teacher (as evaluated) or the student.

    Raises:
        Remedy: the weights are not whole (4), or the folder holds something (2).
    """
    place = Path(out)
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise Remedy(f"--out {out} is there already; give another folder, or remove it first")
    backbone, _ = opened(source, network)
    try:
        return write(backbone, place, _name(source))
    except OSError as error:
        raise Remedy(f"--out {out} cannot be written: {error.strerror}; give another folder", 6) from None


def opened(source: str, network: str = "teacher", model: str | None = None) -> tuple[Backbone, str]:
    """The encoder that ``source`` names, with its weights, and how many tensors were loaded.

    Args:
        model: timm's name of it, where the source is a bare file that does not say.
    """
    found = weights.find(source, network)
    name = model or found.model
    if name is None:
        raise Remedy(f"{source} does not say which model it is; name it with --model", 4)
    arguments = {k: v for k, v in (found.arguments or {}).items() if k not in ("img_size", "num_classes", *EXPORTED)}
    size = (found.arguments or {}).get("img_size", 224)
    normalisation = {"normalisation": found.normalisation} if found.normalisation else {}
    backbone = Backbone(name, size, arguments=arguments, **normalisation)  # type: ignore[arg-type]
    return backbone, weights.load(found, backbone)


EXPORTED = ("global_pool", "fc_norm", "use_fc_norm")


def write(backbone: Backbone, place: Path, name: str = "scenes") -> Path:
    """Writes ``config.json`` and ``model.safetensors``, or nothing."""
    draft = place.with_name(f".{place.name}.{os.getpid()}")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    tensors = {k: v.detach().float().cpu().contiguous() for k, v in backbone.vit.state_dict().items()}
    safetensors.torch.save_file(tensors, draft / "model.safetensors", metadata={"format": "pt"})
    (draft / "config.json").write_text(json.dumps(timm_config(backbone, name), indent=2) + "\n")
    if place.exists():
        shutil.rmtree(place)
    draft.rename(place)
    return place


def timm_config(backbone: Backbone, name: str) -> dict[str, Any]:
    """timm's description of the encoder, whose ``model(x)`` is the mean of the patch tokens."""
    parameters = inspect.signature(type(backbone.vit)).parameters
    no_norm = "fc_norm" if "fc_norm" in parameters else "use_fc_norm"  # keys stay: the norm is the encoder's own
    side = backbone.arguments["img_size"]
    mean, std = backbone.normalisation
    return {
        "architecture": backbone.model.split(".")[0],
        "num_classes": 0,
        "num_features": backbone.width,
        "global_pool": "avg",
        "model_args": {**backbone.arguments, "global_pool": "avg", no_norm: False},
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
