"""Do the nearest images have the same class? k-nearest neighbours on frozen features (DINO, DINOv2)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gtsa.core import Evaluator, Evidence, Remedy
from gtsa.features import Lab, image_features


class KNN(Evaluator):
    """Weighted votes of the most similar training images.

    Args:
        k: numbers of neighbours; the first one is the one to compare by.
        temperature: a neighbour's vote weighs exp(cosine similarity / temperature).
        resize: short side in px that images are brought to, bicubic.
        crop: central square that the backbone sees, px.
    """

    labels = ("classes",)

    def __init__(
        self, k: tuple[int, ...] = (20, 10, 100, 200), temperature: float = 0.07, resize: int = 256, crop: int = 224
    ) -> None:
        if min(k, default=0) < 1 or temperature <= 0:
            raise Remedy("knn: k must be at least 1 and the temperature above 0")
        self.k, self.temperature, self.resize, self.crop = k, temperature, resize, crop

    def __call__(self, backbone: Any, train: Any, val: Any, lab: Lab) -> Evidence:
        memory, queries = (
            F.normalize(image_features(backbone, data, lab, self.resize, self.crop)[:, 0], dim=-1).to(lab.device)
            for data in (train, val)
        )
        classes = torch.tensor([train.target(i) for i in range(len(train))], device=lab.device)
        truth = torch.tensor([val.target(i) for i in range(len(val))], device=lab.device)
        evidence: Evidence = {}
        for k in self.k:
            if k <= len(train):
                votes = votes_of(queries, memory, classes, len(train.classes), k, self.temperature)
                best = votes.topk(min(5, votes.shape[1]), dim=-1).indices == truth[:, None]
                evidence[f"top1, k = {k}"] = best[:, 0].cpu()
                evidence[f"top5, k = {k}"] = best.any(-1).cpu()
                if k == self.k[0]:
                    for index, row in enumerate(votes.cpu()):
                        lab.keep(index, row / row.sum())
        if not evidence:
            raise Remedy(f"knn: there are {len(train)} training images; give --knn.k of at most that")
        return evidence

    def figures(self, evidence: Evidence) -> dict[str, float]:
        return {name: 100 * float(right.double().mean()) for name, right in evidence.items()}


def votes_of(queries: Tensor, memory: Tensor, classes: Tensor, count: int, k: int, temperature: float) -> Tensor:
    """Votes [queries, count] of the ``k`` most similar unit vectors of ``memory`` [n, D], whose classes are [n].

    Queries go by in chunks, so that memory is bounded.
    """
    found = []
    for chunk in torch.split(queries, max(1, 2**24 // len(memory))):
        similarity, nearest = (chunk @ memory.T).topk(k, dim=-1)
        weights = (similarity / temperature).exp()
        votes = torch.zeros(len(chunk), count, dtype=weights.dtype, device=weights.device)
        found.append(votes.scatter_add_(1, classes[nearest], weights))
    return torch.cat(found)
