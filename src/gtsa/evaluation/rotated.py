"""Images rotated by quarter-turns: their tokens, how these differ from the upright ones, and masks retrieved from them.

Rotation is exact: pixels and maps of squares are transposed and mirrored. All turns are counter-clockwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gtsa.data.labels import Labelled
from gtsa.evaluation import dense
from gtsa.evaluation.context import EvalContext
from gtsa.evaluation.dense import Scene
from gtsa.evaluation.evaluator import PerImage
from gtsa.models.backbone import Encoder

TURNS = range(4)


def turned_back(maps: Tensor, turns: int) -> Tensor:
    """Maps [N, h, w, ...] of images that were rotated by ``turns``, rotated back: their content lies as upright."""
    return torch.rot90(maps, -turns, (1, 2))


def rotated_tokens(
    backbone: Encoder, data: Labelled, context: EvalContext, size: int
) -> Iterator[tuple[list[Scene[Tensor]], list[Tensor]]]:
    """Scenes in order, as squares of ``size`` px, and the tokens [N, h, w, D] of each of their four rotations."""
    for scenes in dense.scenes_by_size(data, context, size):
        pixels = dense.normalised_scenes(scenes, backbone, context)
        yield scenes, [dense.patch_tokens(backbone, torch.rot90(pixels, r, (-2, -1)), context) for r in TURNS]


def cosines(maps: Sequence[Tensor]) -> PerImage:
    """Cosine similarities of the tokens [N, h, w, D] of three rotations with the upright ones, a mean for each image.

    as it lies: at the same position. turned back: at the same content. at random: of any two positions.
    """
    upright, *rotated = (F.normalize(tokens, dim=-1) for tokens in maps)
    pairs = {
        "as it lies": [(upright * view).sum(-1).mean((1, 2)) for view in rotated],
        "turned back": [
            (upright * turned_back(view, turns)).sum(-1).mean((1, 2)) for turns, view in enumerate(rotated, start=1)
        ],
        "at random": [(upright.mean((1, 2)) * view.mean((1, 2))).sum(-1) for view in rotated],
    }
    return {name: torch.stack(values).mean(0) for name, values in pairs.items()}


def classify(
    score: Callable[[Tensor], Tensor], scenes: Sequence[Scene[Tensor]], maps: Sequence[Tensor], data: Labelled
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """For each scene the classes of its pixels [H, W] when it is upright, and the pixel counts of its rotations [4, C].

    Args:
        score: unit vectors [n, D] -> scores [n, C].
        maps: tokens [N, h, w, D] of each rotation. The scores are rotated back: the truth is the upright mask.
    """
    classes, side = len(data.classes), scenes[0].pixels.shape[-2:]
    scores = [
        turned_back(score(F.normalize(tokens, dim=-1).flatten(0, 2)).view(*tokens.shape[:3], -1), turns)
        for turns, tokens in enumerate(maps)
    ]
    patch = side[0] // maps[0].shape[1]
    for index, scene in enumerate(scenes):
        predicted = [
            dense.upsampled(turned[index].permute(2, 0, 1), side, scene.truth.shape, patch).argmax(0).cpu()
            for turned in scores
        ]
        yield predicted[0], dense.stack_repeats([dense.count_pixels(each, scene.truth, classes) for each in predicted])
