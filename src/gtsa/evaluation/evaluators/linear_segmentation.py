"""Are classes linearly separable in the patch tokens? Logistic regression on frozen patches, trained to convergence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from gtsa.core.errors import UserError
from gtsa.core.terminal import say
from gtsa.data.labels import Labelled
from gtsa.evaluation import dense, logistic
from gtsa.evaluation.context import EvalContext
from gtsa.evaluation.evaluator import Evaluator, PerImage
from gtsa.evaluation.features import whole_patches
from gtsa.evaluation.logistic import Logistic
from gtsa.evaluation.retrieval import sample_patches
from gtsa.models.backbone import Encoder


class LinearSegmentation(Evaluator):
    """Multinomial logistic regression on standardised patch tokens. The network sees each image once.

    The loss is the mean cross-entropy of the labelled training pixels, where all pixels of a patch have its scores,
    plus l2 / 2 times the squared weights. The problem is convex, and L-BFGS solves it to convergence: without
    augmentation, learning rate, schedule or seed. Scores of evaluation images are upsampled bilinearly to the mask.

    Args:
        size: side of the square that images are resized to, px.
        l2: weight of the penalty; biases have none.
        patches: largest number of training patches, a random choice spread over the images.
        tolerance: training ends where no entry of the gradient is larger.
        steps: iterations at most; if they do not suffice, it is reported.
    """

    label_kinds = ("masks",)
    other_metrics: ClassVar[Mapping[str, str]] = {
        "training loss": "cross-entropy of the training pixels and penalty",
        "iterations": "of L-BFGS",
    }

    def __init__(
        self,
        size: int = 448,
        l2: float = 1e-4,
        patches: int = 1_000_000,
        tolerance: float = 1e-4,
        steps: int = 2_000,
    ) -> None:
        if min(size, patches, steps) < 1 or l2 < 0 or tolerance <= 0:
            raise UserError(
                "linear_segmentation: size, patches and steps must be at least 1, l2 at least 0 and tolerance above 0"
            )
        self.size, self.l2, self.patches, self.tolerance, self.steps = size, l2, patches, tolerance, steps

    def __call__(self, backbone: Encoder, train: Labelled, val: Labelled, context: EvalContext) -> PerImage:
        size = whole_patches(self.size, backbone)
        tokens, pixels, _ = sample_patches(backbone, train, context, size, self.patches)
        head = logistic.fit(tokens, pixels, self.l2, self.tolerance, self.steps)
        say(f"linear_segmentation: {self._describe_end(head)}")
        del tokens, pixels

        def score(images: Tensor) -> Tensor:
            return head(dense.patch_tokens(backbone, images, context)).permute(0, 3, 1, 2)

        per_image = dense.classify_pixels(score, backbone, val, context, size)
        ends = {"training loss": head.loss, "iterations": float(head.iterations)}
        return {**per_image, **{name: torch.full((len(val),), value) for name, value in ends.items()}}

    def _describe_end(self, head: Logistic) -> str:
        end = f"after {head.iterations:,} iterations: loss {head.loss:.4f}, largest gradient {head.gradient:.1e}"
        if head.gradient <= self.tolerance:
            return f"converged {end}"
        cause = "rounding, or a tolerance that is too small"
        if head.iterations >= self.steps:
            cause = "too few --linear-segmentation.steps, or an l2 that is too small"
        return f"NOT CONVERGED {end}; {cause}"

    def metrics(self, per_image: PerImage) -> dict[str, float]:
        ends = {name: float(per_image[name].double().mean()) for name in self.other_metrics}
        return {**dense.metrics(per_image), **ends}

    def per_class(self, per_image: PerImage) -> dict[str, list[float]]:
        return dense.per_class(per_image)
