"""Label-free metrics of maps: what GTSA's diagnosis is made of."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gtsa.core.types import Crops
from gtsa.methods.parts.geometry import patch_centres


def centred(maps: Tensor) -> Tensor:
    """Maps [B, V, h, w, C] after the mean vector over all of them is subtracted, in float32 at least."""
    lifted = maps.to(torch.promote_types(maps.dtype, torch.float32))
    return lifted - lifted.mean((0, 1, 2, 3))


def nearness(student: Tensor, teacher: Tensor, view: Crops, seen: Crops) -> Tensor:
    """How much nearer to a patch's true position its best match lies than a random patch.

    1 - (mean distance from a patch to its best match) / (mean distance to any patch), in the image. Only patches of a
    view whose centre lies in the teacher's crop count; 0 where there is none.

    Args:
        student: [B, V, h, w, C] maps of the crops ``view``.
        teacher: [B, G, h, w, C] maps of the crops ``seen``.

    Returns:
        [B, V, G], 1 at most; 0 by chance.
    """
    in_view = patch_centres(view.boxes, view.rotations, view.side, student.shape[2])[:, :, None]  # [B, V, 1, N, 2]
    in_seen = patch_centres(seen.boxes, seen.rotations, seen.side, teacher.shape[2])[:, None]  # [B, 1, G, M, 2]
    box = seen.boxes[:, None, :, None]
    common = ((in_view >= box[..., :2]) & (in_view <= box[..., 2:])).all(-1)  # [B, V, G, N]
    similarity = F.normalize(student.flatten(2, 3), dim=-1)[:, :, None] @ (
        F.normalize(teacher.flatten(2, 3), dim=-1)[:, None].transpose(-2, -1)
    )
    distance = (in_view[..., :, None, :] - in_seen[..., None, :, :]).norm(dim=-1)  # [B, V, G, N, M]
    matched = distance.gather(-1, similarity.argmax(-1, keepdim=True)).squeeze(-1)
    chance = (distance.mean(-1) * common).sum(-1)
    return torch.where(chance > 0, 1 - (matched * common).sum(-1) / chance, 0.0).float()
