"""Do the nearest images have the same class? k-nearest neighbours on frozen features (DINO, DINOv2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from gtsa.core.errors import UserError
from gtsa.core.terminal import say
from gtsa.data.labels import Labelled
from gtsa.evaluation.context import EvalContext
from gtsa.evaluation.evaluator import Evaluator, PerImage
from gtsa.evaluation.features import image_features
from gtsa.evaluation.retrieval import nearest, votes_of
from gtsa.models.backbone import Encoder


class KNN(Evaluator):
    """Weighted votes of the most similar training images.

    Args:
        k: numbers of neighbours; the first one is the primary metric.
        temperature: a neighbour's vote weighs exp(cosine similarity / temperature).
        resize: short side in px that images are resized to, bicubic.
        crop: side of the central square that the backbone sees, px.
    """

    label_kinds = ("classes",)

    def __init__(
        self, k: tuple[int, ...] = (20, 10, 100, 200), temperature: float = 0.07, resize: int = 256, crop: int = 224
    ) -> None:
        if min(k, default=0) < 1 or temperature <= 0:
            raise UserError("knn: k must be at least 1 and the temperature above 0")
        self.k, self.temperature, self.resize, self.crop = k, temperature, resize, crop

    def __call__(self, backbone: Encoder, train: Labelled, val: Labelled, context: EvalContext) -> PerImage:
        ks = self._possible(len(train))
        memory, queries = (
            F.normalize(image_features(backbone, data, context, self.resize, self.crop)[:, 0], dim=-1).to(
                context.device
            )
            for data in (train, val)
        )
        classes = torch.tensor([train.target(i) for i in range(len(train))], device=context.device)
        truth = torch.tensor([val.target(i) for i in range(len(val))], device=context.device)
        similarity, indices = nearest(queries, memory, max(ks))
        per_image: PerImage = {}
        for k in ks:
            votes = votes_of(similarity[:, :k], classes[indices[:, :k]], len(train.classes), self.temperature)
            best = votes.topk(min(5, votes.shape[1]), dim=-1)
            right = (best.indices == truth[:, None]) & (best.values > 0)  # classes without votes rank by order alone
            per_image[f"top1, k = {k}"] = right[:, 0].cpu()
            if len(train.classes) > 5:
                per_image[f"top5, k = {k}"] = right.any(-1).cpu()
            if k == ks[0]:
                for index, row in enumerate((votes / votes.sum(-1, keepdim=True)).cpu()):
                    context.on_prediction(index, row)
        return per_image

    def _possible(self, images: int) -> list[int]:
        """The numbers of neighbours that so many training images allow; says which ones are left out."""
        ks = [k for k in self.k if k <= images]
        if not ks:
            raise UserError(f"knn: there are {images} training images; give --knn.k of at most {images}")
        if left_out := [str(k) for k in self.k if k > images]:
            say(f"knn: k = {', '.join(left_out)} left out: there are {images} training images")
        return ks

    def metrics(self, per_image: PerImage) -> dict[str, float]:
        return {name: 100 * float(right.double().mean()) for name, right in per_image.items()}
