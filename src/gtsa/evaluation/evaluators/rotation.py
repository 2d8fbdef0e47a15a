"""Do the features tell orientation and place, and do they turn with the image? Invariant ones do not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gtsa.core.errors import UserError
from gtsa.core.types import Tokens
from gtsa.data.labels import Labelled
from gtsa.evaluation import dense
from gtsa.evaluation.evaluator import Evaluator, PerImage
from gtsa.evaluation.features import EvalContext, pooled, tokens_of, whole_patches
from gtsa.evaluation.retrieval import remembered
from gtsa.models.backbone import Encoder

STRENGTHS = 10.0 ** torch.arange(-8, 3, dtype=torch.float64)  # of the ridge penalty, times the mean eigenvalue
HELD_OUT = 5  # one of so many training images chooses the strength
NEIGHBOURS, TEMPERATURE, MEMORY = 30, 0.02, 10_240  # of in-context retrieval (Hummingbird)


class Rotation(Evaluator):
    """Four quarter-turns of every image, seen by a frozen backbone.

    * rotation accuracy: how many of the four turns a linear classifier names from one vector an image. Chance is 25 %,
      and more is impossible for features that do not change under rotation.
    * cosine as it lies: between the features of the turned and the upright image at the same position.
    * cosine turned back: the same after the map of the turned image was turned back, so that the content is the same.
      1 for features that are the same in every orientation.
    * cosine at random: between any two positions of the two maps. What the others are to be compared with.
    * position R2: share of the variance of a patch's row and column that is linear in its features.
    * in-context mIoU, upright and turned, where the labels are masks: every patch of the upright or turned image takes
      the classes of the most similar patches of upright training images. No other figure uses labels.

    The linear maps are ridge regressions learnt from the training images, with a strength chosen on a fifth of them.

    Args:
        resize: short side in px that images are brought to, bicubic.
        crop: central square that the backbone sees, px.
        size: side of the square that images with masks are brought to for in-context retrieval, px.
    """

    label_kinds = ("masks", "classes", "multilabel", "none")

    def __init__(self, resize: int = 256, crop: int = 224, size: int = 512) -> None:
        self.resize, self.crop, self.size = resize, crop, size

    def __call__(self, backbone: Encoder, train: Labelled, val: Labelled, lab: EvalContext) -> PerImage:
        if len(train) < 2:
            raise UserError("rotation: one training image is too few: one learns, another chooses the strength")
        turn, place = self._taught(backbone, train, lab)
        found: dict[str, list[Tensor]] = {}
        for tokens in self._turned(backbone, val, lab):
            for name, values in {**_cosines(tokens), **_named(tokens, turn, lab), **_placed(tokens, place)}.items():
                found.setdefault(name, []).append(values.double().cpu())
        per_image: PerImage = {name: torch.cat(values) for name, values in found.items()}
        return per_image | self._in_context(backbone, train, val, lab) if val.kind == "masks" else per_image

    def metrics(self, per_image: PerImage) -> dict[str, float]:
        means = {name: float(values.double().mean()) for name, values in per_image.items()}
        metrics = {
            "rotation accuracy": 100 * means["named"],
            "cosine as it lies": means["as it lies"],
            "cosine turned back": means["turned back"],
            "cosine at random": means["at random"],
            "position R2": 1 - means["squared error"] / means["squares"],
        }
        if "true" in per_image:  # pixel counts [images, turns, classes]
            for name, rotations in (("upright", slice(0, 1)), ("turned", slice(1, 4))):
                counted = {key: per_image[key][:, rotations] for key in ("hit", "predicted", "true")}
                metrics[f"in-context mIoU {name}"] = dense.metrics(counted)["mIoU"]
        return metrics

    def _turned(self, backbone: Encoder, data: Labelled, lab: EvalContext) -> Iterator[list[Tokens]]:
        """Batches of the images' tokens, for 0 to 3 quarter-turns counter-clockwise."""
        crop = whole_patches(self.crop, backbone)
        return tokens_of(backbone, data, lab, max(self.resize, crop), crop, rotations=range(4))

    def _taught(self, backbone: Encoder, train: Labelled, lab: EvalContext) -> tuple[Tensor, Tensor]:
        """Linear maps from a vector to the four turns, and from a patch to its row and column."""
        moments: list[Any] = [[0, 0], [0, 0]]  # of turns and places; of images that learn, and of those that choose
        first = 0
        for tokens in self._turned(backbone, train, lab):
            vectors, rotations = _vectors(tokens, lab)
            patches, places = _patches(tokens[0])
            chooses = (torch.arange(first, first + len(places), device=lab.device) % HELD_OUT == 0).long()
            first += len(places)
            for part in (0, 1):
                mine = chooses == part
                moments[0][part] += moments_of(vectors[mine], rotations[mine])
                moments[1][part] += moments_of(patches[mine], places[mine])
        (turns_learn, turns_choose), (places_learn, places_choose) = moments
        return ridge(turns_learn, turns_choose, 4), ridge(places_learn, places_choose, 2)

    def _in_context(self, backbone: Encoder, train: Labelled, val: Labelled, lab: EvalContext) -> PerImage:
        """Pixel counts for 0 to 3 quarter-turns of the images to judge by: [images, 4, classes]."""
        size, quiet = whole_patches(self.size, backbone), replace(lab, on_prediction=lambda index, prediction: None)
        memory = remembered(backbone, train, lab, size, MEMORY)

        def score(pixels: Tensor, rotations: int) -> Tensor:
            tokens = dense.patches(backbone, torch.rot90(pixels, rotations, (-2, -1)), lab)
            found = memory(F.normalize(tokens, dim=-1).flatten(0, 2), NEIGHBOURS, TEMPERATURE)
            return torch.rot90(found.view(*tokens.shape[:3], -1), -rotations, (1, 2)).permute(0, 3, 1, 2)

        four = [dense.judged(partial(score, rotations=rotations), backbone, val, quiet, size) for rotations in range(4)]
        return {name: torch.stack([counted[name] for counted in four], dim=1) for name in four[0]}


def _vectors(tokens: list[Tokens], lab: EvalContext) -> tuple[Tensor, Tensor]:
    """One vector for each view [B, 4, D], and which turn it is [B, 4, 4], one-hot."""
    vectors = torch.stack([pooled(view, lab.tokens) for view in tokens], dim=1)
    return vectors, torch.eye(4, device=vectors.device).expand(len(vectors), 4, 4)


def _patches(tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Patch tokens [B, h * w, D] and their rows and columns [B, h * w, 2], from -1 to 1."""
    patches = tokens.patches
    rows, columns = (torch.linspace(-1, 1, n, device=patches.device) for n in patches.shape[1:3])
    places = torch.cartesian_prod(rows, columns)
    return patches.flatten(1, 2), places.expand(len(patches), *places.shape)


def _named(tokens: list[Tokens], turn: Tensor, lab: EvalContext) -> PerImage:
    vectors, truth = _vectors(tokens, lab)
    right = predicted(vectors, turn).argmax(-1) == truth.argmax(-1)
    return {"named": right.double().mean(1)}


def _placed(tokens: list[Tokens], place: Tensor) -> PerImage:
    patches, truth = _patches(tokens[0])
    error = (predicted(patches, place) - truth).square().sum((1, 2))
    return {"squared error": error, "squares": truth.double().square().sum((1, 2))}  # they lie around 0


def _cosines(tokens: list[Tokens]) -> PerImage:
    upright, *turned = (F.normalize(view.patches, dim=-1) for view in tokens)
    pairs = {
        "as it lies": [(upright * view).sum(-1).mean((1, 2)) for view in turned],
        "turned back": [
            (upright * torch.rot90(view, -rotations, (1, 2))).sum(-1).mean((1, 2))
            for rotations, view in enumerate(turned, start=1)
        ],
        "at random": [(upright.mean((1, 2)) * view.mean((1, 2))).sum(-1) for view in turned],
    }
    return {name: torch.stack(values).mean(0) for name, values in pairs.items()}


def moments_of(inputs: Tensor, outputs: Tensor) -> Tensor:
    """All products of (inputs, 1, outputs) [..., D], [..., k], summed over samples: float64 [D + 1 + k] squared.

    All that a least-squares fit and its error need to know, in bounded memory.
    """
    row = torch.cat([inputs.double(), torch.ones_like(inputs[..., :1]).double(), outputs.double()], dim=-1).flatten(
        0, -2
    )
    return row.T @ row


def ridge(learn: Tensor, choose: Tensor, outputs: int) -> Tensor:
    """Weights and bias [D + 1, k] of a ridge regression on all samples, of the strength that suits ``choose`` best."""
    maps = _solutions(learn, outputs)
    tied = -torch.eye(outputs, dtype=maps.dtype, device=maps.device).expand(len(maps), outputs, outputs)
    difference = torch.cat([maps, tied], dim=1)
    errors = torch.einsum("sij,ik,skj->s", difference, choose, difference)
    return _solutions(learn + choose, outputs)[errors.argmin()]


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


def predicted(inputs: Tensor, weights: Tensor) -> Tensor:
    return inputs.double() @ weights[:-1] + weights[-1]
