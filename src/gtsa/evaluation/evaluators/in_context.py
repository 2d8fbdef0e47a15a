"""Do similar patches have the same class? Dense retrieval without training (Hummingbird, arXiv 2306.01667)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from gtsa.core.errors import UserError
from gtsa.data.labels import Labelled
from gtsa.evaluation import dense
from gtsa.evaluation.context import EvalContext
from gtsa.evaluation.evaluator import Evaluator, PerImage
from gtsa.evaluation.features import whole_patches
from gtsa.evaluation.retrieval import build_memory
from gtsa.models.backbone import Encoder


class InContext(Evaluator):
    """Every patch takes the classes of the most similar patches of the training images.

    Args:
        k: number of neighbours of a patch.
        temperature: a neighbour weighs softmax(cosine similarity / temperature).
        memory: largest number of training patches in the memory, a random choice spread over the images.
        size: side of the square that images are resized to, px.
    """

    label_kinds = ("masks",)

    def __init__(self, k: int = 30, temperature: float = 0.02, memory: int = 10_240, size: int = 512) -> None:
        if min(k, memory, size) < 1 or temperature <= 0:
            raise UserError("in_context: k, memory and size must be at least 1 and the temperature above 0")
        self.k, self.temperature, self.memory, self.size = k, temperature, memory, size

    def __call__(self, backbone: Encoder, train: Labelled, val: Labelled, context: EvalContext) -> PerImage:
        size = whole_patches(self.size, backbone)
        memory = build_memory(backbone, train, context, size, self.memory)

        def score(pixels: Tensor) -> Tensor:
            tokens = dense.patch_tokens(backbone, pixels, context)
            soft_labels = memory(F.normalize(tokens.flatten(0, 2), dim=-1), self.k, self.temperature)
            return soft_labels.view(*tokens.shape[:3], -1).permute(0, 3, 1, 2)

        return dense.classify_pixels(score, backbone, val, context, size)

    def metrics(self, per_image: PerImage) -> dict[str, float]:
        return dense.metrics(per_image)

    def per_class(self, per_image: PerImage) -> dict[str, list[float]]:
        return dense.per_class(per_image)
