"""Formats of exported weights, and the code that opens them. Imports no torch: the command line reads this."""

from __future__ import annotations

import os
from typing import Literal

from gtsa.core.errors import UserError

Format = Literal["timm", "hf", "dino", "onnx"]

OPENS = {
    "timm": 'timm.create_model("local-dir:{}", pretrained=True)',
    "hf": 'transformers.ViTModel.from_pretrained("{}", add_pooling_layer=False)',
    "dino": 'torch.load("{}", weights_only=True)["teacher"]',
    "onnx": 'onnxruntime.InferenceSession("{}", providers=["CPUExecutionProvider"])',
}
"""The code that opens an export, by format."""
FILES = ("dino", "onnx")  # formats that are one file; the others are folders

ELSEWHERE = ("timm:", "random:")  # prefixes of weights that are no path


def weights_path(weights: object, name: str = "weights") -> str:
    """Weights as text. Raises UserError (2) for what is neither text nor a path.

    Args:
        name: of the argument.
    """
    path = os.fspath(weights) if isinstance(weights, os.PathLike) else weights
    if not isinstance(path, str) or not path:
        raise UserError(
            f"{name}: {weights!r:.80} names no weights; give the path of a run, an export or a file of weights, "
            "or timm:NAME"
        )
    return path


def no_weights(spec: str) -> UserError:
    return UserError(
        f"{spec}: no weights there; give a run, an export, a timm or Hugging Face folder (config.json and "
        "model.safetensors), a .safetensors or .pth file, or timm:NAME",
        4,
    )
