"""Do the features encode orientation and position, and do they rotate with the image? Invariant ones do not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from gtsa.core.errors import UserError
from gtsa.core.types import Tokens
from gtsa.data.labels import Labelled
from gtsa.evaluation import dense
from gtsa.evaluation.context import EvalContext
from gtsa.evaluation.evaluator import Evaluator, PerImage
from gtsa.evaluation.features import pooled, tokens_of, whole_patches
from gtsa.evaluation.positions import position_errors, position_r2, with_positions
from gtsa.evaluation.retrieval import build_memory
from gtsa.evaluation.ridge import Fit, predict
from gtsa.evaluation.rotated import classify, cosines, rotated_tokens
from gtsa.models.backbone import Encoder

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
            patches = [view.patches for view in tokens]
            hits, errors = _rotation_hits(tokens, rotation_map, context), position_errors(patches[0], position_map)
            for name, values in (cosines(patches) | hits | errors).items():
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
            "position R2": position_r2(per_image),
        }
        if "true" in per_image:  # pixel counts [images, rotations, classes]
            for name, rotations in (("upright", slice(0, 1)), ("turned", slice(1, 4))):
                counts = {key: per_image[key][:, rotations] for key in dense.COUNTS if key in per_image}
                metrics[f"in-context mIoU {name}"] = dense.metrics(counts)["mIoU"]
        return metrics

    def _compute_tokens(self, backbone: Encoder, data: Labelled, context: EvalContext) -> Iterator[list[Tokens]]:
        """Batches of the images' tokens, for 0 to 3 quarter-turns counter-clockwise."""
        crop = whole_patches(self.crop, backbone)
        return tokens_of(backbone, data, context, max(self.resize, crop), crop, rotations=range(4))

    def _fit(self, backbone: Encoder, train: Labelled, context: EvalContext) -> tuple[Tensor, Tensor]:
        """Linear maps from a vector to the four rotations, and from a patch to its row and column."""
        rotation, position = Fit(context.device), Fit(context.device)
        for tokens in self._compute_tokens(backbone, train, context):
            rotation.add(*_vectors(tokens, context))
            position.add(*with_positions(tokens[0].patches))
        return rotation.solve(), position.solve()

    def _in_context(self, backbone: Encoder, train: Labelled, val: Labelled, context: EvalContext) -> PerImage:
        """Pixel counts for 0 to 3 quarter-turns of the evaluation images: [images, 4, classes]."""
        size = whole_patches(self.size, backbone)
        memory = build_memory(backbone, train, context, size, MEMORY)
        score = partial(memory, k=NEIGHBOURS, temperature=TEMPERATURE)
        batches = rotated_tokens(backbone, val, context, size)
        counts = [each for scenes, maps in batches for _, each in classify(score, scenes, maps, val)]
        return dense.stack_counts(counts, val)


def _vectors(tokens: list[Tokens], context: EvalContext) -> tuple[Tensor, Tensor]:
    """One vector for each rotation [B, 4, D], and the rotation [B, 4, 4], one-hot."""
    vectors = torch.stack([pooled(view, context.tokens) for view in tokens], dim=1)
    return vectors, torch.eye(4, device=vectors.device).expand(len(vectors), 4, 4)


def _rotation_hits(tokens: list[Tokens], rotation_map: Tensor, context: EvalContext) -> PerImage:
    vectors, truth = _vectors(tokens, context)
    right = predict(vectors, rotation_map).argmax(-1) == truth.argmax(-1)
    return {"named": right.double().mean(1)}
