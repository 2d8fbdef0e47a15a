"""What weights are exported as, and how others open them. The command line knows it without torch."""

from __future__ import annotations

from typing import Literal

from gtsa.core.errors import UserError

Format = Literal["timm", "hf", "dino"]

OPENS = {
    "timm": 'timm.create_model("local-dir:{}", pretrained=True)',
    "hf": 'transformers.ViTModel.from_pretrained("{}", add_pooling_layer=False)',
    "dino": 'torch.load("{}", weights_only=True)["teacher"]',
}
"""How others open what ``gtsa export`` wrote."""

ELSEWHERE = ("timm:", "random:")  # weights that are no path


def no_weights(spec: str) -> UserError:
    return UserError(
        f"{spec}: no weights there; give a run, an export, a timm or Hugging Face folder (config.json and "
        "model.safetensors), a .safetensors or .pth file, or timm:NAME",
        4,
    )
