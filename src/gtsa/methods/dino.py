"""DINO: self-distillation with no labels (Caron et al. 2021, arXiv 2104.14294), in the order of the paper.

Shapes: B images, V views of one size, G global crops, D width of a token, K prototypes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from gtsa.core.errors import UserError
from gtsa.core.types import Crops, Method, Views
from gtsa.methods.parts import losses, prototypes
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
    """The network of student and teacher: encoder and head, which reads the CLS token."""

    def __init__(self, encoder: Backbone, head: PrototypeHead) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, groups: Sequence[Crops], frozen: bool = False) -> tuple[list[Tensor], list[Tensor]]:
        """Logits [B, V, K] and CLS tokens [B, V, D] of the crops of each size."""
        tokens = self.encoder.side_by_side([crops.pixels.flatten(0, 1) for crops in groups])
        cls = torch.cat([each.prefix[:, 0] for each in tokens])
        both = (
            torch.split(values, [crops.rotations.numel() for crops in groups])
            for values in (self.head(cls, frozen), cls)
        )
        logits, features = (
            [part.reshape(*crops.rotations.shape, -1) for part, crops in zip(parts, groups, strict=True)]
            for parts in both
        )
        return logits, features


class DINO(Method):
    """Student and teacher assign views to prototypes. Views of one image are to get the same assignment.

    Args:
        encoder: the student's encoder; the teacher starts as its copy.
        num_prototypes: number of prototypes. auto: 65,536 as published; 1,024 to 4,096 below 20,000 images.
        hidden_dim: width of the head's hidden layers.
        bottleneck_dim: width of the vectors that are compared with the prototypes.
        student_temp: temperature of the student's softmax.
        teacher_temp: temperature of the teacher's softmax at the start, and after its warm-up. auto: 0.04 and 0.07 as
            published; below 20,000 images 0.02, because the logits of small networks differ less between images.
        teacher_temp_warmup: fraction of the run in which the teacher's temperature rises linearly. Published are 30 of
            100 epochs, of which the last has the end value already.
        freeze_last_layer: fraction of the run, from its start, in which the student's prototypes are frozen.
        center_momentum: momentum of the centre, the running mean of the teacher's logits.
        momentum: momentum of the EMA teacher at the start; it rises to 1 along a cosine.
        targets: how the teacher's logits become targets. centering: as in DINO; sinkhorn: as in DINOv2, by three
            iterations over the global crops of a micro-batch of all processes, each prototype used alike.
        koleo_weight: weight of KoLeo (DINOv2: 0.1; 0 leaves it out). It spreads the CLS tokens of the images of a
            micro-batch in one process, for each global crop on its own; the sum over global crops.
    """

    legend = "loss = cross-entropy with the teacher; teacher_entropy = share of log K (0: one prototype, 1: uniform)"
    published_settings: ClassVar = {"views": VIEWS}
    auto_settings: ClassVar = {"num_prototypes": prototypes_for, "teacher_temp": temperatures_for}
    min_images_with: ClassVar = {"koleo_weight": 2}
    search_space: ClassVar = {
        "momentum": (0.996, 0.997, 0.998, 0.999),  # with 0.99 the teachers of small networks collapse
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
        targets: Literal["centering", "sinkhorn"] = "centering",
        koleo_weight: float = 0.0,
    ) -> None:
        super().__init__()
        if koleo_weight < 0:
            raise UserError(f"dino.koleo_weight: must not be negative, not {koleo_weight}; DINOv2 has 0.1, 0 is none")
        sizes = num_prototypes, hidden_dim, bottleneck_dim
        temperatures = student_temp, *teacher_temp
        prototypes.check_head("dino", sizes, temperatures, encoder.model, encoder.num_prefix_tokens)
        prototypes.check_shares(
            "dino",
            teacher_temp_warmup=teacher_temp_warmup,
            freeze_last_layer=freeze_last_layer,
            center_momentum=center_momentum,
            momentum=momentum,
        )
        encoder.pooling = "cls"
        self.student = Branch(encoder, PrototypeHead(encoder.embed_dim, *sizes))
        self.teacher = copy_of(self.student)
        self.centre = Centre(num_prototypes, center_momentum, targets)
        self.student_temp = student_temp
        self.teacher_temp = Ramp(*teacher_temp, teacher_temp_warmup)
        self.freeze_last_layer = freeze_last_layer
        self.momentum = Cosine(momentum, 1.0)
        self.koleo_weight = koleo_weight
        if koleo_weight > 0:
            self.legend = self.legend.replace("loss =", "view =") + "; koleo = lower: images lie further apart"

    def forward(self, views: Views, time: float) -> dict[str, Tensor]:
        teacher = self.teacher_probs(views.global_crops, time)  # [B, G, K]
        cross_entropies = []
        students, cls = self.student(views.groups, frozen=time < self.freeze_last_layer)
        for size, logits in enumerate(students):  # [B, V, K]
            pairs = pairs_of(size, logits.shape[1], views.global_crops.count)
            cross_entropies.append(losses.cross_view(logits / self.student_temp, teacher)[:, *pairs])  # [B, pairs]
        loss, parts = torch.cat(cross_entropies, 1).mean(), {}
        if self.koleo_weight > 0:
            parts = {"view": loss, "koleo": losses.koleo(cls[0].transpose(0, 1)).sum()}  # of global crops
            loss = loss + self.koleo_weight * parts["koleo"]
        return {"loss": loss, **parts, "teacher_entropy": losses.entropy(teacher).mean()}

    def after_step(self, time: float, next_time: float, accepted: Tensor | float = 1.0) -> None:
        prototypes.update_centres([self.centre], accepted)
        follow(self.teacher, self.student, self.momentum(time), accepted)

    def train(self, mode: bool = True) -> DINO:
        super().train(mode)
        self.teacher.eval()  # the teacher never has drop path
        return self

    # Avoiding collapse: centring and sharpening (section 3.1)

    @torch.no_grad()
    def teacher_probs(self, crops: Crops, time: float) -> Tensor:
        """Probabilities [B, G, K] of the teacher; the centre accumulates its logits."""
        (logits,), _ = self.teacher([crops])
        probs = self.centre.sharpened(logits, self.teacher_temp(time))
        self.centre.accumulate(logits)
        return probs

    # For evaluation

    @property
    def encoders(self) -> Mapping[str, nn.Module]:
        return {"teacher": self.teacher.encoder, "student": self.student.encoder}

    @torch.no_grad()
    def diagnose(self, views: Views) -> dict[str, Tensor]:
        """``image_score`` and ``teacher_information`` of each image, at the teacher's last temperature."""
        (students, _), ((teacher,), _) = self.student(views.groups), self.teacher([views.global_crops])
        return prototypes.diagnose(students, teacher, self.centre, self.teacher_temp(1.0))
