"""DINO: self-distillation with no labels (Caron et al. 2021, arXiv 2104.14294), in the order of the paper.

Shapes: B images, V views of one size, G global crops, D width of a token, K prototypes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from gtsa.core.errors import UserError
from gtsa.core.types import Crops, Method, Views
from gtsa.methods.parts import losses
from gtsa.methods.parts.geometry import pairs_of
from gtsa.methods.parts.prototypes import Centre, PrototypeHead, prototypes_for, temperatures_for
from gtsa.methods.parts.teacher import copy_of, follow
from gtsa.models.backbone import Backbone
from gtsa.training.schedules import Cosine, Ramp

VIEWS = {
    "rotations": False, "hflip": 0.5, "global_crops_scale": (0.4, 1.0), "local_crops_scale": (0.05, 0.4),
    "global_overlap": 0.0, "local_overlap": 0.0, "brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1,
    "gaussian_blur": (1.0, 0.1, 0.5), "solarize": (0.0, 0.2, 0.0),
}  # fmt: skip


class Branch(nn.Module):
    """What student and teacher have in common: encoder and head, which reads the CLS token."""

    def __init__(self, encoder: Backbone, head: PrototypeHead) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, crops: Crops, frozen: bool = False) -> Tensor:
        """Logits [B, V, K]."""
        logits: Tensor = self.head(self.encoder(crops.pixels.flatten(0, 1)).prefix[:, 0], frozen)
        return logits.reshape(*crops.rotations.shape, -1)


class DINO(Method):
    """Student and teacher say of views of one image which prototypes they show, and are to agree.

    Args:
        encoder: the student's encoder; the teacher starts as its copy.
        num_prototypes: K, outputs of the head. auto: 65,536 as published; 1,024 to 4,096 below 20,000 images.
        hidden_dim: width of the head's hidden layers.
        bottleneck_dim: width of what is compared with the prototypes.
        student_temp: of the student's softmax.
        teacher_temp: of the teacher's softmax at the start, and from the end of its warm-up on. auto: 0.04 and
            0.07 as published; below 20,000 images 0.02, since small networks' heads tell images apart by less.
        teacher_temp_warmup: time in which it rises, linearly. Published are 30 of 100 epochs, the last of them at the
            end value already.
        freeze_last_layer: time in which the student's prototypes stay as they are.
        center_momentum: share of the centre that is kept in a step.
        momentum: of the teacher at the start; it rises to 1 along a cosine.
    """

    published_settings: ClassVar = {"views": VIEWS}
    auto_settings: ClassVar = {"num_prototypes": prototypes_for, "teacher_temp": temperatures_for}
    search_space: ClassVar = {
        "momentum": (0.996, 0.997, 0.998, 0.999),  # small networks' teachers collapse with 0.99
        "teacher_temp": ((0.02, 0.02), (0.02, 0.04), (0.04, 0.04), (0.04, 0.07)),
    }

    def __init__(
        self,
        encoder: Backbone,
        num_prototypes: int = 65536,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        student_temp: float = 0.1,
        teacher_temp: tuple[float, float] = (0.04, 0.07),
        teacher_temp_warmup: float = 0.29,
        freeze_last_layer: float = 0.01,
        center_momentum: float = 0.9,
        momentum: float = 0.996,
    ) -> None:
        super().__init__()
        if min(num_prototypes, hidden_dim, bottleneck_dim) < 1:
            raise UserError("dino: num_prototypes, hidden_dim and bottleneck_dim must be at least 1")
        if min(student_temp, *teacher_temp) <= 0:
            raise UserError("dino: temperatures must be above 0; published are 0.1, and 0.04 to 0.07")
        if not all(0 <= share <= 1 for share in (teacher_temp_warmup, freeze_last_layer, center_momentum, momentum)):
            raise UserError("dino: teacher_temp_warmup, freeze_last_layer, center_momentum, momentum: from 0 to 1")
        if not encoder.num_prefix_tokens:
            raise UserError(f"dino reads the CLS token, and {encoder.model} has none; choose a model that has one")
        encoder.pooling = "cls"
        self.student = Branch(encoder, PrototypeHead(encoder.embed_dim, num_prototypes, hidden_dim, bottleneck_dim))
        self.teacher = copy_of(self.student)
        self.centre = Centre(num_prototypes, center_momentum)
        self.student_temp = student_temp
        self.teacher_temp = Ramp(*teacher_temp, teacher_temp_warmup)
        self.freeze_last_layer = freeze_last_layer
        self.momentum = Cosine(momentum, 1.0)

    def forward(self, views: Views, time: float) -> dict[str, Tensor]:
        teacher = self.teacher_says(views.global_crops, time)  # [B, G, K]
        found = []
        for size, crops in enumerate(views.groups):
            logits = self.student(crops, frozen=time < self.freeze_last_layer)  # [B, V, K]
            pairs = pairs_of(size, crops.count, views.global_crops.count)
            found.append(losses.cross_view(logits / self.student_temp, teacher)[:, *pairs])  # [B, pairs]
        entropy = -(teacher * teacher.clamp(min=1e-12).log()).sum(-1).mean()
        return {"loss": torch.cat(found, 1).mean(), "teacher_entropy": entropy / math.log(teacher.shape[-1])}

    def after_step(self, time: float, next_time: float, accepted: Tensor | float = 1.0) -> None:
        self.centre.follow(accepted)
        follow(self.teacher, self.student, self.momentum(time), accepted)

    def train(self, mode: bool = True) -> DINO:
        super().train(mode)
        self.teacher.eval()  # no drop path in the teacher, ever
        return self

    # Avoiding collapse: centring and sharpening (section 3.1)

    @torch.no_grad()
    def teacher_says(self, crops: Crops, time: float) -> Tensor:
        """Probabilities [B, G, K]."""
        logits = self.teacher(crops)
        said = self.centre.sharpened(logits, self.teacher_temp(time))
        self.centre.gather(logits)
        return said

    # For evaluation

    @property
    def encoders(self) -> Mapping[str, nn.Module]:
        return {"teacher": self.teacher.encoder, "student": self.student.encoder}

    @torch.no_grad()
    def diagnose(self, views: Views) -> dict[str, Tensor]:
        """Per image ``image_score``, the mean over pairs of views: cosine of what the student says of a view with what
        the teacher says of another view of the same image, less that with other images. The mean over the batch is
        taken off both first. And ``teacher_information``: what the teacher tells of the image, at the temperature of
        the end, as a share of what it could tell.
        """
        students, teacher = [self.student(crops) for crops in views.groups], self.teacher(views.global_crops)
        said = self.centre.sharpened(teacher, self.teacher_temp(1.0))
        return {"image_score": losses.told_apart(students, teacher), "teacher_information": losses.information(said)}
