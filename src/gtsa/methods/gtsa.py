"""GTSA: a geometric transformation sensitive architecture (Kim and Lee, arXiv 2304.08014), in the order of the paper.

Shapes: B images, V views of one size, G global crops, h x w tokens, C channels, c x c pooled cells.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from gtsa import losses
from gtsa.backbone import Backbone
from gtsa.core import Crops, Method, Remedy, Views
from gtsa.geometry import inside, overlap, pool, rotate_boxes, rotate_maps
from gtsa.heads import GridPredictor, GridProjector, RotationHead
from gtsa.schedules import After, Cosine
from gtsa.teacher import copy_of, follow


class Branch(nn.Module):
    """What student and teacher have in common: encoder and projector U."""

    def __init__(self, encoder: Backbone, projector: GridProjector) -> None:
        super().__init__()
        self.encoder, self.projector = encoder, projector


class GTSA(Method):
    """Student and teacher, the three losses, and the moving average.

    Args:
        encoder: the student's encoder; the teacher starts as its copy.
        projector_dim, out_dim, predictor_dim: widths of projector U and predictor H.
        cells: pooled cells a side for (global, local) views; None: round(0.7 g) for a g x g token grid.
        matches: kept patch matches for (global, local) views; None: floor(g g / 2).
        region_weight, patch_weight, rotation_weight: weights of the three losses; 0 leaves a loss out.
        patch_start: time from which patch correspondence counts.
        region_target: ``overlap``, the pooled region that student and teacher both show; or ``global``, the mean of
            either whole map, which makes the method insensitive to cropping (an ablation).
        momentum: of the teacher at the start; it rises to 1 along a cosine.
    """

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
            raise Remedy("gtsa: widths, cells and matches must be at least 1")
        if min(region_weight, patch_weight, rotation_weight) < 0:
            raise Remedy("gtsa: weights of the losses must not be negative; 0 leaves a loss out")
        if not 0 <= momentum <= 1:
            raise Remedy(f"gtsa.momentum: from 0 to 1, not {momentum}; published is 0.996")
        self.student = Branch(encoder, GridProjector(encoder.width, projector_dim, out_dim))
        self.teacher = copy_of(self.student)
        self.predictor = GridPredictor(out_dim, predictor_dim)
        self.rotation_head = RotationHead(encoder.width) if rotation_weight > 0 else None
        self.cells, self.matches = cells, matches
        self.region_weight, self.rotation_weight = region_weight, rotation_weight
        self.patch_weight = After(patch_start, patch_weight)
        self.region_target = region_target
        self.momentum = Cosine(momentum, 1.0)

    def forward(self, views: Views, time: float) -> dict[str, Tensor]:
        teacher = self.teacher_maps(views.global_crops)  # [B, G, h, w, C]
        patch_weight = self.patch_weight(time)
        region, patch, rotation, correct = [], [], [], []
        for size, crops in enumerate(views.groups):
            maps, logits = self.student_maps(crops)  # [B, V, h, w, C], [B, V, 4]
            student_cells, target_cells = self.pooled(maps, teacher, crops, views.global_crops, size)
            pairs = _pairs(size, crops, views.global_crops)
            region.append(losses.region(student_cells, target_cells)[:, *pairs])  # [B, pairs]
            if patch_weight > 0:
                patch.append(self.patch_loss(maps, teacher, size)[:, *pairs])
            if logits is not None:
                rotation.append(losses.rotation(logits, crops.turns))  # [B, V]
                correct.append((logits.detach().argmax(-1) == crops.turns).float())

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

    def after_step(self, time: float, accepted: Tensor | float = 1.0) -> None:
        follow(self.teacher, self.student, self.momentum(time), accepted)

    def train(self, mode: bool = True) -> GTSA:
        super().train(mode)
        self.teacher.eval()  # no drop path in the teacher, ever
        return self

    # The networks (section 3.1)

    @torch.no_grad()
    def teacher_maps(self, crops: Crops) -> Tensor:
        """[B, G, h, w, C] projected maps of the teacher."""
        maps: Tensor = self.teacher.projector(self.teacher.encoder(crops.pixels.flatten(0, 1)).patches)
        return maps.reshape(*crops.turns.shape, *maps.shape[1:])

    def student_maps(self, crops: Crops) -> tuple[Tensor, Tensor | None]:
        """Predicted maps [B, V, h, w, C], and rotation logits [B, V, 4] where rotation is predicted."""
        patches = self.student.encoder(crops.pixels.flatten(0, 1)).patches
        maps = self.predictor(self.student.projector(patches)).unflatten(0, crops.turns.shape)
        if self.rotation_head is None:
            return maps, None
        return maps, self.rotation_head(patches.mean((1, 2))).unflatten(0, crops.turns.shape)

    # The target that moves with the crop and turns with it (sections 3.2 and 3.3)

    def pooled(self, student: Tensor, teacher: Tensor, view: Crops, seen: Crops, size: int) -> tuple[Tensor, Tensor]:
        """What student and teacher say of the region both show, in the student's orientation.

        Args:
            student: [B, V, h, w, C] maps of the crops ``view``, whose ``size`` is 0 (global) or 1 (local).
            teacher: [B, G, h, w, C] maps of the crops ``seen``.

        Returns:
            Two tensors [B, V, G, c, c, C].
        """
        if self.region_target == "global":
            mine, target = student.mean((2, 3))[:, :, None], teacher.mean((2, 3))[:, None]
            shape = (*student.shape[:2], teacher.shape[1], 1, 1, student.shape[-1])
            return mine[..., None, None, :].expand(shape), target[..., None, None, :].expand(shape)
        boxes, seen_boxes = regions(view, seen)
        cells = self.cells[size] if self.cells else round(0.7 * student.shape[2])
        mine = pool(student, boxes * (student.shape[2] / view.side), cells)  # [B, V, G, c, c, C]
        target = pool(teacher, seen_boxes * (teacher.shape[2] / seen.side), cells)  # [B, G, V, c, c, C]
        turns = view.turns[:, None] - seen.turns[:, :, None]  # [B, G, V]
        return mine, rotate_maps(target, turns).transpose(1, 2)

    # What looks alike, wherever it is (section 3.4)

    def patch_loss(self, student: Tensor, teacher: Tensor, size: int) -> Tensor:
        """[B, V, G] patch correspondence of whole maps [B, V, h, w, C] and [B, G, h, w, C]."""
        mine, theirs = student.flatten(2, 3), teacher.flatten(2, 3)
        matches = self.matches[size] if self.matches else max(1, mine.shape[2] // 2)
        return losses.patch_correspondence(mine[:, :, None], theirs[:, None], min(matches, theirs.shape[2]))

    # For evaluation

    @property
    def encoders(self) -> Mapping[str, nn.Module]:
        return {"teacher": self.teacher.encoder, "student": self.student.encoder}

    @torch.no_grad()
    def diagnose(self, views: Views) -> dict[str, Tensor]:
        """Per image: how much better the student's cells meet the true region than regions of other images (cosine,
        mean over pairs), the same for patch matches, and the share of rotations it names.
        """
        teacher = self.teacher_maps(views.global_crops)
        region, patch, correct = [], [], []
        for size, crops in enumerate(views.groups):
            maps, logits = self.student_maps(crops)
            pairs = _pairs(size, crops, views.global_crops)
            for shift in range(min(len(teacher), 9)):  # 0: the image itself, then up to eight others
                other = teacher.roll(shift, 0)
                cells = self.pooled(maps, other, crops, views.global_crops, size)
                region.append(-losses.region(*cells)[:, *pairs])
                patch.append(-self.patch_loss(maps, other, size)[:, *pairs])
            if logits is not None:
                correct.append((logits.argmax(-1) == crops.turns).float())
        shifts = len(region) // len(views.groups)
        figures = {"region_score": _better(region, shifts), "patch_score": _better(patch, shifts)}
        if correct:
            figures["rotation_accuracy"] = torch.cat(correct, 1).mean(1)
        return figures


def regions(view: Crops, seen: Crops) -> tuple[Tensor, Tensor]:
    """The overlap of every view with every teacher's crop, in the pixel frame of either as it lies after rotation.

    Returns:
        Boxes [B, V, G, 4] in the views and [B, G, V, 4] in the teacher's crops.
    """
    common = overlap(view.boxes[:, :, None], seen.boxes[:, None])  # [B, V, G, 4] in the image
    mine = rotate_boxes(inside(common, view.boxes[:, :, None], view.side), view.turns[:, :, None], view.side)
    theirs = rotate_boxes(inside(common, seen.boxes[:, None], seen.side), seen.turns[:, None], seen.side)
    return mine, theirs.transpose(1, 2)


def _pairs(size: int, view: Crops, seen: Crops) -> tuple[Tensor, Tensor]:
    """Which (view, teacher's crop) count: all, but no global crop with itself. Two index tensors."""
    apart = torch.ones(view.count, seen.count, dtype=torch.bool)
    if size == 0:
        apart.fill_diagonal_(False)
    v, g = apart.nonzero(as_tuple=True)
    return v, g


def _mean(parts: list[Tensor]) -> Tensor:
    """Mean over all pairs (or views) of all sizes and over the batch."""
    return torch.cat([part.flatten() for part in parts]).mean()


def _better(scores: list[Tensor], shifts: int) -> Tensor:
    """Per image: the score of the image's own target less the mean of other images'; [B] from [B, pairs] per shift."""
    own = torch.cat(scores[::shifts], 1).mean(1)
    others = [torch.cat(scores[shift::shifts], 1).mean(1) for shift in range(1, shifts)]
    return own - torch.stack(others).mean(0) if others else own
