"""Going on from weights that are worth something: a method whose student is held to what it started from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gtsa.core.types import Method, Views
from gtsa.methods.parts import losses
from gtsa.models.backbone import Backbone


class Adaptation(Method):
    """A method that starts from somebody's weights.

    Likenesses between the patches of an image are what dense features are good for, and what further training loses
    first. The anchor holds the student to those of the start: features may turn and stretch as the method wants, as
    long as patches that were alike stay alike (Gram anchoring: DINOv3, Siméoni et al. 2025, arXiv 2508.10104).

    Args:
        method: what it is to learn by.
        start: the encoder as it was. It is no part of the state: it comes from where the weights came from.
        gram_weight: weight of the mean squared change of cosines, in the first global crop of every image; 0: none.
    """

    def __init__(self, method: Method, start: Backbone, gram_weight: float) -> None:
        super().__init__()
        self.method, self.start, self.gram_weight = method, start, gram_weight

    def forward(self, views: Views, time: float) -> dict[str, Tensor]:
        parts: dict[str, Tensor] = self.method(views, time)
        if self.gram_weight == 0:
            return parts
        change = losses.gram(*self._seen("student", views)).mean()
        return {**parts, "loss": parts["loss"] + self.gram_weight * change, "change": change}

    def after_step(self, time: float, next_time: float, accepted: Tensor) -> None:
        self.method.after_step(time, next_time, accepted)

    def train(self, mode: bool = True) -> Adaptation:
        super().train(mode)
        self.start.eval()  # no drop path in what is held to
        return self

    @property
    def encoders(self) -> Mapping[str, nn.Module]:
        return self.method.encoders

    @torch.no_grad()
    def diagnose(self, views: Views) -> dict[str, Tensor]:
        """The method's figures, and ``agreement`` of the teacher's likenesses between patches with the start's."""
        return {**self.method.diagnose(views), "agreement": losses.agreement(*self._seen("teacher", views))}

    def _seen(self, network: str, views: Views) -> tuple[Tensor, Tensor]:
        """Patch tokens [B, h, w, D] of the first global crops, now and at the start."""
        pixels = views.global_crops.pixels[:, 0]
        with torch.no_grad():
            start = self.start(pixels).patches
        return self.encoders[network](pixels).patches, start

    # A checkpoint is the method's own

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.method.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.method.load_state_dict(*args, **kwargs)
