"""GTSA: a geometric transformation sensitive architecture (Kim and Lee, arXiv 2304.08014), in the order of the paper.

Switches go beyond the paper; with their defaults the method is the published one (docs/methods/gtsa.md).

Shapes: B images, V views of one size, G global crops, h x w tokens, C channels, c x c pooled cells, K prototypes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from gtsa.core.types import Crops, Method, Tokens, Views
from gtsa.methods.parts import gtsa_switches, losses, region_losses, region_metrics
from gtsa.methods.parts.crops import by_size, by_view
from gtsa.methods.parts.geometry import align, pairs_of
from gtsa.methods.parts.heads import GridPredictor, GridProjector, RotationHead
from gtsa.methods.parts.image_loss import ImageLoss
from gtsa.methods.parts.prototypes import Centre, update_centres
from gtsa.methods.parts.region_losses import recentred
from gtsa.methods.parts.regularizers import WEIGHTS, regularize
from gtsa.methods.parts.teacher import copy_of, follow
from gtsa.models.backbone import Backbone
from gtsa.training.schedules import After, Cosine


class Branch(nn.Module):
    """The network of student and teacher: encoder and projector U."""

    def __init__(self, encoder: Backbone, projector: GridProjector) -> None:
        super().__init__()
        self.encoder, self.projector = encoder, projector


class Predictions(NamedTuple):
    """The student's outputs for the crops of one size."""

    tokens: Tokens  # of B * V crops
    projected: Tensor  # [B * V, h, w, C], of projector U
    maps: Tensor  # [B, V, h, w, C], of predictor H
    rotation: Tensor | None  # logits [B, V, 4], where rotation is predicted


class GTSA(Method):
    """Student and EMA teacher, and the three losses.

    With ``region_loss`` infonce or a ``regularizer`` the loss depends on the batch: accumulated micro-batches are not
    one batch.

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
        center_targets: subtract the running means of the student's and of the teacher's maps before they are compared.
        region_loss: cosine as published; infonce: contrast with cells of other images; prototypes: the teacher's
            Sinkhorn assignments of cells.
        region_temp: temperature of the student's cells, for infonce and prototypes.
        regularizer: loss against collapse on projected patches: sigreg (LeJEPA) or vicreg (variance and covariance).
        regularizer_weight: weight of the regularizer. By default 0.01 for sigreg and 1 for vicreg.
        rotation_tokens: what the rotation head reads: the mean of the patch tokens as published, or the CLS token.
        rotation_channels: share of the channels that it reads, the first ones; 1 as published.
        rotation_decay: fractions of the run between which rotation_weight falls to 0 linearly. By default it stays.
        image_weight: weight of a DINO loss on CLS tokens; 0 leaves it out. The export then pools by the CLS token.
        num_prototypes: number of prototypes of region_loss prototypes and of the image loss.
        teacher_temp: temperature of the teacher's assignments for these two; 0.04 to 0.07 for large data.
    """

    legend = gtsa_switches.legend_of("cosine", "none", False)
    needs_overlap = True
    min_images_with: ClassVar = {"region_loss": {"infonce": 2}}
    idle_settings: ClassVar = {
        "region_temp": {"region_loss": ("cosine",)},
        "regularizer_weight": {"regularizer": ("none",)},
        "rotation_tokens": {"rotation_weight": (0.0,)},
        "rotation_channels": {"rotation_weight": (0.0,)},
        "rotation_decay": {"rotation_weight": (0.0,)},
        "num_prototypes": {"region_loss": ("cosine", "infonce"), "image_weight": (0.0,)},
        "teacher_temp": {"region_loss": ("cosine", "infonce"), "image_weight": (0.0,)},
    }
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
        center_targets: bool = False,
        region_loss: Literal["cosine", "infonce", "prototypes"] = "cosine",
        region_temp: float = 0.1,
        regularizer: Literal["none", "sigreg", "vicreg"] = "none",
        regularizer_weight: float | None = None,
        rotation_tokens: Literal["mean", "cls"] = "mean",
        rotation_channels: float = 1.0,
        rotation_decay: tuple[float, float] | None = None,
        image_weight: float = 0.0,
        num_prototypes: int = 1024,
        teacher_temp: float = 0.02,
    ) -> None:
        super().__init__()
        sizes = projector_dim, out_dim, predictor_dim, num_prototypes, *(cells or ()), *(matches or ())
        weights = region_weight, patch_weight, rotation_weight, image_weight, regularizer_weight or 0.0
        gtsa_switches.check_settings(sizes, weights, (region_temp, teacher_temp), momentum)
        gtsa_switches.check_rotation(rotation_channels, rotation_decay)
        if image_weight > 0 or (rotation_weight > 0 and rotation_tokens == "cls"):
            gtsa_switches.check_cls_token(encoder.model, encoder.num_prefix_tokens)
        encoder.pooling = "cls" if image_weight > 0 else encoder.pooling
        self.student = Branch(encoder, GridProjector(encoder.embed_dim, projector_dim, out_dim))
        self.teacher = copy_of(self.student)
        self.predictor = GridPredictor(out_dim, predictor_dim)
        self.rotation_width = max(1, round(rotation_channels * encoder.embed_dim))
        self.rotation_head = RotationHead(self.rotation_width) if rotation_weight > 0 else None
        self.cells, self.matches = cells, matches
        self.region_weight, self.image_weight = region_weight, image_weight
        self.patch_weight = After(patch_start, patch_weight)
        self.rotation_weight = gtsa_switches.decaying(rotation_weight, rotation_decay)
        self.regularizer_weight = WEIGHTS[regularizer] if regularizer_weight is None else regularizer_weight
        self.region_target, self.rotation_tokens, self.regularizer = region_target, rotation_tokens, regularizer
        self.momentum = Cosine(momentum, 1.0)
        self.student_centre, self.teacher_centre = (Centre(out_dim) if center_targets else None for _ in range(2))
        self.region_loss = region_losses.build(region_loss, out_dim, region_temp, num_prototypes, teacher_temp)
        image = encoder.embed_dim, num_prototypes, predictor_dim, teacher_temp
        self.image_loss = ImageLoss(*image) if image_weight > 0 else None
        self.legend = gtsa_switches.legend_of(region_loss, regularizer, image_weight > 0)

    def forward(self, views: Views, time: float) -> dict[str, Tensor]:
        seen, patch_weight = views.global_crops, self.patch_weight(time)
        teacher_tokens, teacher = self.targets(seen)  # of B * G crops; [B, G, h, w, C]
        teacher, student = recentred(teacher, self.teacher_centre), self.predictions(views.groups)
        region, patch, rotation, correct = [], [], [], []
        for size, (crops, predicted) in enumerate(zip(views.groups, student, strict=True)):
            maps = recentred(predicted.maps, self.student_centre)
            pairs = pairs_of(size, crops.count, seen.count)
            cells = self.pooled(maps, teacher, crops, seen, size)
            region.append(self.region_loss(*cells, crops, seen, pairs))  # [B, pairs]
            if patch_weight > 0:
                patch.append(self.patch_loss(maps, teacher, size)[:, *pairs])
            if predicted.rotation is not None:
                rotation.append(losses.rotation(predicted.rotation, crops.rotations))  # [B, V]
                correct.append((predicted.rotation.detach().argmax(-1) == crops.rotations).float())

        parts = {"region": _mean(region)}
        loss = self.region_weight * parts["region"]
        if patch:
            parts["patch"] = _mean(patch)
            loss = loss + patch_weight * parts["patch"]
        if rotation:
            parts["rotation"] = _mean(rotation)
            parts["rotation_accuracy"] = _mean(correct)
            loss = loss + self.rotation_weight(time) * parts["rotation"]
        if self.regularizer != "none":
            parts["regularizer"] = regularize(self.regularizer, [predicted.projected for predicted in student], time)
            loss = loss + self.regularizer_weight * parts["regularizer"]
        if self.image_loss is not None:
            parts["image"] = self.image_loss([predicted.tokens for predicted in student], teacher_tokens, views.groups)
            loss = loss + self.image_weight * parts["image"]
        return {"loss": loss, **parts}

    def after_step(self, time: float, next_time: float, accepted: Tensor | float = 1.0) -> None:
        if centres := [module for module in self.modules() if isinstance(module, Centre)]:
            update_centres(centres, accepted)
        follow(self.teacher, self.student, self.momentum(next_time), accepted)
        if self.image_loss is not None:
            self.image_loss.follow(self.momentum(next_time), accepted)

    def train(self, mode: bool = True) -> GTSA:
        super().train(mode)
        self.teacher.eval()  # the teacher never has drop path
        return self

    # The networks (section 3.1)

    def teacher_maps(self, crops: Crops) -> Tensor:
        """The teacher's projected maps [B, G, h, w, C]."""
        return self.targets(crops)[1]

    @torch.no_grad()
    def targets(self, crops: Crops) -> tuple[Tokens, Tensor]:
        """The teacher's tokens of B * G crops, and its projected maps [B, G, h, w, C]."""
        tokens: Tokens = self.teacher.encoder(crops.pixels.flatten(0, 1))
        return tokens, by_view(self.teacher.projector(tokens.patches), crops)

    def student_maps(self, crops: Crops) -> tuple[Tensor, Tensor | None]:
        """Predicted maps [B, V, h, w, C], and rotation logits [B, V, 4] where rotation is predicted."""
        predicted = self.predictions([crops])[0]
        return predicted.maps, predicted.rotation

    def predictions(self, groups: Sequence[Crops]) -> list[Predictions]:
        """Of the crops of each size, in one pass of the encoder and of the rotation head."""
        tokens = self.student.encoder.side_by_side([crops.pixels.flatten(0, 1) for crops in groups])
        projected = [self.student.projector(each.patches) for each in tokens]
        maps = [by_view(self.predictor(each), crops) for each, crops in zip(projected, groups, strict=True)]
        nothing = [None] * len(groups)
        rotation = nothing if self.rotation_head is None else by_size(self.rotation_logits(tokens), groups)
        return list(map(Predictions, tokens, projected, maps, rotation))

    def rotation_logits(self, tokens: Sequence[Tokens]) -> Tensor:
        """Head P on one vector of each crop: logits [N, 4] for all crops of all sizes."""
        assert self.rotation_head is not None
        of_cls = self.rotation_tokens == "cls"
        vectors = torch.cat([each.prefix[:, 0] if of_cls else each.patches.mean((1, 2)) for each in tokens])
        logits: Tensor = self.rotation_head(vectors[:, : self.rotation_width])
        return logits

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
        * ``patch_score``: how near to its true position a patch's best match lies (``region_metrics.nearness``).
        * ``rotation_accuracy``: share of rotations that are predicted correctly.

        The mean vector over the batch is subtracted first. Predictions learn it before anything else, it carries no
        information about an image, and it hides the rest.
        """
        teacher = region_metrics.centred(self.teacher_maps(views.global_crops))
        gains, nearness, correct = [], [], []
        for size, crops in enumerate(views.groups):
            predicted, logits = self.student_maps(crops)
            maps = region_metrics.centred(predicted)
            pairs = pairs_of(size, crops.count, views.global_crops.count)
            scores = [
                -losses.region(*self.pooled(maps, teacher.roll(shift, 0), crops, views.global_crops, size))[:, *pairs]
                for shift in range(min(len(teacher), 9))  # 0: the image itself, then up to eight others
            ]
            gains.append(scores[0] - (torch.stack(scores[1:]).mean(0) if scores[1:] else 0))
            nearness.append(region_metrics.nearness(maps, teacher, crops, views.global_crops)[:, *pairs])
            if logits is not None:
                correct.append((logits.argmax(-1) == crops.rotations).float())
        metrics = {"region_score": torch.cat(gains, 1).mean(1), "patch_score": torch.cat(nearness, 1).mean(1)}
        if correct:
            metrics["rotation_accuracy"] = torch.cat(correct, 1).mean(1)
        return metrics


def _mean(parts: list[Tensor]) -> Tensor:
    """Mean over all pairs (or views) of all sizes and over the batch."""
    return torch.cat([part.flatten() for part in parts]).mean()
