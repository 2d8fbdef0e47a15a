"""A plain eager implementation of the training step of GTSA, to measure ours against, with the same losses.

A pass for every size, a loop over all pairs of crops, one torchvision.ops.roi_align for each side of a pair, one rot90
an image, clipping tensor by tensor with ``.item()``, one update of the teacher a tensor.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor
from torchvision.ops import roi_align

from gtsa.core.types import Crops, Views
from gtsa.methods.gtsa import GTSA
from gtsa.methods.parts.geometry import regions

CLIP, MOMENTUM = 3.0, 0.996


def loss_of(method: GTSA, views: Views) -> Tensor:
    """The loss after ``patch_start``, with the weights of ``method``."""
    seen = views.global_crops
    with torch.no_grad():
        teacher = method.teacher.projector(method.teacher.encoder(seen.pixels.flatten(0, 1)).patches)
        teacher = teacher.unflatten(0, seen.rotations.shape)  # [B, G, h, w, C]
    region, patch, rotation = [], [], []
    for size, crops in enumerate(views.groups):
        tokens = method.student.encoder(crops.pixels.flatten(0, 1)).patches
        maps = method.predictor(method.student.projector(tokens)).unflatten(0, crops.rotations.shape)
        boxes, seen_boxes = regions(crops, seen)
        cells, matches = round(0.7 * maps.shape[2]), maps.shape[2] ** 2 // 2
        for view in range(crops.count):
            for crop in range(seen.count):
                if size == 0 and view == crop:
                    continue
                student = pooled(maps[:, view], boxes[:, view, crop], crops.side, cells)
                target = pooled(teacher[:, crop], seen_boxes[:, crop, view], seen.side, cells)
                region.append(-F.cosine_similarity(student, rotated(target, crops, seen, view, crop), dim=1).mean())
                patch.append(best_matches(maps[:, view], teacher[:, crop], matches))
        logits = method.rotation_head(tokens.mean((1, 2)))
        rotation.append(F.cross_entropy(logits.float(), crops.rotations.flatten(), reduction="none"))
    return (
        torch.stack(region).mean()
        + method.patch_weight(1.0) * torch.stack(patch).mean()
        + method.rotation_weight * torch.cat(rotation).mean()
    )


def pooled(maps: Tensor, boxes: Tensor, side: int, cells: int) -> Tensor:
    """Maps [B, h, w, C], one box [B, 4] each in px of a crop of ``side`` px -> [B, C, cells, cells]."""
    scaled = [box[None].float() * (maps.shape[1] / side) for box in boxes]
    return roi_align(maps.permute(0, 3, 1, 2).float(), scaled, cells, sampling_ratio=-1, aligned=True)


def rotated(target: Tensor, crops: Crops, seen: Crops, view: int, crop: int) -> Tensor:
    turns = (crops.rotations[:, view] - seen.rotations[:, crop]) % 4
    return torch.stack([torch.rot90(each, k.item(), (-2, -1)) for each, k in zip(target, turns, strict=True)])


def best_matches(student: Tensor, teacher: Tensor, matches: int) -> Tensor:
    a, b = (F.normalize(maps.flatten(1, 2).float(), dim=-1) for maps in (student, teacher))
    similarity = a @ b.transpose(1, 2)
    count = min(matches, *similarity.shape[1:])
    best = [similarity.max(dim).values.topk(count, dim=-1).values.mean() for dim in (1, 2)]
    return -(best[0] + best[1]) / 2


def step(method: GTSA, optimizer: torch.optim.Optimizer, views: Views, fabric: Fabric) -> Tensor:
    """One training step: forward, backward, clipping, AdamW, teacher."""
    with fabric.autocast():
        loss = loss_of(method, views)
    loss.backward()
    for parameter in method.parameters():
        if parameter.grad is not None:
            norm = parameter.grad.norm().item()
            if norm > CLIP:
                parameter.grad.mul_(CLIP / (norm + 1e-6))
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        for old, new in zip(method.teacher.parameters(), method.student.parameters(), strict=True):
            old.mul_(MOMENTUM).add_(new, alpha=1 - MOMENTUM)
    return loss.detach()
