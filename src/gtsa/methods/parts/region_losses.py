"""The region loss of GTSA: the published cosine, and what may take its place.

Shapes: B images, V views of one size, G global crops, P pairs of a view and a teacher's crop, c x c cells, C channels,
K prototypes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gtsa.core.compilation import compilable
from gtsa.core.types import Crops
from gtsa.methods.parts import losses, processes
from gtsa.methods.parts.geometry import overlap
from gtsa.methods.parts.prototypes import Centre
from gtsa.methods.parts.sinkhorn import sinkhorn

NEGATIVES = 2048  # cells of the teacher, over all images, so that the matrix stays small at any batch size
Pairs = tuple[Tensor, Tensor]  # indices of views and of teacher's crops, [P] each


def build(name: str, width: int, student_temp: float, num_prototypes: int, teacher_temp: float) -> RegionLoss:
    """The region loss ``name``: cosine, infonce or prototypes."""
    if name == "infonce":
        return InfoNCE(student_temp)
    return Prototypes(width, num_prototypes, student_temp, teacher_temp) if name == "prototypes" else Cosine()


class RegionLoss(nn.Module, ABC):
    """Compares pooled cells of views with the teacher's cells of the same regions."""

    @abstractmethod
    def forward(self, student: Tensor, target: Tensor, view: Crops, seen: Crops, pairs: Pairs) -> Tensor:
        """The loss of each pair, a mean over its cells: [B, P].

        Args:
            student, target: [B, V, G, c, c, C], in the same orientation.
            view, seen: the crops of student [B, V] and teacher [B, G].
        """


class Cosine(RegionLoss):
    """Negative cosine similarity, as published."""

    def forward(self, student: Tensor, target: Tensor, view: Crops, seen: Crops, pairs: Pairs) -> Tensor:
        return losses.region(student, target)[:, *pairs]


class InfoNCE(RegionLoss):
    """Which of the teacher's cells shows the same region? (van den Oord et al. 2018, arXiv 1807.03748)

    Queries are the student's cells. The key of a query is the teacher's cell of the same region. Negatives are
    ``NEGATIVES`` of the teacher's cells (at least one an image), as many of each image, at the same places, drawn anew
    at every call. Cells of the same image are never negatives: parts of a scene may look alike.

    Negatives come from one process and one micro-batch, of at least two images. Those of other processes are not
    gathered: the number of negatives is limited anyway, so they would be other negatives, not more.

    Args:
        temperature: above 0.
    """

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, student: Tensor, target: Tensor, view: Crops, seen: Crops, pairs: Pairs) -> Tensor:
        queries, keys = (cells[:, *pairs].flatten(1, 3) for cells in (student, target))  # [B, P * c * c, C]
        count = min(keys.shape[1], max(1, NEGATIVES // len(keys)))
        negatives = keys[:, torch.randperm(keys.shape[1], device=keys.device)[:count]]
        loss = contrast(queries, keys, negatives, self.temperature)  # [B, P * c * c]
        return loss.reshape(len(keys), len(pairs[0]), -1).mean(-1)


@compilable
def contrast(queries: Tensor, keys: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of each query over its key and the negatives of other images.

        loss = log(exp(cos(query, key) / t) + sum_n exp(cos(query, negative_n) / t)) - cos(query, key) / t

    Args:
        queries, keys: [B, Q, C], in pairs.
        negatives: [B, N, C], of at least two images.

    Returns:
        [B, Q]; by chance log(1 + (B - 1) N).
    """
    images, count = negatives.shape[:2]
    with torch.autocast(queries.device.type, enabled=False):
        query, key, negative = (_unit(vectors) for vectors in (queries, keys, negatives))
        positive = (query * key).sum(-1) / temperature
        logits = query @ negative.flatten(0, 1).T / temperature  # [B, Q, B * N]
        image = torch.arange(images, device=query.device)
        own = image[:, None] == image.repeat_interleave(count)  # [B, B * N]
        others = logits.masked_fill(own[:, None], -torch.inf).logsumexp(-1)
        return torch.logaddexp(positive, others) - positive


class Prototypes(RegionLoss):
    """The student's assignment of a cell to prototypes is to be the teacher's of the same region.

    The teacher's assignments are balanced over the batch by Sinkhorn-Knopp, so that no prototype can win for all cells
    (SwAV, Caron et al. 2020, arXiv 2006.09882). Assignments of cells rather than images are those of CAPI (Darcet et
    al. 2025, arXiv 2502.08769) and CrIBo (Lebailly et al. 2023, arXiv 2310.07855). Prototypes are vectors that are
    trained with the student; the teacher uses the same.

    The mean over pairs is weighted by overlap: a pair counts by the share of the view that the teacher's crop shows,
    and so by the number of patches from which its cells are interpolated. Balance and weights are those of the batch
    of all processes, for views of each size.

    Args:
        width: C.
        count: K.
        student_temp: temperature of the student's softmax.
        teacher_temp: temperature of the teacher's assignments.
    """

    def __init__(self, width: int, count: int, student_temp: float, teacher_temp: float) -> None:
        super().__init__()
        self.prototypes = nn.Linear(width, count, bias=False)
        nn.init.trunc_normal_(self.prototypes.weight, std=0.02)
        self.student_temp, self.teacher_temp = student_temp, teacher_temp

    def forward(self, student: Tensor, target: Tensor, view: Crops, seen: Crops, pairs: Pairs) -> Tensor:
        prototypes = self.prototypes.weight
        with torch.no_grad():
            scores = similarities(target[:, *pairs], prototypes)  # [B, P, c, c, K]
            assigned = sinkhorn(scores.flatten(0, -2), self.teacher_temp).reshape(scores.shape)
        loss = assignment_loss(student[:, *pairs], prototypes, assigned, self.student_temp)
        shares = overlap_shares(view, seen)[:, *pairs].to(loss.dtype)
        return loss * (shares / processes.mean(shares.mean()))


@compilable
def similarities(cells: Tensor, prototypes: Tensor) -> Tensor:
    """Cosine similarities of cells [..., C] and prototypes [K, C]: [..., K]."""
    with torch.autocast(cells.device.type, enabled=False):
        return F.linear(_unit(cells), _unit(prototypes))


@compilable
def assignment_loss(student: Tensor, prototypes: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of cells [B, P, c, c, C] against assignments [B, P, c, c, K], mean over cells: [B, P]."""
    return losses.cross_entropy(similarities(student, prototypes) / temperature, target).mean((-2, -1))


def overlap_shares(view: Crops, seen: Crops) -> Tensor:
    """The share of each view's area that each teacher's crop shows too: [B, V, G]."""
    common = overlap(view.boxes[:, :, None], seen.boxes[:, None])
    return _area(common) / _area(view.boxes)[:, :, None]


def recentred(maps: Tensor, mean: Centre | None) -> Tensor:
    """Maps [B, V, h, w, C] minus the running mean of their vectors, to which they are added for later steps."""
    if mean is None:
        return maps
    mean.accumulate(maps)
    return maps - mean.value


def _area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1)


def _unit(vectors: Tensor) -> Tensor:
    """Unit vectors, in float32 at least."""
    return F.normalize(vectors.to(torch.promote_types(vectors.dtype, torch.float32)), dim=-1)
