"""Do the features encode orientation and position, and do they rotate with the image? Invariant ones do not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from gtsa.core.errors import UserError
from gtsa.core.types import Tokens
from gtsa.data.labels import Labelled
from gtsa.evaluation import dense
from gtsa.evaluation.context import EvalContext, Prediction
from gtsa.evaluation.evaluator import Evaluator, PerImage
from gtsa.evaluation.features import pooled, tokens_of, whole_patches
from gtsa.evaluation.retrieval import build_memory
from gtsa.models.backbone import Encoder

STRENGTHS = 10.0 ** torch.arange(-8, 3, dtype=torch.float64)  # of the ridge penalty, times the mean eigenvalue
HELD_OUT = 5  # every fifth training image is for the choice of the strength
NEIGHBOURS, TEMPERATURE, MEMORY = 30, 0.02, 10_240  # of in-context retrieval (Hummingbird)


class Rotation(Evaluator):
    """Four quarter-turns of every image, seen by a frozen backbone.

    * rotation accuracy: share of the four rotations that a linear classifier predicts from one vector per image. Chance
      is 25 %, and more is impossible for features that are invariant to rotation.
    * cosine as it lies: between the features of the rotated and the upright image at the same position.
    * cosine turned back: the same after the map of the rotated image is rotated back, so that the content is the same.
      1 for features that are invariant to rotation.
    * cosine at random: between any two positions of the two maps. The reference for the other two.
    * position R2: share of the variance of a patch's row and column that is linear in its features.
    * in-context mIoU, upright and turned, if the labels are masks: every patch of the upright or rotated image takes
      the classes of the most similar patches of upright training images. No other metric uses labels.

    The linear maps are ridge regressions on the training images, with a strength chosen on a fifth of them.

    Args:
        resize: short side in px that images are resized to, bicubic.
        crop: side of the central square that the backbone sees, px.
        size: side of the square that images with masks are resized to for in-context retrieval, px.
    """

    label_kinds = ("masks", "classes", "multilabel", "none")
    other_metrics: ClassVar[Mapping[str, str]] = {
        "cosine as it lies": "cosine similarity",
        "cosine turned back": "cosine similarity",
        "cosine at random": "cosine similarity",
        "position R2": "share of the variance; 1: all of it",
    }

    def __init__(self, resize: int = 256, crop: int = 224, size: int = 512) -> None:
        self.resize, self.crop, self.size = resize, crop, size

    def __call__(self, backbone: Encoder, train: Labelled, val: Labelled, context: EvalContext) -> PerImage:
        if len(train) < 2:
            raise UserError("rotation: one training image is too few: another one must choose the strength")
        rotation_map, position_map = self._fit(backbone, train, context)
        results: dict[str, list[Tensor]] = {}
        for tokens in self._compute_tokens(backbone, val, context):
            hits, errors = _rotation_hits(tokens, rotation_map, context), _position_errors(tokens, position_map)
            for name, values in (_cosines(tokens) | hits | errors).items():
                results.setdefault(name, []).append(values.double().cpu())
        per_image: PerImage = {name: torch.cat(values) for name, values in results.items()}
        return per_image | self._in_context(backbone, train, val, context) if val.kind == "masks" else per_image

    def metrics(self, per_image: PerImage) -> dict[str, float]:
        means = {name: float(values.double().mean()) for name, values in per_image.items()}
        metrics = {
            "rotation accuracy": 100 * means["named"],
            "cosine as it lies": means["as it lies"],
            "cosine turned back": means["turned back"],
            "cosine at random": means["at random"],
            "position R2": 1 - means["squared error"] / means["squares"],
        }
        if "true" in per_image:  # pixel counts [images, rotations, classes]
            for name, rotations in (("upright", slice(0, 1)), ("turned", slice(1, 4))):
                counts = {key: per_image[key][:, rotations] for key in ("hit", "predicted", "true")}
                metrics[f"in-context mIoU {name}"] = dense.metrics(counts)["mIoU"]
        return metrics

    def _compute_tokens(self, backbone: Encoder, data: Labelled, context: EvalContext) -> Iterator[list[Tokens]]:
        """Batches of the images' tokens, for 0 to 3 quarter-turns counter-clockwise."""
        crop = whole_patches(self.crop, backbone)
        return tokens_of(backbone, data, context, max(self.resize, crop), crop, rotations=range(4))

    def _fit(self, backbone: Encoder, train: Labelled, context: EvalContext) -> tuple[Tensor, Tensor]:
        """Linear maps from a vector to the four rotations, and from a patch to its row and column."""
        zero = torch.zeros((), dtype=torch.float64, device=context.device)
        rotation_moments = [zero, zero]  # of images to train on, and of those for the choice
        position_moments = [zero, zero]
        first = 0
        for tokens in self._compute_tokens(backbone, train, context):
            vectors, rotations = _vectors(tokens, context)
            patches, positions = _patches(tokens[0])
            part_of = (torch.arange(first, first + len(positions), device=context.device) % HELD_OUT == 0).long()
            first += len(positions)
            for part in (0, 1):
                rows = part_of == part
                rotation_moments[part] = rotation_moments[part] + moments_of(vectors[rows], rotations[rows])
                position_moments[part] = position_moments[part] + moments_of(patches[rows], positions[rows])
        rotation_map = ridge(rotation_moments[0], rotation_moments[1], 4)
        return rotation_map, ridge(position_moments[0], position_moments[1], 2)

    def _in_context(self, backbone: Encoder, train: Labelled, val: Labelled, context: EvalContext) -> PerImage:
        """Pixel counts for 0 to 3 quarter-turns of the evaluation images: [images, 4, classes]."""
        size, quiet = whole_patches(self.size, backbone), replace(context, on_prediction=_ignore)
        memory = build_memory(backbone, train, context, size, MEMORY)

        def score(pixels: Tensor, rotations: int) -> Tensor:
            tokens = dense.patch_tokens(backbone, torch.rot90(pixels, rotations, (-2, -1)), context)
            soft_labels = memory(F.normalize(tokens, dim=-1).flatten(0, 2), NEIGHBOURS, TEMPERATURE)
            return torch.rot90(soft_labels.view(*tokens.shape[:3], -1), -rotations, (1, 2)).permute(0, 3, 1, 2)

        four = [dense.classify_pixels(partial(score, rotations=r), backbone, val, quiet, size) for r in range(4)]
        return {name: torch.stack([counts[name] for counts in four], dim=1) for name in four[0]}


def _ignore(index: int, prediction: Prediction) -> None:
    """In-context retrieval is one metric of several: its maps are not the predictions of this evaluation."""


def _vectors(tokens: list[Tokens], context: EvalContext) -> tuple[Tensor, Tensor]:
    """One vector for each rotation [B, 4, D], and the rotation [B, 4, 4], one-hot."""
    vectors = torch.stack([pooled(view, context.tokens) for view in tokens], dim=1)
    return vectors, torch.eye(4, device=vectors.device).expand(len(vectors), 4, 4)


def _patches(tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Patch tokens [B, h * w, D] and their rows and columns [B, h * w, 2], from -1 to 1."""
    patches = tokens.patches
    rows, columns = (torch.linspace(-1, 1, n, device=patches.device) for n in patches.shape[1:3])
    positions = torch.cartesian_prod(rows, columns)
    return patches.flatten(1, 2), positions.expand(len(patches), *positions.shape)


def _rotation_hits(tokens: list[Tokens], rotation_map: Tensor, context: EvalContext) -> PerImage:
    vectors, truth = _vectors(tokens, context)
    right = predict(vectors, rotation_map).argmax(-1) == truth.argmax(-1)
    return {"named": right.double().mean(1)}


def _position_errors(tokens: list[Tokens], position_map: Tensor) -> PerImage:
    patches, truth = _patches(tokens[0])
    error = (predict(patches, position_map) - truth).square().sum((1, 2))
    return {"squared error": error, "squares": truth.double().square().sum((1, 2))}  # their mean is 0


def _cosines(tokens: list[Tokens]) -> PerImage:
    upright, *rotated = (F.normalize(view.patches, dim=-1) for view in tokens)
    pairs = {
        "as it lies": [(upright * view).sum(-1).mean((1, 2)) for view in rotated],
        "turned back": [
            (upright * torch.rot90(view, -rotations, (1, 2))).sum(-1).mean((1, 2))
            for rotations, view in enumerate(rotated, start=1)
        ],
        "at random": [(upright.mean((1, 2)) * view.mean((1, 2))).sum(-1) for view in rotated],
    }
    return {name: torch.stack(values).mean(0) for name, values in pairs.items()}


def moments_of(inputs: Tensor, outputs: Tensor) -> Tensor:
    """All products of (inputs, 1, outputs) [..., D], [..., k], summed over samples: float64 [D + 1 + k] squared.

    A least-squares fit and its error follow from them, in bounded memory.
    """
    ones = torch.ones_like(inputs[..., :1])
    rows = torch.cat([inputs.double(), ones.double(), outputs.double()], dim=-1).flatten(0, -2)
    return rows.T @ rows


def ridge(train: Tensor, held_out: Tensor, outputs: int) -> Tensor:
    """Weights and bias [D + 1, k] of a ridge regression on all samples.

    The strength is the one whose fit to ``train`` has the least error on ``held_out``; both are moments.
    """
    maps = _solutions(train, outputs)
    tied = -torch.eye(outputs, dtype=maps.dtype, device=maps.device).expand(len(maps), outputs, outputs)
    difference = torch.cat([maps, tied], dim=1)
    errors = torch.einsum("sij,ik,skj->s", difference, held_out, difference)
    return _solutions(train + held_out, outputs)[errors.argmin()]


def _solutions(moments: Tensor, outputs: int) -> Tensor:
    """Weights and bias for every strength, [strengths, D + 1, k]; the bias is not penalised."""
    one = len(moments) - outputs - 1
    count, sums = moments[one, one], moments[one]
    centred = moments - sums[:, None] * sums / count
    values, vectors = torch.linalg.eigh(centred[:one, :one])
    penalty = STRENGTHS.to(moments.device)[:, None] * values.mean().clamp(min=1e-30) + values.clamp(min=0)
    weights = vectors @ ((vectors.T @ centred[:one, one + 1 :]) / penalty[..., None])
    bias = (sums[one + 1 :] - sums[:one] @ weights) / count
    return torch.cat([weights, bias[:, None]], dim=1)


def predict(inputs: Tensor, weights: Tensor) -> Tensor:
    return inputs.double() @ weights[:-1] + weights[-1]
