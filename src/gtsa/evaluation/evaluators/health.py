"""Is it learning? Figures without labels: of a method at work, and of anybody's weights.

Of a method they are about held-out images, against the same network at step 0.

A loss alone cannot tell: it also falls when all features become alike. So we ask whether the true region is predicted
better than regions of other images, whether patches find their place in another view, whether rotations are named, and
whether the features still fill their space (RankMe, Garrido et al. 2023). Of a teacher that says which prototypes it
sees: whether it says something else of another image.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gtsa.core.seeds import Stream, generator
from gtsa.data.labels import Labelled
from gtsa.evaluation.evaluator import Evaluator, PerImage
from gtsa.evaluation.features import EvalContext, tokens_of, whole_patches
from gtsa.models.backbone import Encoder

TOKENS = 4096  # rows of the matrix whose rank is taken


class FeatureHealth(Evaluator):
    """Do the patch tokens of any weights fill their space? Neither labels nor training images are needed.

    * rank: RankMe, the effective number of dimensions of 4,096 patch tokens, at most their width (Garrido et al. 2023).
    * spread: of their directions, 1 where all are equally frequent, 0 where there is one.

    Args:
        resize: short side in px that images are brought to, bicubic.
        crop: central square that the backbone sees, px.
    """

    label_kinds = ("none",)
    uses_train_set = False
    bootstrap = False

    def __init__(self, resize: int = 256, crop: int = 224) -> None:
        self.resize, self.crop = resize, crop

    def __call__(self, backbone: Encoder, train: Labelled, val: Labelled, lab: EvalContext) -> PerImage:
        crop = whole_patches(self.crop, backbone)
        found: list[Tensor] = []
        for (tokens,) in tokens_of(backbone, val, lab, max(self.resize, crop), crop):
            for patches in tokens.patches.flatten(1, 2).cpu():
                image = val.places[len(found)]  # the draw goes with the image, not with its place
                draw = generator(lab.seed, Stream.HEALTH_PATCHES, image)
                order = torch.from_numpy(draw.permutation(len(patches)))
                found.append(patches[order[: max(1, -(-TOKENS // len(val)))]].clone())
        return {"patches": found}

    def metrics(self, per_image: PerImage) -> dict[str, float]:
        chosen = evenly(torch.cat(list(per_image["patches"])))
        return {"rank": rank_me(chosen), "spread": spread(chosen), "width": float(chosen.shape[1])}


def evenly(tokens: Tensor) -> Tensor:
    """At most TOKENS of [n, D], evenly spread."""
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


Interval = tuple[float, float, float]  # mean, low, high
