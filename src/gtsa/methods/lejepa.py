"""LeJEPA: a joint-embedding predictive architecture without heuristics (Balestriero and LeCun 2025, arXiv 2511.08544).

In the order of the paper's section 5. Shapes: B images, V views of all sizes, G global ones, D width of an embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from gtsa.core.errors import UserError
from gtsa.core.types import Crops, Method, Views
from gtsa.methods.parts import losses
from gtsa.methods.parts.batch_norm import BatchNorm
from gtsa.methods.parts.sigreg import draw_directions, sigreg
from gtsa.models.backbone import Backbone

VIEWS = {
    "rotations": False, "hflip": 0.5, "local_crops_scale": (0.05, 0.3), "global_overlap": 0.0, "local_overlap": 0.0,
    "brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1, "gaussian_blur": (0.5, 0.5, 0.5),
    "solarize": (0.2, 0.2, 0.2),
}  # fmt: skip
FEW = 1024  # images, below which the automatic batch has fewer than the published 128


def weight_for(images: int) -> float:
    """0.05 as published; below 1,024 images 0.1, as the pull of SIGReg falls with the batch (LOG.md)."""
    return 0.05 if images >= FEW else 0.1


class LeJEPA(Method):
    """All views predict the mean of the global ones, and SIGReg keeps embeddings distributed as a standard normal.

    There is no teacher, no stop-gradient, no predictor and no schedule but the learning rate's.

    From the paper: the loss, its weight, the numbers of views (8 local ones are recommended, and most of its
    experiments have 6), directions and knots, AdamW with a constant weight decay. From the authors' repository: colours
    and scales of crops, a learning rate of 5e-4 that falls to a thousandth, a weight decay of 0.05, no clipping, and
    the head of their minimal example (two hidden layers with batch norm and ReLU). The width of the embeddings differs
    between their experiments; 64 is one of those in the paper's table 1. No length of the warm-up was found: it is 10 %
    here. All views pass the head together, so batch norm is over the views of all sizes.

    The loss depends on the whole batch: published are at least 128 images, and accumulated micro-batches are not one
    batch. Several processes compute one loss.

    Args:
        encoder: the encoder to train; it is what is exported. Its CLS token is embedded; without one, the mean of its
            patch tokens.
        sigreg_weight: weight lambda of SIGReg, from 0 to 1; the prediction has 1 - lambda. auto: 0.05 as published;
            below 1,024 images 0.1.
        num_slices: number of random directions that embeddings are projected on, drawn anew at every step.
        hidden_dim: width of the head's hidden layers.
        proj_dim: width of the embeddings.
    """

    legend = (
        "prediction = squared distance from the mean of the global views (best: 0); "
        "sigreg = distance from the standard normal (1.06: none)"
    )
    published_settings: ClassVar = {
        "views": VIEWS, "weight_decay": 0.05, "final_weight_decay": 0.05, "clip_grad": 0.0, "final_learning_rate": 5e-7,
    }  # fmt: skip
    auto_settings: ClassVar = {"sigreg_weight": weight_for}
    min_images = 2
    search_space: ClassVar = {"sigreg_weight": (0.02, 0.05, 0.1, 0.2)}

    def __init__(
        self,
        encoder: Backbone,
        sigreg_weight: float = 0.05,
        num_slices: int = 1024,
        hidden_dim: int = 2048,
        proj_dim: int = 64,
    ) -> None:
        super().__init__()
        if not 0 <= sigreg_weight <= 1:
            raise UserError(f"lejepa.sigreg_weight: from 0 to 1, not {sigreg_weight}; published is 0.05")
        if min(num_slices, hidden_dim, proj_dim) < 1:
            raise UserError("lejepa: num_slices, hidden_dim and proj_dim must be at least 1")
        encoder.pooling = "cls" if encoder.num_prefix_tokens else "mean"
        self.student = nn.ModuleDict({"encoder": encoder})
        self.head = nn.Sequential(
            nn.Linear(encoder.embed_dim, hidden_dim, bias=False),  # batch norm would subtract a bias
            BatchNorm(hidden_dim),
            nn.ReLU(),
            nn.Linear(hidden_dim, hidden_dim, bias=False),
            BatchNorm(hidden_dim),
            nn.ReLU(),
            nn.Linear(hidden_dim, proj_dim),
        )
        self.sigreg_weight, self.num_slices, self.proj_dim = sigreg_weight, num_slices, proj_dim

    # LeJEPA: SIGReg and prediction loss (section 5.1, algorithm 2)

    def forward(self, views: Views, time: float) -> dict[str, Tensor]:
        embeddings = torch.cat(self.embed(views.groups), 1)  # [B, V, D], global views first
        centres = embeddings[:, : views.global_crops.count].mean(1, keepdim=True)
        directions = draw_directions(self.proj_dim, self.num_slices, time, embeddings.device)
        parts = {
            "prediction": (embeddings - centres).square().mean(),
            "sigreg": sigreg(embeddings.transpose(0, 1), directions),  # of each view apart, [V, B, D]
        }
        return {"loss": (1 - self.sigreg_weight) * parts["prediction"] + self.sigreg_weight * parts["sigreg"], **parts}

    def embed(self, groups: Sequence[Crops]) -> list[Tensor]:
        """Embeddings [B, n, D] of the crops of each size, in float32 at least."""
        tokens = self.encoder.side_by_side([crops.pixels.flatten(0, 1) for crops in groups])
        embeddings: Tensor = self.head(torch.cat([self.encoder.pooled(each) for each in tokens]))
        embeddings = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
        parts = torch.split(embeddings, [crops.rotations.numel() for crops in groups])
        return [part.reshape(*crops.rotations.shape, -1) for part, crops in zip(parts, groups, strict=True)]

    # For evaluation

    @property
    def encoder(self) -> Backbone:
        return self.student["encoder"]  # type: ignore[return-value]

    @property
    def encoders(self) -> Mapping[str, nn.Module]:
        return {"teacher": self.encoder, "student": self.encoder}

    @torch.no_grad()
    def diagnose(self, views: Views) -> dict[str, Tensor]:
        """``image_score`` of each image, of its embeddings: ``losses.view_matching``."""
        embeddings = self.embed(views.groups)
        return {"image_score": losses.view_matching(embeddings, embeddings[0])}
