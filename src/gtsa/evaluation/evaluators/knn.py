"""Do the nearest images have the same class? k-nearest neighbours on frozen features (DINO, DINOv2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from gtsa.core.errors import UserError
from gtsa.core.terminal import say
from gtsa.data.labels import Labelled
from gtsa.evaluation.evaluator import Evaluator, PerImage
from gtsa.evaluation.features import EvalContext, image_features
from gtsa.evaluation.retrieval import nearest, votes_of
from gtsa.models.backbone import Encoder


class KNN(Evaluator):
    """Weighted votes of the most similar training images.

    Args:
        k: numbers of neighbours; the first one is the one to compare by.
        temperature: a neighbour's vote weighs exp(cosine similarity / temperature).
        resize: short side in px that images are brought to, bicubic.
        crop: central square that the backbone sees, px.
    """

    label_kinds = ("classes",)

    def __init__(
        self, k: tuple[int, ...] = (20, 10, 100, 200), temperature: float = 0.07, resize: int = 256, crop: int = 224
    ) -> None:
        if min(k, default=0) < 1 or temperature <= 0:
            raise UserError("knn: k must be at least 1 and the temperature above 0")
        self.k, self.temperature, self.resize, self.crop = k, temperature, resize, crop

    def __call__(self, backbone: Encoder, train: Labelled, val: Labelled, lab: EvalContext) -> PerImage:
        possible = [k for k in self.k if k <= len(train)]
        if not possible:
            raise UserError(f"knn: there are {len(train)} training images; give --knn.k of at most that")
        if left_out := [str(k) for k in self.k if k > len(train)]:
            say(f"knn: k = {', '.join(left_out)} left out, there are {len(train)} training images")
        memory, queries = (
            F.normalize(image_features(backbone, data, lab, self.resize, self.crop)[:, 0], dim=-1).to(lab.device)
            for data in (train, val)
        )
        classes = torch.tensor([train.target(i) for i in range(len(train))], device=lab.device)
        truth = torch.tensor([val.target(i) for i in range(len(val))], device=lab.device)
        similarity, places = nearest(queries, memory, max(possible))
        per_image: PerImage = {}
        for k in possible:
            votes = votes_of(similarity[:, :k], classes[places[:, :k]], len(train.classes), self.temperature)
            best = votes.topk(min(5, votes.shape[1]), dim=-1)
            right = (best.indices == truth[:, None]) & (best.values > 0)  # without a vote, order decides, not likeness
            per_image[f"top1, k = {k}"] = right[:, 0].cpu()
            if len(train.classes) > 5:
                per_image[f"top5, k = {k}"] = right.any(-1).cpu()
            if k == possible[0]:
                for index, row in enumerate((votes / votes.sum(-1, keepdim=True)).cpu()):
                    lab.on_prediction(index, row)
        return per_image

    def metrics(self, per_image: PerImage) -> dict[str, float]:
        return {name: 100 * float(right.double().mean()) for name, right in per_image.items()}
