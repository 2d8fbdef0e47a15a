"""Do the features find the same content when it is rotated? Dense retrieval for rotated queries, and equivariance."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from gtsa.core.errors import UserError
from gtsa.data.labels import Labelled
from gtsa.evaluation import dense
from gtsa.evaluation.context import EvalContext
from gtsa.evaluation.evaluator import Evaluator, PerImage
from gtsa.evaluation.features import whole_patches
from gtsa.evaluation.retrieval import build_memory
from gtsa.evaluation.ridge import Fit, predict
from gtsa.evaluation.rotated import TURNS, classify, cosines, rotated_tokens, turned_back
from gtsa.models.backbone import Encoder

TINY = 1e-30  # of tokens that are all alike
FITTED = 128  # training images on which the linear maps are fitted, at most


class Orientation(Evaluator):
    """Masks are retrieved for images rotated by 0, 90, 180 and 270 degrees, from a memory of upright training images.

    * mIoU: the mean over the four angles; each angle alone; drop: that of 0 degrees less the mean of the other three.
    * cosine turned back: between the features of the rotated image, rotated back, and those of the upright one. as it
      lies: at the same position, before it is rotated back. at random: of any two positions.
    * equivariance error: (1 - turned back) / (1 - at random). 0: the map rotates with the image, and its features stay
      the same; 1: they are no more alike than those of two random positions.
    * linear R2: share of the variance of the features of the rotated image, rotated back, that is linear in those of
      the upright image, with a map for each angle fitted on training images. Near 1 with an error above 0: the features
      change with the rotation, but in a fixed way (equivariant features). Low: they tell something else.

    The rotation is exact.

    Args:
        k: number of neighbours of a patch.
        temperature: a neighbour weighs softmax(cosine similarity / temperature).
        memory: largest number of training patches in the memory, a random choice spread over the images.
        size: side of the square that images are resized to, px.
    """

    label_kinds = ("masks",)
    other_metrics: ClassVar[Mapping[str, str]] = {
        "cosine turned back": "cosine similarity",
        "cosine as it lies": "cosine similarity",
        "cosine at random": "cosine similarity",
        "equivariance error": "0: features stay the same, 1: as different as at random positions",
        "linear R2": "share of the variance; 1: all of it",
    }

    def __init__(self, k: int = 30, temperature: float = 0.02, memory: int = 10_240, size: int = 512) -> None:
        if min(k, memory, size) < 1 or temperature <= 0:
            raise UserError("orientation: k, memory and size must be at least 1 and the temperature above 0")
        self.k, self.temperature, self.memory, self.size = k, temperature, memory, size

    def __call__(self, backbone: Encoder, train: Labelled, val: Labelled, context: EvalContext) -> PerImage:
        if len(train) < 2:
            raise UserError("orientation: one training image is too few: another one must choose the ridge penalty")
        size = whole_patches(self.size, backbone)
        score = partial(
            build_memory(backbone, train, context, size, self.memory), k=self.k, temperature=self.temperature
        )
        linear = self._fit(backbone, train, context, size)
        counts: list[dict[str, Tensor]] = []
        results: dict[str, list[Tensor]] = {}
        for scenes, maps in rotated_tokens(backbone, val, context, size):
            for predicted, of_scene in classify(score, scenes, maps, val):
                context.on_prediction(len(counts), dense.as_map(predicted, len(val.classes)))
                counts.append(of_scene)
            for name, values in (cosines(maps) | _linear_errors(maps, *linear)).items():
                results.setdefault(name, []).append(values.double().cpu())
        return dense.stack_counts(counts, val) | {name: torch.cat(values) for name, values in results.items()}

    def metrics(self, per_image: PerImage) -> dict[str, float]:
        angles = {f"mIoU {90 * turns}": _miou_at(per_image, turns) for turns in TURNS}
        upright, *rotated = angles.values()
        lies, back, random = (
            float(per_image[name].double().mean()) for name in ("as it lies", "turned back", "at random")
        )
        unexplained, total = (per_image[name].double().sum() for name in ("linear error", "linear squares"))
        return {
            "mIoU": sum(angles.values()) / len(angles),
            **angles,
            "drop": upright - sum(rotated) / len(rotated),
            "cosine turned back": back,
            "cosine as it lies": lies,
            "cosine at random": random,
            "equivariance error": (1 - back) / (1 - random) if random < 1 else 0.0,
            "linear R2": 1 - float(unexplained / total.clamp(min=TINY)),
        }

    def per_class(self, per_image: PerImage) -> dict[str, list[float]]:
        """Of the pixels of all four rotations."""
        return dense.per_class({name: per_image[name].flatten(0, 1) for name in ("hit", "predicted", "true")})

    def _fit(self, backbone: Encoder, train: Labelled, context: EvalContext, size: int) -> tuple[list[Tensor], Tensor]:
        """For each angle but 0 a linear map [D + 1, D] of upright to rotated tokens, and the mean of these [3, D]."""
        some = train.take(torch.linspace(0, len(train) - 1, min(FITTED, len(train))).long().tolist())
        fits = [Fit(context.device) for _ in TURNS[1:]]
        sums = torch.zeros(len(fits), backbone.embed_dim, dtype=torch.float64, device=context.device)
        patches = 0
        for _, (upright, *rotated) in rotated_tokens(backbone, some, context, size):
            patches += upright[..., 0].numel()
            for number, (fit, view) in enumerate(zip(fits, rotated, strict=True)):
                target = turned_back(view, number + 1).flatten(1, 2)
                fit.add(upright.flatten(1, 2), target)
                sums[number] += target.double().sum((0, 1))
        return [fit.solve() for fit in fits], sums / patches


def _miou_at(per_image: PerImage, turns: int) -> float:
    return dense.metrics({key: per_image[key][:, turns] for key in dense.COUNTS if key in per_image})["mIoU"]


def _linear_errors(maps: list[Tensor], linear: list[Tensor], means: Tensor) -> PerImage:
    """Squared errors of the predicted tokens, and squared distances from their mean, summed over each image."""
    upright, *rotated = maps
    error, squares = (torch.zeros(len(upright), dtype=torch.float64, device=upright.device) for _ in range(2))
    for turns, (view, weights, mean) in enumerate(zip(rotated, linear, means, strict=True), start=1):
        target = turned_back(view, turns).double()
        error += (predict(upright, weights) - target).square().sum((1, 2, 3))
        squares += (target - mean).square().sum((1, 2, 3))
    return {"linear error": error, "linear squares": squares}
