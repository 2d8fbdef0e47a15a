"""Loss functions, pure. Every one returns one value per leading index, so that callers choose the mean."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gtsa.methods.parts.geometry import pairs_of


def region(student: Tensor, target: Tensor) -> Tensor:
    """Negative channel-wise cosine, mean over cells (GTSA, section 3.2).

    Args:
        student: [..., c, c, C] pooled predictions.
        target: [..., c, c, C] the teacher's pooled region, already in the student's orientation.

    Returns:
        [...]
    """
    return -(_unit(student) * _unit(target)).sum(-1).mean((-2, -1))


def patch_correspondence(student: Tensor, teacher: Tensor, matches: int) -> Tensor:
    """Patches that look alike are pulled together, wherever they are (GTSA, section 3.4).

    Each student vector finds its most similar teacher vector; the ``matches`` best pairs count. Likewise from the
    teacher's side; the loss is the mean of both.

        s = cos(student, teacher)                     # [..., N, M]
        loss = - (mean(topk(max_m s)) + mean(topk(max_n s))) / 2

    Args:
        student: [..., N, C]; teacher: [..., M, C] (leading dimensions broadcast).
        matches: how many pairs are kept on either side, at most min(N, M).

    Returns:
        [...]
    """
    similarity = _unit(student) @ _unit(teacher).transpose(-2, -1)
    kept = [_lifted(similarity.max(dim).values.topk(matches, dim=-1).values).mean(-1) for dim in (-1, -2)]
    return -(kept[0] + kept[1]) / 2


def rotation(logits: Tensor, rotations: Tensor) -> Tensor:
    """Cross-entropy over the four quarter-turns: logits [..., 4], turns [...] -> [...]."""
    loss = F.cross_entropy(_lifted(logits).flatten(0, -2), rotations.flatten(), reduction="none")
    return loss.reshape(rotations.shape)


def cross_view(student: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy between what two networks say of views of one image (DINO, section 3.1).

        loss = - sum_k teacher_k log softmax(student)_k      # for every pair of views

    Args:
        student: [..., V, K] logits, over their temperature.
        teacher: [..., G, K] probabilities.

    Returns:
        [..., V, G]
    """
    with torch.autocast(student.device.type, enabled=False):  # a sum over thousands of prototypes
        return -_lifted(student).log_softmax(-1) @ _lifted(teacher).transpose(-2, -1)


def gram(now: Tensor, start: Tensor) -> Tensor:
    """Mean squared change of the cosines between the patches of an image (DINOv3, Siméoni et al. 2025, section 4.2).

    Args:
        now, start: [..., h, w, D], of any widths.

    Returns:
        [...]
    """
    return (_likenesses(now) - _likenesses(start)).square().mean((-2, -1))


def agreement(now: Tensor, start: Tensor) -> Tensor:
    """Correlation of the cosines between different patches of an image with what they were; 1: the same, 0: nothing.

    Args:
        now, start: [..., h, w, D], of any widths, at least three patches.

    Returns:
        [...]
    """
    cosines = [_likenesses(patches) for patches in (now, start)]
    count = cosines[0].shape[-1]
    one, other = torch.triu_indices(count, count, 1, device=now.device)
    mine, theirs = (each[..., one, other] for each in cosines)
    return F.cosine_similarity(mine - mine.mean(-1, keepdim=True), theirs - theirs.mean(-1, keepdim=True), dim=-1)


def _likenesses(patches: Tensor) -> Tensor:
    """Cosines [..., h * w, h * w] between all patches of [..., h, w, D]."""
    with torch.autocast(patches.device.type, enabled=False):
        unit = _unit(patches.flatten(-3, -2))
        return unit @ unit.transpose(-2, -1)


def told_apart(students: Sequence[Tensor], teacher: Tensor) -> Tensor:
    """How much more like another view of the same image than like views of other images a view is: [B], a figure.

    Cosine of what the student says of a view with what the teacher says of another, less the mean of that with up to
    eight other images, mean over pairs of views; the mean vector over the batch is taken off both first.

    Args:
        students: [B, V, K] for each size of views, the global ones first; these are the teacher's too.
        teacher: [B, G, K].
    """
    target, found = _centred(teacher), []
    for size, student in enumerate(students):
        mine = _centred(student)
        pairs = pairs_of(size, mine.shape[1], target.shape[1])
        scores = [(mine @ target.roll(shift, 0).transpose(-2, -1))[:, *pairs] for shift in range(min(len(target), 9))]
        found.append(scores[0] - (torch.stack(scores[1:]).mean(0) if scores[1:] else 0))
    return torch.cat(found, 1).mean(1)


def information(said: Tensor) -> Tensor:
    """What a teacher tells of each image, beside what it says of every image: [B], a figure.

    Kullback-Leibler divergence of what it says of an image from what it says on average. The mean over the batch is
    the mutual information of image and prototype. 0: it says the same of all images, be that everything at once or
    one prototype for all, which are the two ways to collapse (DINO, section 5.3).

    Args:
        said: [B, G, K] probabilities.

    Returns:
        [B], as shares of the most that the mean can be, log min(B, K); of one image nothing can be told: 0.
    """
    p = _lifted(said).mean(1)  # [B, K]
    return (torch.xlogy(p, p) - torch.xlogy(p, p.mean(0))).sum(-1) / math.log(max(2, min(p.shape)))


def _centred(vectors: Tensor) -> Tensor:
    """Directions of [B, V, K] without the mean over all of them, in float32 at least."""
    lifted = _lifted(vectors)
    return F.normalize(lifted - lifted.mean((0, 1)), dim=-1)


def _unit(vectors: Tensor) -> Tensor:
    return F.normalize(_lifted(vectors), dim=-1)


def _lifted(values: Tensor) -> Tensor:
    """Half precisions lose too much in squares, exponentials and means."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values
