"""How much of a patch token tells where the patch was? Position probe, position bias, and its effect on matches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gtsa.core.errors import UserError
from gtsa.data.labels import Labelled
from gtsa.evaluation import dense
from gtsa.evaluation.context import EvalContext
from gtsa.evaluation.evaluator import Evaluator, PerImage
from gtsa.evaluation.features import whole_patches
from gtsa.evaluation.positions import (
    PositionMeans,
    position_bias,
    position_errors,
    position_r2,
    with_positions,
)
from gtsa.evaluation.retrieval import Memory, nearest, sample_patches, shares_of
from gtsa.evaluation.ridge import Fit
from gtsa.models.backbone import Encoder

NEAR = 10  # patches are near each other if row and column differ by at most a tenth of the grid's side


MATCHES = ("matches", "matches without")
Neighbours = tuple[Tensor, Tensor]  # similarities and indices [n, k]


class Fitted(NamedTuple):
    """What is known from the training images."""

    position_map: Tensor
    means: PositionMeans
    cells: Tensor  # the positions of the patches in both memories
    memories: tuple[Memory, Memory]  # of the tokens, and of the tokens without the mean at their position


class Position(Evaluator):
    """What patch tokens tell of their position, and what that does to nearest neighbours in other images.

    * position R2: share of the variance of a patch's row and column that is linear in its token (ridge regression).
    * position bias: share of the variance of tokens that the mean token at their position explains.
    * excess of near matches: share of patches whose most similar patch of the training images is at the same position
      or near it, less the share of near patches among all of them (chance), in percentage points. Near: row and column
      differ by at most a tenth of the grid's side. without position mean: the same after the mean token at each
      position was taken off.
    * in-context mIoU, if the labels are masks, and the same without position mean. A gain shows that matches by
      position hide matches by content.

    All means and maps are those of the training images.

    Args:
        k: number of neighbours of a patch for in-context retrieval.
        temperature: a neighbour weighs softmax(cosine similarity / temperature).
        memory: largest number of training patches that are searched, a random choice spread over the images.
        size: side of the square that images are resized to, px.
    """

    label_kinds = ("masks", "classes", "multilabel", "none")
    other_metrics: ClassVar[Mapping[str, str]] = {"position R2": "share of the variance; 1: all of it"}

    def __init__(self, k: int = 30, temperature: float = 0.02, memory: int = 10_240, size: int = 512) -> None:
        if min(k, memory, size) < 1 or temperature <= 0:
            raise UserError("position: k, memory and size must be at least 1 and the temperature above 0")
        self.k, self.temperature, self.memory, self.size = k, temperature, memory, size

    def __call__(self, backbone: Encoder, train: Labelled, val: Labelled, context: EvalContext) -> PerImage:
        if len(train) < 2:
            raise UserError("position: one training image is too few: another one must choose the ridge penalty")
        size = whole_patches(self.size, backbone)
        if size < 2 * backbone.patch_size:
            raise UserError(f"position: --position.size {self.size} is a single patch; give at least two")
        fitted = self._fit(backbone, train, context, size)
        counts: list[dict[str, Tensor]] = []
        results: dict[str, list[Tensor]] = {}
        for scenes in dense.scenes_by_size(val, context, size):
            tokens = dense.patch_tokens(backbone, dense.normalised_scenes(scenes, backbone, context), context)
            neighbours = self._search(tokens, fitted)
            of_batch = position_errors(tokens, fitted.position_map) | fitted.means.errors(tokens)
            for name, values in (of_batch | _match(neighbours, tokens.shape, fitted)).items():
                results.setdefault(name, []).append(values.double().cpu())
            if val.kind == "masks":
                scores = self._score(neighbours, tokens.shape, fitted)
                counts += [_count(scene, both, val) for scene, both in zip(scenes, scores, strict=True)]
        per_image: PerImage = {name: torch.cat(values) for name, values in results.items()}
        return per_image | (dense.stack_counts(counts, val) if counts else {})

    def metrics(self, per_image: PerImage) -> dict[str, float]:
        shares = {name: 100 * float(per_image[name].double().mean()) for name in ("chance", *MATCHES)}
        metrics = {
            "position R2": position_r2(per_image),
            "position bias": 100 * position_bias(per_image),
            "excess of near matches": shares["matches"] - shares["chance"],
            "excess without position mean": shares["matches without"] - shares["chance"],
        }
        if "true" in per_image:  # pixel counts [images, with and without position mean, classes]
            for part, name in enumerate(("in-context mIoU", "in-context mIoU without position mean")):
                counts = {key: per_image[key][:, part] for key in dense.COUNTS if key in per_image}
                metrics[name] = dense.metrics(counts)["mIoU"]
        return metrics

    def _fit(self, backbone: Encoder, train: Labelled, context: EvalContext, size: int) -> Fitted:
        fit, means = Fit(context.device), PositionMeans()
        for scenes in dense.scenes_by_size(train, context, size):
            tokens = dense.patch_tokens(backbone, dense.normalised_scenes(scenes, backbone, context), context)
            fit.add(*with_positions(tokens))
            means.add(tokens)
        patches = sample_patches(backbone, train, context, size, self.memory)
        shares, rest = shares_of(patches.pixels), patches.tokens - means.offsets.flatten(0, 1)[patches.cells]
        memories = Memory(F.normalize(patches.tokens, dim=-1), shares), Memory(F.normalize(rest, dim=-1), shares)
        return Fitted(fit.solve(), means, patches.cells, memories)

    def _search(self, tokens: Tensor, fitted: Fitted) -> list[Neighbours]:
        """The most similar patches of tokens [N, h, w, D], and of tokens without the mean at each position."""
        found = []
        for memory, queries in zip(fitted.memories, (tokens, tokens - fitted.means.offsets), strict=True):
            rows = F.normalize(queries, dim=-1).flatten(0, 2)
            found.append(nearest(rows, memory.tokens, min(self.k, len(memory.tokens))))
        return found

    def _score(self, neighbours: Sequence[Neighbours], shape: torch.Size, fitted: Fitted) -> Tensor:
        """Scores [N, 2, C, h, w] of images whose tokens have this shape."""
        scores = [
            memory.vote(*found, self.temperature).view(*shape[:3], -1).permute(0, 3, 1, 2)
            for memory, found in zip(fitted.memories, neighbours, strict=True)
        ]
        return torch.stack(scores, dim=1)


def _count(scene: dense.Scene[Tensor], both: Tensor, val: Labelled) -> dict[str, Tensor]:
    """Pixel counts [2, C] of a scene with scores [2, C, h, w]."""
    side, patch = scene.pixels.shape[-2:], scene.pixels.shape[-1] // both.shape[-1]
    predicted = [dense.upsampled(scores, side, scene.truth.shape, patch).argmax(0).cpu() for scores in both]
    return dense.stack_repeats([dense.count_pixels(each, scene.truth, len(val.classes)) for each in predicted])


def _match(neighbours: Sequence[Neighbours], shape: torch.Size, fitted: Fitted) -> PerImage:
    """For each image the share of patches whose nearest neighbour is near, and the share of all patches that are."""
    n, h, w, _ = shape
    cells = torch.arange(h * w, device=fitted.cells.device)
    near = partial(_are_near, height=h, width=w)
    results = {"chance": near(cells[:, None], fitted.cells[None]).double().mean().expand(n)}
    for name, (_, indices) in zip(MATCHES, neighbours, strict=True):
        results[name] = near(cells.repeat(n), fitted.cells[indices[:, 0]]).double().view(n, -1).mean(1)
    return results


def _are_near(one: Tensor, other: Tensor, height: int, width: int) -> Tensor:
    """Whether positions, numbered row by row, are the same or near."""
    rows = (one // width - other // width).abs() <= max(1, height // NEAR)
    return rows & ((one % width - other % width).abs() <= max(1, width // NEAR))
