"""Does the mask of an instance predict its class? Patch tokens pooled over masks, classified by nearest neighbours."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gtsa.core.errors import UserError
from gtsa.data.labels import Boxes, Labelled
from gtsa.evaluation import dense
from gtsa.evaluation.context import EvalContext
from gtsa.evaluation.evaluator import Evaluator, PerImage
from gtsa.evaluation.features import whole_patches
from gtsa.evaluation.loading import batches
from gtsa.evaluation.retrieval import nearest, votes_of
from gtsa.models.backbone import Encoder


class Instances(Evaluator):
    """Every instance is one vector, the mean of the patch tokens under its mask, and takes the class that the most
    similar training instances vote for.

    Args:
        k: number of neighbours.
        temperature: a neighbour's vote weighs exp(cosine similarity / temperature).
        size: side of the square that images are resized to, px.
        groups: predict supercategories, if the file has them, instead of categories.
    """

    label_kinds = ("boxes",)

    def __init__(self, k: int = 20, temperature: float = 0.07, size: int = 448, groups: bool = True) -> None:
        if min(k, size) < 1 or temperature <= 0:
            raise UserError("instances: k and size must be at least 1 and the temperature above 0")
        self.k, self.temperature, self.size, self.groups = k, temperature, size, groups

    def __call__(self, backbone: Encoder, train: Labelled, val: Labelled, context: EvalContext) -> PerImage:
        names, ids = self._classes(train)
        memory, known, _ = self._instances(backbone, train, context)
        queries, truth, images = self._instances(backbone, val, context)
        if len(memory) <= self.k:
            raise UserError(f"instances: there are {len(memory)} training instances; give --instances.k below that")
        known, truth = ids[known], ids[truth]
        similarity, indices = nearest(queries, memory, self.k)
        votes = votes_of(similarity, known.to(context.device)[indices], len(names), self.temperature)
        predicted = votes.argmax(-1).cpu()
        counts = torch.zeros(2, len(val), len(names), dtype=torch.int64)
        counts[0].index_put_((images, truth), (predicted == truth).long(), accumulate=True)
        counts[1].index_put_((images, truth), torch.ones_like(truth), accumulate=True)
        return {"hit": counts[0], "true": counts[1]}

    def metrics(self, per_image: PerImage) -> dict[str, float]:
        """Share of instances that are classified correctly, and the mean of that share over classes, in per cent."""
        hit, true = per_image["hit"].sum(0).double(), per_image["true"].sum(0).double()
        if not true.any():
            raise UserError("instances: the evaluation images have no instance", 3)
        return {"accuracy": 100 * float(hit.sum() / true.sum()), "mean accuracy": 100 * float((hit / true).nanmean())}

    def per_class(self, per_image: PerImage) -> dict[str, list[float]]:
        """Of each supercategory, or category."""
        return {"accuracy": (100 * per_image["hit"].sum(0).double() / per_image["true"].sum(0)).tolist()}

    def _classes(self, data: Labelled) -> tuple[tuple[str, ...], Tensor]:
        """Names of the classes to predict, and the index among them of each of the data's classes."""
        if not (self.groups and data.groups):
            return data.classes, torch.arange(len(data.classes))
        names = tuple(sorted(set(data.groups)))
        return names, torch.tensor([names.index(group) for group in data.groups])

    def _instances(self, backbone: Encoder, data: Labelled, context: EvalContext) -> tuple[Tensor, Tensor, Tensor]:
        """Unit vectors [n, D] of all instances but crowds, their classes [n], and the image of each [n]."""
        if not data.has_masks:
            raise UserError("instances: every instance needs a mask, and these labels have only boxes", 3)
        vectors, classes, counts = [], [], []
        for scenes in batches(dense.Scenes[Boxes](data, whole_patches(self.size, backbone)), context, list):
            pixels = dense.normalised_scenes(scenes, backbone, context)
            for tokens, scene in zip(dense.patch_tokens(backbone, pixels, context), scenes, strict=True):
                boxes = scene.truth
                shares = covered(boxes, (tokens.shape[0], tokens.shape[1])).to(tokens.device)
                vectors.append(F.normalize(torch.einsum("nhw,hwd->nd", shares, tokens), dim=-1))
                classes.append(boxes.classes[~boxes.crowd])
                counts.append(len(shares))
        images = torch.arange(len(data)).repeat_interleave(torch.tensor(counts))
        return torch.cat(vectors), torch.cat(classes), images


def covered(boxes: Boxes, grid: tuple[int, int]) -> Tensor:
    """Share of each instance (but crowds) in each cell of a grid over the image: [n, h, w], of sum 1."""
    masks = boxes.masks
    assert masks is not None
    masks = masks[~boxes.crowd].float()
    if not len(masks):
        return torch.zeros(0, *grid)
    shares = F.adaptive_avg_pool2d(masks[:, None], grid)[:, 0]
    return shares / shares.sum((1, 2), keepdim=True).clamp(min=1e-12)
