"""An image-level loss beside dense ones: DINO's on CLS tokens, made of DINO's own parts (see methods/dino.py)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gtsa.core.types import Crops, Tokens
from gtsa.methods.parts import losses
from gtsa.methods.parts.crops import by_size
from gtsa.methods.parts.geometry import pairs_of
from gtsa.methods.parts.prototypes import Centre, PrototypeHead
from gtsa.methods.parts.teacher import copy_of, follow

STUDENT_TEMP, BOTTLENECK = 0.1, 256  # as published


class ImageLoss(nn.Module):
    """Views of one image are to get the same assignment of prototypes (DINO, Caron et al. 2021, arXiv 2104.14294).

    It holds the heads of student and teacher, and the centre (``prototypes.update_centres`` moves it).

    Args:
        width: of a token.
        num_prototypes: K.
        hidden_dim: width of the heads' hidden layers, and the largest width of the vectors before the prototypes.
        teacher_temp: temperature of the teacher's softmax; the student's is ``STUDENT_TEMP``.
    """

    def __init__(self, width: int, num_prototypes: int, hidden_dim: int, teacher_temp: float) -> None:
        super().__init__()
        self.student_head = PrototypeHead(width, num_prototypes, hidden_dim, min(BOTTLENECK, hidden_dim))
        self.teacher_head = copy_of(self.student_head)
        self.centre = Centre(num_prototypes)
        self.teacher_temp = teacher_temp

    def forward(self, students: Sequence[Tokens], teacher: Tokens, groups: Sequence[Crops]) -> Tensor:
        """Cross-entropy with the teacher's assignments, the mean over pairs of views and over the batch: a scalar.

        Args:
            students: the student's tokens for the crops of each size.
            teacher: the teacher's tokens for the global crops.
            groups: the crops of each size, global crops first.
        """
        with torch.no_grad():
            (logits,) = by_size(self.teacher_head(teacher.prefix[:, 0]), groups[:1])  # [B, G, K]
            probs = self.centre.sharpened(logits, self.teacher_temp)
            self.centre.accumulate(logits)
        rows = self.student_head(torch.cat([tokens.prefix[:, 0] for tokens in students]))
        terms = []
        for size, logits in enumerate(by_size(rows, groups)):  # [B, V, K]
            pairs = pairs_of(size, logits.shape[1], probs.shape[1])
            terms.append(losses.cross_view(logits / STUDENT_TEMP, probs)[:, *pairs])
        return torch.cat(terms, 1).mean()

    def follow(self, momentum: float, accepted: Tensor | float) -> None:
        """Moves the teacher's head towards the student's."""
        follow(self.teacher_head, self.student_head, momentum, accepted)
