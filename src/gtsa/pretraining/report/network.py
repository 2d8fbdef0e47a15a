"""The network of a run's newest checkpoint, and the images that the checkpoint keeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gtsa import methods
from gtsa.core.errors import escaped
from gtsa.core.seeds import Stream, generator
from gtsa.core.types import Method, Views
from gtsa.evaluation.feature_maps import patch_maps
from gtsa.models.backbone import Backbone
from gtsa.pretraining.run_record import RunRecord
from gtsa.pretraining.settings import Pretrain
from gtsa.training import checkpoint


@dataclass
class Network:
    """The method of a run as its newest checkpoint has it, and the images that the checkpoint keeps."""

    settings: Pretrain
    step: int
    method: Method
    teacher: Backbone
    gallery: Tensor  # [n, 3, side, side] in [0, 1]
    at_start: Tensor  # [n, h, w, D]: patch tokens at step 0
    now: Tensor  # the same of the teacher
    names: Sequence[str]  # of the kept images; empty in runs of early versions

    @property
    def device(self) -> torch.device:
        return next(self.method.parameters()).device

    def title(self, image: int) -> str:
        """How the page names a kept image: by its number, and by its file."""
        return f"Image {image + 1}" + (f": {escaped(self.names[image])}" if self.names else "")

    def draw_views(self) -> Views:
        """Views of the kept images, drawn as in training."""
        multicrop, seed = self.settings.multicrop, self.settings.seed
        images = (255 * self.gallery).round().to(torch.uint8)
        drawn = [multicrop(image, generator(seed, Stream.VIEWS, 0, n, 0)) for n, image in enumerate(images)]
        groups = []
        for of_size in zip(*(views.groups for views in drawn), strict=True):
            fields = zip(*((c.pixels, c.boxes, c.rotations, c.colours) for c in of_size), strict=True)
            groups.append(type(of_size[0])(*(torch.cat(tensors) for tensors in fields)))
        return Views.of(groups)


def open_network(record: RunRecord) -> Network | None:
    """The network of the newest whole checkpoint; None where there is none, or no images that are drawn."""
    path, problems = checkpoint.newest(record.folder / "checkpoints")
    record.missing += [f"{problem}; the pictures show the checkpoint before it." for problem in problems]
    if path is None:
        return None
    with checkpoint.understood(path):
        tensors, state = checkpoint.read(path)
        if not state.get("step_zero", True):
            record.missing.append("The run was stopped before step 0 was evaluated: there are no pictures yet.")
            return None
        method = _build_method(record.settings, state["encoder"])
        method.load_state_dict(tensors["objective"])
        start = tensors["start"]
        gallery = start["gallery"].float() / 255
    method = method.to(torch.device("cuda" if torch.cuda.is_available() else "cpu")).eval()
    teacher = method.encoders["teacher"]
    assert isinstance(teacher, Backbone)
    shifts = max(1, start["maps"].shape[1] * teacher.patch_size // gallery.shape[-1])
    now = patch_maps(teacher, gallery, shifts)
    shown = start["shown"].tolist() if "shown" in start else []
    names = [record.images[index] for index in shown] if max(shown, default=0) < len(record.images) else []
    return Network(record.settings, state["step"], method, teacher, gallery, start["maps"].float(), now, names)


def _build_method(settings: Pretrain, encoder: dict[str, Any]) -> Method:
    kind: Callable[..., Method] = methods.load_all()[settings.method]
    mean, std = encoder["normalisation"]
    with torch.random.fork_rng(devices=[]):  # initial weights are drawn, and replaced
        backbone = Backbone(
            encoder["model"], normalisation=(tuple(mean), tuple(std)), arguments=dict(encoder["arguments"])
        )
        backbone.range16 = settings.range16
        method = kind(backbone, **settings.options)
    return method
