"""PaKA: patch-level kernel alignment for dense self-supervised learning (Yeo et al. 2025, arXiv 2509.05606).

In the order of its method. Shapes: B images, V views of one size, G global crops, h x w patches, D width, c x c cells.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from gtsa.core.errors import UserError
from gtsa.core.types import Crops, Method, Views
from gtsa.methods.parts import losses
from gtsa.methods.parts.geometry import align, pairs_of
from gtsa.methods.parts.teacher import copy_of, follow
from gtsa.models.backbone import Backbone
from gtsa.training.schedules import Cosine

VIEWS = {
    "rotations": False, "clean_global": True, "local_inside": True, "global_overlap": 0.1,
    "global_crops_scale": (0.4, 1.0), "local_crops_scale": (0.05, 0.4), "brightness": 0.4, "contrast": 0.4,
    "saturation": 0.2, "hue": 0.1, "gaussian_blur": (0.0, 0.0, 0.5),
}  # fmt: skip


class PaKA(Method):
    """The patches of a local crop are to be as similar to one another as the teacher's patches of the same region are.

    The method continues the training of a good encoder (``--init``); the paper does not train from random weights.

    From what the paper's abstract and figures say: an EMA teacher that sees the global crops, a student that sees the
    local ones, RoIAlign of the region that both show, centred Gram matrices with a linear kernel, their CKA as the
    loss, crops that overlap as much as possible, and a teacher whose crops are not augmented. The paper itself could
    not be read in full. So these are choices of this project: the region has as many cells as the local crop has
    patches; every local crop is compared with every global one; Gram matrices are of one region, not of a batch; there
    is no head, patch tokens are compared after the last norm; local crops lie wholly inside the global ones; scales and
    colours of crops, and the teacher's momentum, are DINO's; without mirroring.

    Without local crops the student sees the global ones, each compared with the teacher's others.

    Args:
        encoder: the student's encoder; the teacher starts as its copy.
        cells: cells per side of the pooled region; at least 2. By default the number of patches per side of the
            student's crop.
        momentum: momentum of the EMA teacher at the start; it rises to 1 along a cosine.
    """

    legend = "loss = 1 - CKA of student's and teacher's patches (best: 0)"
    published_settings: ClassVar = {"views": VIEWS, "freeze_encoder": 0.0}  # there is no new head to train first
    needs_overlap = True
    search_space: ClassVar = {"momentum": (0.99, 0.996, 0.998, 0.999)}

    def __init__(self, encoder: Backbone, cells: int | None = None, momentum: float = 0.996) -> None:
        super().__init__()
        if cells is not None and cells < 2:
            raise UserError(f"paka.cells: must be at least 2, not {cells}; the similarities of cells are compared")
        if not 0 <= momentum <= 1:
            raise UserError(f"paka.momentum: from 0 to 1, not {momentum}")
        self.student = nn.ModuleDict({"encoder": encoder})
        self.teacher = copy_of(self.student)
        self.cells = cells
        self.momentum = Cosine(momentum, 1.0)

    def forward(self, views: Views, time: float) -> dict[str, Tensor]:
        return {"loss": 1 - self.alignment(*self.patches(views), views).mean()}

    def after_step(self, time: float, next_time: float, accepted: Tensor | float = 1.0) -> None:
        follow(self.teacher, self.student, self.momentum(next_time), accepted)

    def train(self, mode: bool = True) -> PaKA:
        super().train(mode)
        self.teacher.eval()  # the teacher never has drop path
        return self

    # Student and teacher: local crops, and clean global crops around them

    def patches(self, views: Views) -> tuple[Tensor, Tensor]:
        """Patch tokens of the student [B, V, h, w, D] and of the teacher [B, G, h, w, D]."""
        seen = views.global_crops
        with torch.no_grad():
            teacher = _maps(self.teacher["encoder"], seen)
        return _maps(self.student["encoder"], views.groups[-1]), teacher

    # Patch-level kernel alignment

    def alignment(self, student: Tensor, teacher: Tensor, views: Views) -> Tensor:
        """CKA [B, pairs] of the cells of each region that a view and a teacher's crop share."""
        size, view, seen = len(views.groups) - 1, views.groups[-1], views.global_crops
        pooled, target = align(student, teacher, view, seen, self.cells or student.shape[2])
        pairs = pairs_of(size, view.count, seen.count)
        return losses.cka(pooled[:, *pairs].flatten(2, 3), target[:, *pairs].flatten(2, 3))

    # For evaluation

    @property
    def encoders(self) -> Mapping[str, nn.Module]:
        return {"teacher": self.teacher["encoder"], "student": self.student["encoder"]}

    @torch.no_grad()
    def diagnose(self, views: Views) -> dict[str, Tensor]:
        """``kernel_score`` of each image: the CKA of its regions, minus the mean CKA with the same place in up to eight
        other images.
        """
        student, teacher = self.patches(views)
        own, *others = (
            self.alignment(student, teacher.roll(shift, 0), views).mean(1) for shift in range(min(len(teacher), 9))
        )  # 0: the image itself, then up to eight others
        return {"kernel_score": own - (torch.stack(others).mean(0) if others else own)}


def _maps(encoder: nn.Module, crops: Crops) -> Tensor:
    """Patch tokens [B, n, h, w, D] of crops."""
    maps: Tensor = encoder(crops.pixels.flatten(0, 1)).patches
    return maps.reshape(*crops.rotations.shape, *maps.shape[1:])
