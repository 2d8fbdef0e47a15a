"""Where an evaluation runs: device, seed, batch size, workers, and who receives its predictions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NotRequired, TypedDict

import torch
from lightning_fabric import Fabric
from torch import Tensor

from gtsa.data.images.pixels import Range
from gtsa.evaluation.token_cache import TokenCache

Pooling = Literal["mean", "cls", "both"]


class RunLengths(TypedDict):
    """A mask in COCO's run lengths, compressed."""

    size: list[int]  # height, width
    counts: str


class DetectedObject(TypedDict):
    """A detection as COCO's result dictionary, px of the image file."""

    image_id: int
    category_id: int
    bbox: list[float]  # x, y, width, height
    score: float
    segmentation: NotRequired[RunLengths]


Prediction = Tensor | list[DetectedObject]  # class scores [C], a map of class ids [H, W], or the detections of an image


def _ignore(index: int, prediction: Prediction) -> None:
    return None


@dataclass
class EvalContext:
    """Where an evaluation runs.

    Attributes:
        fabric: the engine; the backbone is on ``fabric.device``.
        tokens: how one vector per image is pooled: the mean of the patch tokens (GTSA trains no CLS token), the CLS
            token, or both side by side.
        seed: determines every random draw.
        batch_size: images per forward pass of the frozen backbone.
        workers: processes that read images.
        folder: where a long training writes its checkpoints; None: it writes none.
        on_prediction: called with (index in ``val``, prediction) for every prediction; for --predictions.
        compile: auto, on or off: whether the steps of a training are compiled (``core.compilation.resolve``).
        range16: values of 16-bit images that become black and white; None: as in the training of the weights.
        cache: patch tokens that are known; None: the network is run again for every task.
    """

    fabric: Fabric
    tokens: Pooling = "mean"
    seed: int = 0
    batch_size: int = 32
    workers: int = 0
    folder: Path | None = None
    on_prediction: Callable[[int, Prediction], None] = _ignore
    range16: Range | None = None
    compile: str = "off"
    cache: TokenCache | None = None

    @property
    def device(self) -> torch.device:
        return self.fabric.device
