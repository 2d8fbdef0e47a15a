"""What is each thing? Patch tokens pooled over its mask, named by the most similar things of other images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gtsa.core.errors import UserError
from gtsa.data.labels import Boxes, Labelled
from gtsa.evaluation import dense
from gtsa.evaluation.evaluator import Evaluator, PerImage
from gtsa.evaluation.features import EvalContext, batches, normalised, whole_patches
from gtsa.evaluation.retrieval import nearest, votes_of
from gtsa.models.backbone import Encoder


class Instances(Evaluator):
    """Every thing is one vector, the mean of the patch tokens under its mask, and takes the class that the most similar
    things of the training images vote for.

    Args:
        k: neighbours.
        temperature: a neighbour's vote weighs exp(cosine similarity / temperature).
        size: side of the square that images are brought to, px.
        groups: name supercategories, where the file tells them, instead of categories.
    """

    label_kinds = ("boxes",)

    def __init__(self, k: int = 20, temperature: float = 0.07, size: int = 448, groups: bool = True) -> None:
        if min(k, size) < 1 or temperature <= 0:
            raise UserError("instances: k and size must be at least 1 and the temperature above 0")
        self.k, self.temperature, self.size, self.groups = k, temperature, size, groups

    def __call__(self, backbone: Encoder, train: Labelled, val: Labelled, lab: EvalContext) -> PerImage:
        names, numbers = self._classes(train)
        memory, known, _ = self._things(backbone, train, lab)
        queries, truth, images = self._things(backbone, val, lab)
        if len(memory) <= self.k:
            raise UserError(f"instances: there are {len(memory)} things to learn from; give --instances.k below that")
        known, truth = numbers[known], numbers[truth]
        similarity, places = nearest(queries, memory, self.k)
        votes = votes_of(similarity, known.to(lab.device)[places], len(names), self.temperature)
        found = votes.argmax(-1).cpu()
        counts = torch.zeros(2, len(val), len(names), dtype=torch.int64)
        counts[0].index_put_((images, truth), (found == truth).long(), accumulate=True)
        counts[1].index_put_((images, truth), torch.ones_like(truth), accumulate=True)
        return {"hit": counts[0], "true": counts[1]}

    def metrics(self, per_image: PerImage) -> dict[str, float]:
        """Share of the things that are named rightly, and the mean over classes of that share, in per cent."""
        hit, true = per_image["hit"].sum(0).double(), per_image["true"].sum(0).double()
        if not true.any():
            raise UserError("instances: there is no thing among the images to judge by", 3)
        return {"accuracy": 100 * float(hit.sum() / true.sum()), "mean accuracy": 100 * float((hit / true).nanmean())}

    def per_class(self, per_image: PerImage) -> dict[str, list[float]]:
        """Of each supercategory, or class."""
        return {"accuracy": (100 * per_image["hit"].sum(0).double() / per_image["true"].sum(0)).tolist()}

    def _classes(self, data: Labelled) -> tuple[tuple[str, ...], Tensor]:
        """Names of what is told apart, and the number of each of the data's classes among them."""
        if not (self.groups and data.groups):
            return data.classes, torch.arange(len(data.classes))
        names = tuple(sorted(set(data.groups)))
        return names, torch.tensor([names.index(group) for group in data.groups])

    def _things(self, backbone: Encoder, data: Labelled, lab: EvalContext) -> tuple[Tensor, Tensor, Tensor]:
        """Unit vectors [n, D] of all things but crowds, their classes [n], and which image each is in [n]."""
        if not data.has_masks:
            raise UserError("instances: things are told by their masks, and these labels have boxes alone", 3)
        vectors, classes, counts = [], [], []
        for scenes in batches(dense.Scenes(data, whole_patches(self.size, backbone)), lab, list):
            pixels = torch.stack([scene.pixels for scene in scenes])
            tokens = dense.patches(backbone, normalised(pixels, backbone, lab.device), lab)
            for each, scene in zip(tokens, scenes, strict=True):
                things: Boxes = scene.truth
                shares = covered(things, (each.shape[0], each.shape[1])).to(each.device)
                vectors.append(F.normalize(torch.einsum("nhw,hwd->nd", shares, each), dim=-1))
                classes.append(things.classes[~things.crowd])
                counts.append(len(shares))
        images = torch.arange(len(data)).repeat_interleave(torch.tensor(counts))
        return torch.cat(vectors), torch.cat(classes), images


def covered(things: Boxes, grid: tuple[int, int]) -> Tensor:
    """What part of each thing but crowds lies in each cell of a grid over the image: [n, h, w], of sum 1."""
    masks = things.masks
    assert masks is not None
    masks = masks[~things.crowd].float()
    if not len(masks):
        return torch.zeros(0, *grid)
    shares = F.adaptive_avg_pool2d(masks[:, None], grid)[:, 0]
    return shares / shares.sum((1, 2), keepdim=True).clamp(min=1e-12)
