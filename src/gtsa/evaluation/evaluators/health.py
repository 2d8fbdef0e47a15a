"""Do the features fill their space? Metrics without labels, of any weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from gtsa.core.seeds import Stream, generator
from gtsa.data.labels import Labelled
from gtsa.evaluation.context import EvalContext
from gtsa.evaluation.evaluator import Evaluator, PerImage
from gtsa.evaluation.features import tokens_of, whole_patches
from gtsa.models.backbone import Encoder

TOKENS = 4096  # rows of the matrix whose rank is computed
Interval = tuple[float, float, float]  # mean, low, high


class FeatureHealth(Evaluator):
    """Do the patch tokens of any weights fill their space? Neither labels nor training images are needed.

    * rank: RankMe, the effective rank of 4,096 patch tokens, at most their width (Garrido et al. 2023).
    * spread: of their directions, 1 if all are equally frequent, 0 if there is only one.

    Args:
        resize: short side in px that images are resized to, bicubic.
        crop: side of the central square that the backbone sees, px.
    """

    label_kinds = ("none",)
    uses_train_set = False
    bootstrap = False
    other_metrics: ClassVar[Mapping[str, str]] = {
        "rank": "effective number of dimensions of the patch tokens, at most the width",
        "spread": "of their directions; 1: all are equally frequent, 0: there is one",
        "width": "values of a patch token",
    }

    def __init__(self, resize: int = 256, crop: int = 224) -> None:
        self.resize, self.crop = resize, crop

    def __call__(self, backbone: Encoder, train: Labelled, val: Labelled, context: EvalContext) -> PerImage:
        crop = whole_patches(self.crop, backbone)
        chosen: list[Tensor] = []
        for (tokens,) in tokens_of(backbone, val, context, max(self.resize, crop), crop):
            for patches in tokens.patches.flatten(1, 2).cpu():
                image = val.indices[len(chosen)]  # the draw depends on the image, not on its position in ``val``
                draw = generator(context.seed, Stream.HEALTH_PATCHES, image)
                order = torch.from_numpy(draw.permutation(len(patches)))
                chosen.append(patches[order[: max(1, -(-TOKENS // len(val)))]].clone())
        return {"patches": chosen}

    def metrics(self, per_image: PerImage) -> dict[str, float]:
        tokens = evenly(torch.cat(list(per_image["patches"])))
        return {"rank": rank_me(tokens), "spread": spread(tokens), "width": float(tokens.shape[1])}


def evenly(tokens: Tensor) -> Tensor:
    """At most TOKENS rows of [n, D], evenly spread."""
    return tokens[torch.linspace(0, len(tokens) - 1, min(TOKENS, len(tokens))).long()]


def rank_me(tokens: Tensor) -> float:
    """Effective rank of [n, D]: the exponential of the entropy of its normalised singular values."""
    values = torch.linalg.svdvals(tokens.double())
    p = values / values.sum() + 1e-7
    return float(torch.exp(-(p * p.log()).sum()))


def spread(tokens: Tensor) -> float:
    """Standard deviation per channel of the unit vectors of [n, D], times the root of D."""
    unit = torch.nn.functional.normalize(tokens.double(), dim=-1)
    return float(unit.std(0, unbiased=False).mean() * unit.shape[1] ** 0.5)
