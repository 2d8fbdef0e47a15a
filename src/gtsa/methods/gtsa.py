"""GTSA: a geometric transformation sensitive architecture (Kim and Lee, arXiv 2304.08014), in the order of the paper.

Shapes: B images, V views of one size, G global crops, h x w tokens, C channels, c x c pooled cells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gtsa.core.errors import UserError
from gtsa.core.types import Crops, Method, Views
from gtsa.methods.parts import losses
from gtsa.methods.parts.geometry import align, pairs_of, patch_centres
from gtsa.methods.parts.heads import GridPredictor, GridProjector, RotationHead
from gtsa.methods.parts.teacher import copy_of, follow
from gtsa.models.backbone import Backbone
from gtsa.training.schedules import After, Cosine


class Branch(nn.Module):
    """The network of student and teacher: encoder and projector U."""

    def __init__(self, encoder: Backbone, projector: GridProjector) -> None:
        super().__init__()
        self.encoder, self.projector = encoder, projector


class GTSA(Method):
    """Student and EMA teacher, and the three losses.

    Args:
        encoder: the student's encoder; the teacher starts as its copy.
        projector_dim: hidden width of projector U.
        out_dim: output width of U and H, whose maps are compared.
        predictor_dim: hidden width of predictor H.
        cells: cells per side of the pooled grid, for global and local views. By default round(0.7 g) for a map of g x g
            patches.
        matches: best patch matches that the patch correspondence loss uses, for global and local views. By default
            half of the patches.
        region_weight: weight of the region loss; 0 leaves it out.
        patch_weight: weight of the patch correspondence loss; 0 leaves it out.
        rotation_weight: weight of the rotation loss; 0 leaves it and its head out.
        patch_start: fraction of the run after which the patch correspondence loss is used.
        region_target: target of the region loss. overlap: the pooled region that the views of student and teacher
            share; global: the mean of each whole map, which makes the method insensitive to cropping (an ablation).
        momentum: momentum of the EMA teacher at the start; it rises to 1 along a cosine.
    """

    legend = "region, patch = negative cosine (best: -1); rotation = cross-entropy (chance: 1.386, accuracy 25 %)"
    needs_overlap = True
    search_space: ClassVar = {"momentum": (0.99, 0.993, 0.996, 0.998)}

    def __init__(
        self,
        encoder: Backbone,
        projector_dim: int = 384,
        out_dim: int = 768,
        predictor_dim: int = 768,
        cells: tuple[int, int] | None = None,
        matches: tuple[int, int] | None = None,
        region_weight: float = 1.0,
        patch_weight: float = 0.5,
        rotation_weight: float = 0.5,
        patch_start: float = 0.11,
        region_target: Literal["overlap", "global"] = "overlap",
        momentum: float = 0.996,
    ) -> None:
        super().__init__()
        if min(projector_dim, out_dim, predictor_dim, *(cells or (1,)), *(matches or (1,))) < 1:
            raise UserError("gtsa.projector_dim, out_dim, predictor_dim, cells, matches: must be at least 1")
        if min(region_weight, patch_weight, rotation_weight) < 0:
            raise UserError(
                "gtsa.region_weight, patch_weight, rotation_weight: must not be negative; 0 leaves a loss out"
            )
        if not 0 <= momentum <= 1:
            raise UserError(f"gtsa.momentum: from 0 to 1, not {momentum}; published is 0.996")
        self.student = Branch(encoder, GridProjector(encoder.embed_dim, projector_dim, out_dim))
        self.teacher = copy_of(self.student)
        self.predictor = GridPredictor(out_dim, predictor_dim)
        self.rotation_head = RotationHead(encoder.embed_dim) if rotation_weight > 0 else None
        self.cells, self.matches = cells, matches
        self.region_weight, self.rotation_weight = region_weight, rotation_weight
        self.patch_weight = After(patch_start, patch_weight)
        self.region_target = region_target
        self.momentum = Cosine(momentum, 1.0)

    def forward(self, views: Views, time: float) -> dict[str, Tensor]:
        teacher = self.teacher_maps(views.global_crops)  # [B, G, h, w, C]
        patch_weight = self.patch_weight(time)
        region, patch, rotation, correct = [], [], [], []
        for size, (maps, logits) in enumerate(self.predictions(views.groups)):  # [B, V, h, w, C], [B, V, 4]
            crops = views.groups[size]
            student_cells, target_cells = self.pooled(maps, teacher, crops, views.global_crops, size)
            pairs = pairs_of(size, crops.count, views.global_crops.count)
            region.append(losses.region(student_cells, target_cells)[:, *pairs])  # [B, pairs]
            if patch_weight > 0:
                patch.append(self.patch_loss(maps, teacher, size)[:, *pairs])
            if logits is not None:
                rotation.append(losses.rotation(logits, crops.rotations))  # [B, V]
                correct.append((logits.detach().argmax(-1) == crops.rotations).float())

        parts = {"region": _mean(region)}
        loss = self.region_weight * parts["region"]
        if patch:
            parts["patch"] = _mean(patch)
            loss = loss + patch_weight * parts["patch"]
        if rotation:
            parts["rotation"] = _mean(rotation)
            parts["rotation_accuracy"] = _mean(correct)
            loss = loss + self.rotation_weight * parts["rotation"]
        return {"loss": loss, **parts}

    def after_step(self, time: float, next_time: float, accepted: Tensor | float = 1.0) -> None:
        follow(self.teacher, self.student, self.momentum(next_time), accepted)

    def train(self, mode: bool = True) -> GTSA:
        super().train(mode)
        self.teacher.eval()  # the teacher never has drop path
        return self

    # The networks (section 3.1)

    @torch.no_grad()
    def teacher_maps(self, crops: Crops) -> Tensor:
        """The teacher's projected maps [B, G, h, w, C]."""
        maps: Tensor = self.teacher.projector(self.teacher.encoder(crops.pixels.flatten(0, 1)).patches)
        return maps.reshape(*crops.rotations.shape, *maps.shape[1:])

    def student_maps(self, crops: Crops) -> tuple[Tensor, Tensor | None]:
        """Predicted maps [B, V, h, w, C], and rotation logits [B, V, 4] where rotation is predicted."""
        return self.predictions([crops])[0]

    def predictions(self, groups: Sequence[Crops]) -> list[tuple[Tensor, Tensor | None]]:
        """``student_maps`` of the crops of each size, in one pass of the encoder and of the rotation head."""
        tokens = self.student.encoder.side_by_side([crops.pixels.flatten(0, 1) for crops in groups])
        shapes = [crops.rotations.shape for crops in groups]
        maps = [
            self.predictor(self.student.projector(each.patches)).unflatten(0, shape)
            for each, shape in zip(tokens, shapes, strict=True)
        ]
        if self.rotation_head is None:
            return [(each, None) for each in maps]
        logits = self.rotation_head(torch.cat([each.patches.mean((1, 2)) for each in tokens]))
        parts = torch.split(logits, [shape.numel() for shape in shapes])
        return [(each, part.reshape(*shape, 4)) for each, part, shape in zip(maps, parts, shapes, strict=True)]

    # The target follows the crop and its rotation (sections 3.2 and 3.3)

    def pooled(self, student: Tensor, teacher: Tensor, view: Crops, seen: Crops, size: int) -> tuple[Tensor, Tensor]:
        """Pooled maps of the region that a view and a teacher's crop share, in the view's orientation.

        Args:
            student: [B, V, h, w, C] maps of the crops ``view``, whose ``size`` is 0 (global) or 1 (local).
            teacher: [B, G, h, w, C] maps of the crops ``seen``.

        Returns:
            Two tensors [B, V, G, c, c, C].
        """
        if self.region_target == "global":
            pooled, target = student.mean((2, 3))[:, :, None], teacher.mean((2, 3))[:, None]
            shape = (*student.shape[:2], teacher.shape[1], 1, 1, student.shape[-1])
            return pooled[..., None, None, :].expand(shape), target[..., None, None, :].expand(shape)
        return align(student, teacher, view, seen, self.cells[size] if self.cells else round(0.7 * student.shape[2]))

    # Patch correspondence, wherever similar patches are (section 3.4)

    def patch_loss(self, student: Tensor, teacher: Tensor, size: int) -> Tensor:
        """The patch correspondence loss [B, V, G] of whole maps [B, V, h, w, C] and [B, G, h, w, C]."""
        patches, target = student.flatten(2, 3), teacher.flatten(2, 3)
        matches = self.matches[size] if self.matches else max(1, patches.shape[2] // 2)
        matches = min(matches, patches.shape[2], target.shape[2])
        return losses.patch_correspondence(patches[:, :, None], target[:, None], matches)

    # For evaluation

    @property
    def encoders(self) -> Mapping[str, nn.Module]:
        return {"teacher": self.teacher.encoder, "student": self.student.encoder}

    @torch.no_grad()
    def diagnose(self, views: Views) -> dict[str, Tensor]:
        """Metrics of each image, as means over pairs of views:

        * ``region_score``: cosine of the student's cells with the region that both views share, minus the cosine with
          the same region of other images.
        * ``patch_score``: how much nearer to a patch's true position its best match lies than a random patch, as a
          share of the distance of the latter: 0 by chance, 1 at most.
        * ``rotation_accuracy``: share of rotations that are predicted correctly.

        The mean vector over the batch is subtracted first. Predictions learn it before anything else, it carries no
        information about an image, and it hides the rest.
        """
        teacher = _centred(self.teacher_maps(views.global_crops))
        own, others, nearness, correct = [], [], [], []
        for size, crops in enumerate(views.groups):
            predicted, logits = self.student_maps(crops)
            maps = _centred(predicted)
            pairs = pairs_of(size, crops.count, views.global_crops.count)
            scores = [
                -losses.region(*self.pooled(maps, teacher.roll(shift, 0), crops, views.global_crops, size))[:, *pairs]
                for shift in range(min(len(teacher), 9))  # 0: the image itself, then up to eight others
            ]
            own.append(scores[0])
            others.append(torch.stack(scores[1:]).mean(0) if scores[1:] else torch.zeros_like(scores[0]))
            nearness.append(_nearness(maps, teacher, crops, views.global_crops)[:, *pairs])
            if logits is not None:
                correct.append((logits.argmax(-1) == crops.rotations).float())
        metrics = {
            "region_score": (torch.cat(own, 1) - torch.cat(others, 1)).mean(1),
            "patch_score": torch.cat(nearness, 1).mean(1),
        }
        if correct:
            metrics["rotation_accuracy"] = torch.cat(correct, 1).mean(1)
        return metrics


def _mean(parts: list[Tensor]) -> Tensor:
    """Mean over all pairs (or views) of all sizes and over the batch."""
    return torch.cat([part.flatten() for part in parts]).mean()


def _centred(maps: Tensor) -> Tensor:
    """Maps [B, V, h, w, C] after the mean vector over all of them is subtracted, in float32 at least."""
    lifted = maps.to(torch.promote_types(maps.dtype, torch.float32))
    return lifted - lifted.mean((0, 1, 2, 3))


def _nearness(student: Tensor, teacher: Tensor, view: Crops, seen: Crops) -> Tensor:
    """[B, V, G]: 1 - (mean distance from a patch to its best match) / (mean distance to any patch), in the image.

    Only patches of a view whose centre lies in the teacher's crop count.
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
