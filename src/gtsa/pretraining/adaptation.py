"""The networks of a run, and training that starts from good weights: Gram anchoring, freezing, rates by layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gtsa import methods
from gtsa.core.types import GivenWeights, Method, Views
from gtsa.methods.parts import losses
from gtsa.methods.parts.teacher import copy_of
from gtsa.models.backbone import Backbone, patch_argument
from gtsa.models.weight_sources import Weights
from gtsa.models.weights import build_backbone
from gtsa.pretraining.settings import Pretrain
from gtsa.training.optim import schedule_layers, split_by_decay
from gtsa.training.schedules import Ramp


class Adaptation(Method):
    """A method that starts from given weights, with Gram anchoring (DINOv3, Siméoni et al. 2025, arXiv 2508.10104).

    Dense tasks use the cosine similarities between the patches of an image, and further training damages these first.
    A loss on the student's Gram matrix keeps them near those of the start; features may rotate and scale freely.

    Args:
        method: what is trained.
        initial_encoder: the encoder as it was. It is no part of the state: it is read again from the initial weights.
        gram_weight: weight of the mean squared change of the Gram matrix of the first global crop; 0: none.
    """

    def __init__(self, method: Method, initial_encoder: Backbone, gram_weight: float) -> None:
        super().__init__()
        self.method, self.initial_encoder, self.gram_weight = method, initial_encoder, gram_weight
        change = "change = of the Gram matrix of patches since the start (0: none)"
        self.legend = "; ".join(filter(None, [method.legend, change if gram_weight else ""]))
        self.origin = initial_encoder.fingerprint  # before its weights are sharded

    def forward(self, views: Views, time: float) -> dict[str, Tensor]:
        parts: dict[str, Tensor] = self.method(views, time)
        if self.gram_weight == 0:
            return parts
        change = losses.gram(*self._patch_tokens("student", views)).mean()
        return {**parts, "loss": parts["loss"] + self.gram_weight * change, "change": change}

    def after_step(self, time: float, next_time: float, accepted: Tensor) -> None:
        self.method.after_step(time, next_time, accepted)

    def train(self, mode: bool = True) -> Adaptation:
        super().train(mode)
        self.initial_encoder.eval()  # no drop path in the reference
        return self

    @property
    def encoders(self) -> Mapping[str, nn.Module]:
        return self.method.encoders

    @property
    def given(self) -> Mapping[str, GivenWeights]:
        return self.method.given

    @torch.no_grad()
    def diagnose(self, views: Views) -> dict[str, Tensor]:
        """The method's metrics, and ``agreement``: of the teacher's Gram matrix with the start's."""
        return {**self.method.diagnose(views), "agreement": losses.agreement(*self._patch_tokens("teacher", views))}

    def _patch_tokens(self, network: str, views: Views) -> tuple[Tensor, Tensor]:
        """Patch tokens [B, h, w, D] of the first global crops, now and at the start."""
        pixels = views.global_crops.pixels[:, 0]
        with torch.no_grad():
            initial = self.initial_encoder(pixels).patches
        return self.encoders[network](pixels).patches, initial

    # A checkpoint is the method's own

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.method.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.method.load_state_dict(*args, **kwargs)


def make_untrained(settings: Pretrain, drop_path: float = 0.0) -> Backbone:
    """An encoder of the resolved settings with random weights, which follow from torch's global generator."""
    arguments = patch_argument(settings.model, settings.patch_size)
    encoder = Backbone(settings.model, settings.views.global_crops_size, drop_path, arguments=arguments)
    encoder.range16 = settings.range16
    return encoder


def build_method(settings: Pretrain, initial: Weights | None) -> tuple[Method, str]:
    """The method with its initial weights, which follow from the seed, and how many tensors were loaded."""
    torch.manual_seed(settings.seed)
    kind: Callable[..., Method] = methods.load_all()[settings.method]
    size = settings.multicrop.global_crops_size
    if initial is None:
        encoder = make_untrained(settings, settings.drop_path)
        encoder.recompute = settings.activation_checkpointing
        return kind(encoder, **settings.options), ""
    encoder, loaded = build_backbone(initial, settings.model, size, settings.drop_path)
    encoder.range16 = settings.range16
    initial_encoder = copy_of(encoder)
    encoder.recompute = settings.activation_checkpointing
    return Adaptation(kind(encoder, **settings.options), initial_encoder, settings.gram_weight), loaded


def parameter_groups(method: Method, settings: Pretrain) -> list[dict[str, Any]]:
    """All trained parameters. With --freeze-encoder and --encoder-lr-scale the encoder starts later and learns slower.

    While it is frozen its learning rate is 0, so that a step costs what it costs later. It has missed the warm-up, and
    has one of its own afterwards.
    """
    encoder = method.encoders["student"]
    if (settings.freeze_encoder, settings.encoder_lr_scale, settings.layer_decay) == (0, 1, 1):
        return split_by_decay(method.named_parameters())
    assert isinstance(encoder, Backbone)
    end = settings.freeze_encoder + settings.warmup if settings.freeze_encoder else 0.0
    layers = schedule_layers(
        encoder.layers(settings.layer_decay),
        lambda scale: Ramp(0.0, settings.encoder_lr_scale * scale, end, settings.freeze_encoder),
    )
    slow = {id(p) for group in layers for p in group["params"]}
    heads = [(name, p) for name, p in method.named_parameters() if id(p) not in slow]
    return [*split_by_decay(heads), *layers]
