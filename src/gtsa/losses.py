"""Loss functions, pure. Every one returns one value per leading index, so that callers choose the mean."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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


def rotation(logits: Tensor, turns: Tensor) -> Tensor:
    """Cross-entropy over the four quarter-turns: logits [..., 4], turns [...] -> [...]."""
    loss = F.cross_entropy(_lifted(logits).flatten(0, -2), turns.flatten(), reduction="none")
    return loss.reshape(turns.shape)


def _unit(vectors: Tensor) -> Tensor:
    return F.normalize(_lifted(vectors), dim=-1)


def _lifted(values: Tensor) -> Tensor:
    """Half precisions lose too much in squares, exponentials and means."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values
