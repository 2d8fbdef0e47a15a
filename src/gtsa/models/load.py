"""gtsa.load: a backbone with its weights, in one line."""

from __future__ import annotations

from os import PathLike
from typing import Literal

from gtsa.models.backbone import Backbone
from gtsa.models.formats import weights_path
from gtsa.models.weights import load_backbone


def load(
    weights: str | PathLike[str],
    network: Literal["teacher", "student"] = "teacher",
    model: str | None = None,
) -> Backbone:
    """The backbone of any weights, ready to use: on the CPU, in evaluation mode, without gradients.

    >>> backbone = gtsa.load("runs/mine")
    >>> tokens = backbone(backbone.transform("photo.jpg")[None])
    >>> tokens.patches, tokens.prefix, backbone.pooled(tokens)  # [1, h, w, D], [1, p, D], [1, D]

    Args:
        weights: a run, an export, ``timm:NAME``, or other weights (docs/weights.md).
        network: the teacher (as evaluated) or the student, where the weights hold both.
        model: its timm name, where the weights are a bare file that does not name it.

    Returns:
        A torch module: normalised images [N, 3, H, W] -> Tokens. Both sides are multiples of ``patch_size``.

    Raises:
        UserError: there are no such weights, or they are damaged (4).
    """
    backbone, _ = load_backbone(weights_path(weights), network, model)
    return backbone.eval().requires_grad_(False)
