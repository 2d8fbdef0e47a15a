"""iBOT: image BERT pre-training with online tokenizer (Zhou et al. 2022, arXiv 2111.07832), in the order of the paper.

Shapes: B images, V views of one size, G global crops, h x w patches, D width, K prototypes, M masked patches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from gtsa.core.errors import UserError
from gtsa.core.types import Crops, Method, Tokens, Views
from gtsa.methods.parts import losses, masking, prototypes
from gtsa.methods.parts.geometry import pairs_of
from gtsa.methods.parts.prototypes import Centre, PrototypeHead, prototypes_for, temperatures_for
from gtsa.methods.parts.teacher import copy_of, follow
from gtsa.models.backbone import Backbone
from gtsa.training.schedules import Cosine, Ramp

VIEWS = {
    "rotations": False, "hflip": 0.5, "global_crops_scale": (0.25, 1.0), "local_crops_scale": (0.05, 0.25),
    "local_crops_number": 10, "global_overlap": 0.0, "local_overlap": 0.0, "brightness": 0.4, "contrast": 0.4,
    "saturation": 0.2, "hue": 0.1, "gaussian_blur": (1.0, 0.1, 0.5), "solarize": (0.0, 0.2, 0.0),
}  # fmt: skip


class Branch(nn.Module):
    """The network of student and teacher: encoder, and one head for CLS and patch tokens."""

    def __init__(self, encoder: Backbone, head: PrototypeHead) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head


class IBOT(Method):
    """DINO, and masked patches: the student predicts the teacher's assignments of patches that it does not see.

    Args:
        encoder: the student's encoder; the teacher starts as its copy.
        num_prototypes: number of prototypes. auto: 8,192 as published; 1,024 to 4,096 below 20,000 images.
        hidden_dim: width of the head's hidden layers.
        bottleneck_dim: width of the vectors that are compared with the prototypes.
        student_temp: temperature of the student's softmax.
        teacher_temp: temperature of the teacher's softmax of CLS tokens, at the start and after its warm-up. auto: 0.04
            and 0.07 as published; below 20,000 images 0.02, because the logits of small networks differ less between
            images.
        teacher_patch_temp: the same for patches, 0.04 and 0.07 as published. With 0.02 few prototypes win for all
            patches.
        teacher_temp_warmup: fraction of the run in which the teacher's temperatures rise linearly. Published are 30 of
            100 epochs, of which the last has the end value already.
        mask_ratio: range of the mask ratio: the fraction of a global crop's patches that the student does not see.
        mask_probability: probability that a global crop is masked.
        patch_weight: weight of the loss on masked patches.
        freeze_last_layer: fraction of the run, from its start, in which the student's prototypes are frozen.
        center_momentum: momentum of each centre, the running mean of the teacher's logits.
        momentum: momentum of the EMA teacher at the start; it rises to 1 along a cosine.
        targets: how the teacher's logits become targets. centering: as in iBOT; sinkhorn: as in DINOv2, by three
            iterations over the global crops, and over the masked patches, of a micro-batch of all processes.
    """

    legend = (
        "view, patch = cross-entropy with the teacher, of CLS tokens and of masked patches; teacher_entropy = of CLS "
        "tokens, share of log K (0: one prototype, 1: uniform)"
    )
    published_settings: ClassVar = {"views": VIEWS}
    auto_settings: ClassVar = {
        "num_prototypes": lambda images: min(8192, prototypes_for(images)),
        "teacher_temp": temperatures_for,
    }
    search_space: ClassVar = {
        "momentum": (0.996, 0.997, 0.998, 0.999),  # with 0.99 the teachers of small networks collapse
        "teacher_temp": ((0.02, 0.02), (0.02, 0.04), (0.04, 0.04), (0.04, 0.07)),
    }

    def __init__(
        self,
        encoder: Backbone,
        num_prototypes: int = 8192,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        student_temp: float = 0.1,
        teacher_temp: tuple[float, float] = (0.04, 0.07),
        teacher_patch_temp: tuple[float, float] = (0.04, 0.07),
        teacher_temp_warmup: float = 0.29,
        mask_ratio: tuple[float, float] = (0.1, 0.5),
        mask_probability: float = 0.5,
        patch_weight: float = 1.0,
        freeze_last_layer: float = 0.01,
        center_momentum: float = 0.9,
        momentum: float = 0.996,
        targets: Literal["centering", "sinkhorn"] = "centering",
    ) -> None:
        super().__init__()
        sizes = num_prototypes, hidden_dim, bottleneck_dim
        temperatures = student_temp, *teacher_temp, *teacher_patch_temp
        prototypes.check_head("ibot", sizes, temperatures, encoder.model, encoder.num_prefix_tokens)
        prototypes.check_shares(
            "ibot",
            mask_probability=mask_probability,
            teacher_temp_warmup=teacher_temp_warmup,
            freeze_last_layer=freeze_last_layer,
            center_momentum=center_momentum,
            momentum=momentum,
        )
        if not 0 <= mask_ratio[0] <= mask_ratio[1] <= 1:
            raise UserError(f"ibot.mask_ratio: 0 <= low <= high <= 1, not {mask_ratio[0]} {mask_ratio[1]}")
        if patch_weight < 0:
            raise UserError(f"ibot.patch_weight: must not be negative, not {patch_weight}; 0 leaves the loss out")
        encoder.pooling = "cls"
        self.student = Branch(encoder, PrototypeHead(encoder.embed_dim, *sizes))
        self.teacher = copy_of(self.student)
        self.mask_token = nn.Parameter(torch.zeros(1, encoder.embed_dim))
        self.centre = Centre(num_prototypes, center_momentum, targets)
        self.patch_centre = Centre(num_prototypes, center_momentum, targets)
        self.student_temp = student_temp
        self.teacher_temp = Ramp(*teacher_temp, teacher_temp_warmup)
        self.teacher_patch_temp = Ramp(*teacher_patch_temp, teacher_temp_warmup)
        self.mask_ratio, self.mask_probability, self.patch_weight = mask_ratio, mask_probability, patch_weight
        self.freeze_last_layer = freeze_last_layer
        self.momentum = Cosine(momentum, 1.0)

    def forward(self, views: Views, time: float) -> dict[str, Tensor]:
        frozen, seen = time < self.freeze_last_layer, views.global_crops
        with torch.no_grad():
            (target,) = self._tokens(self.teacher, [seen])
            (logits,) = self._cls(self.teacher, [target], [seen])
        probs = self.centre.sharpened(logits, self.teacher_temp(time))  # [B, G, K]
        self.centre.accumulate(logits)
        masked = self.mask(seen, target.patches.shape[1]).to(target.patches.device)  # [B * G, h, w]

        tokens = self._tokens(self.student, views.groups, masked)
        cross_entropies = []
        for size, logits in enumerate(self._cls(self.student, tokens, views.groups, frozen)):  # [B, V, K]
            pairs = pairs_of(size, logits.shape[1], seen.count)
            cross_entropies.append(losses.cross_view(logits / self.student_temp, probs)[:, *pairs])
        parts = {
            "view": torch.cat(cross_entropies, 1).mean(),
            "patch": self._patch_loss(tokens[0], target, masked, time, frozen),
            "teacher_entropy": losses.entropy(probs).mean(),
        }
        return {"loss": parts["view"] + self.patch_weight * parts["patch"], **parts}

    def after_step(self, time: float, next_time: float, accepted: Tensor | float = 1.0) -> None:
        prototypes.update_centres([self.centre, self.patch_centre], accepted)
        follow(self.teacher, self.student, self.momentum(time), accepted)

    def train(self, mode: bool = True) -> IBOT:
        super().train(mode)
        self.teacher.eval()  # the teacher never has drop path
        return self

    # Masked image modelling (section 3.3 and appendix)

    def mask(self, crops: Crops, side: int) -> Tensor:
        """bool [B * G, side, side]: blocks of a random share of some of the crops."""
        count = crops.rotations.numel()
        draws = torch.rand(2, count)
        low, high = self.mask_ratio
        return masking.blocks((low + (high - low) * draws[0]) * (draws[1] < self.mask_probability), side)

    def _patch_loss(self, student: Tokens, teacher: Tokens, masked: Tensor, time: float, frozen: bool) -> Tensor:
        """Cross-entropy of masked patches: the mean over a crop's patches, then over all crops; 0 without masks."""
        with torch.no_grad():
            directions = self.teacher.head.directions(teacher.patches)
            mean = directions.mean((0, 1, 2), keepdim=True)[0]
            logits = self.teacher.head.compare(directions[masked])
            target = self.patch_centre.sharpened(logits, self.teacher_patch_temp(time))  # [M, K]
            self.patch_centre.accumulate(self.teacher.head.compare(mean), rows=masked.numel())
        head = self.student.head
        logits = head.compare(head.directions(student.patches[masked]), frozen) / self.student_temp
        cross_entropy = losses.cross_entropy(logits, target)  # [M]
        counts = masked.sum((1, 2)).clamp(min=1)[:, None, None].expand(masked.shape)[masked]
        return (cross_entropy / counts).sum() / len(masked) + 0 * self.mask_token.sum()  # DDP waits for its gradient

    # Student and teacher (sections 3.1 and 3.2)

    def _tokens(self, branch: Branch, groups: Sequence[Crops], masked: Tensor | None = None) -> list[Tokens]:
        """Tokens of the crops of each size; patches of global crops are replaced where ``masked``."""
        hidden = [masked, *[None] * (len(groups) - 1)]
        return branch.encoder.side_by_side([c.pixels.flatten(0, 1) for c in groups], hidden, self.mask_token[0])

    def _cls(
        self, branch: Branch, tokens: Sequence[Tokens], groups: Sequence[Crops], frozen: bool = False
    ) -> list[Tensor]:
        """Logits [B, V, K] of the CLS tokens of each size."""
        logits: Tensor = branch.head(torch.cat([each.prefix[:, 0] for each in tokens]), frozen)
        parts = torch.split(logits, [crops.rotations.numel() for crops in groups])
        return [part.reshape(*crops.rotations.shape, -1) for part, crops in zip(parts, groups, strict=True)]

    # For evaluation

    @property
    def encoders(self) -> Mapping[str, nn.Module]:
        return {"teacher": self.teacher.encoder, "student": self.student.encoder}

    @torch.no_grad()
    def diagnose(self, views: Views) -> dict[str, Tensor]:
        """``image_score`` and ``teacher_information`` of each image, both of the CLS token, as for DINO."""
        seen = [views.global_crops]
        (teacher,) = self._cls(self.teacher, self._tokens(self.teacher, seen), seen)
        students = self._cls(self.student, self._tokens(self.student, views.groups), views.groups)
        return prototypes.diagnose(students, teacher, self.centre, self.teacher_temp(1.0))
