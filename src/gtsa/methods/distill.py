"""Feature distillation (Wei et al. 2022, arXiv 2205.14141): a small student learns the features of any larger network.

Shapes: B images, V views of one size, g x g patches of the student, D its width, C the teacher's width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gtsa.core.errors import UserError
from gtsa.core.types import Crops, GivenWeights, Method, Views
from gtsa.methods.parts import losses
from gtsa.methods.parts.geometry import pool
from gtsa.models.backbone import Backbone
from gtsa.models.weight_sources import Weights, read_weights
from gtsa.models.weights import build_backbone

VIEWS = {
    "rotations": False, "hflip": 0.5, "global_crops_scale": (0.32, 1.0), "local_crops_scale": (0.05, 0.32),
    "global_overlap": 0.0, "local_overlap": 0.0, "brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1,
}  # fmt: skip


class Distill(Method):
    """A student learns the patch features and the pooled feature of a frozen teacher, of any patch size and width.

    Teacher and student see the same crops, with the same colours: a consistent teacher (Beyer et al. 2022, arXiv
    2106.05237). The teacher has its own normalisation of pixels. Crops are resized to the nearest multiple of its patch
    size, and its position embeddings are resampled. Its maps are brought to the student's grid by RoIAlign: bilinear,
    and the mean of several points where they shrink. The teacher is no part of the checkpoint: it is read again, and
    must be the same.

    Args:
        encoder: the student's encoder; it is what is exported.
        teacher: weights of the teacher: a run, an export, timm:NAME, a timm or Hugging Face ViT folder, a .safetensors
            or .pth file.
        pooling: the teacher's pooled feature, one vector a crop. cls: its CLS token; mean: the mean of its patches;
            own: as a run or an export says, else cls if there is a CLS token.
        pooled_weight: weight of the loss on the pooled feature; 0 leaves it out.
    """

    legend = "patch, pooled = smooth L1 distance to the teacher's features (0: equal), of patches and of pooled vectors"
    published_settings: ClassVar = {"views": VIEWS, "drop_path": 0.0}
    min_views = 1
    given_weights: ClassVar = ("teacher",)
    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        encoder: Backbone,
        teacher: str | None = None,
        pooling: Literal["own", "cls", "mean"] = "own",
        pooled_weight: float = 1.0,
    ) -> None:
        super().__init__()
        assert teacher is not None  # given_weights
        if pooled_weight < 0:
            raise UserError(f"distill.pooled_weight: must not be negative, not {pooled_weight}; 0 leaves the loss out")
        network, loaded = _read_teacher(teacher, encoder, pooling)
        self._given = GivenWeights(network.fingerprint, loaded)  # before its weights are sharded
        encoder.pooling = network.pooling if encoder.num_prefix_tokens and pooled_weight > 0 else "mean"
        self.student = nn.ModuleDict({"encoder": encoder})
        self.teacher = nn.ModuleDict({"encoder": network}).requires_grad_(False).eval()
        self.patch_head = nn.Linear(encoder.embed_dim, network.embed_dim)
        self.pooled_head = nn.Linear(encoder.embed_dim, network.embed_dim) if pooled_weight > 0 else None
        self.pooled_weight = pooled_weight
        (mean, std), (own_mean, own_std) = (
            [torch.tensor(values)[:, None, None] for values in each.normalisation] for each in (encoder, network)
        )
        self.register_buffer("scale", std / own_std, persistent=False)
        self.register_buffer("shift", (mean - own_mean) / own_std, persistent=False)

    def forward(self, views: Views, time: float) -> dict[str, Tensor]:
        """Both losses are means over the crops of one size, then over the sizes."""
        patch, pooled = [], []
        predictions = zip(self.predictions(views.groups), self.targets(views.groups), strict=True)
        for (maps, vectors), (target_maps, target_vectors) in predictions:
            patch.append(losses.feature(maps, target_maps).mean())
            if vectors is not None:
                pooled.append(losses.feature(vectors, target_vectors).mean())
        parts = {"patch": torch.stack(patch).mean()}
        if not pooled:
            return {"loss": parts["patch"], **parts}
        parts["pooled"] = torch.stack(pooled).mean()
        return {"loss": parts["patch"] + self.pooled_weight * parts["pooled"], **parts}

    def train(self, mode: bool = True) -> Distill:
        super().train(mode)
        self.teacher.eval()
        return self

    # The teacher: normalisation, patch size and grid are its own

    @torch.no_grad()
    def targets(self, groups: Sequence[Crops]) -> list[tuple[Tensor, Tensor]]:
        """The teacher's maps [B, V, g, g, C], on the student's grid, and vectors [B * V, C], by size of the crops."""
        teacher: Backbone = self.teacher["encoder"]  # type: ignore[assignment]
        outputs = teacher.side_by_side([self._teachers_pixels(crops, teacher.patch_size) for crops in groups])
        targets = []
        for tokens, crops in zip(outputs, groups, strict=True):
            maps = _resampled(tokens.patches, crops.side // self.encoder.patch_size)
            targets.append((_by_image(maps, crops), teacher.pooled(tokens)))
        return targets

    def _teachers_pixels(self, crops: Crops, patch: int) -> Tensor:
        """Pixels [B * V, 3, S, S] as in the teacher's own training, in whole patches."""
        pixels = crops.pixels.flatten(0, 1) * self.scale + self.shift
        side = max(1, round(crops.side / patch)) * patch
        if side == crops.side:
            return pixels
        return F.interpolate(pixels, (side, side), mode="bilinear", antialias=True)

    # The student

    @property
    def encoder(self) -> Backbone:
        return self.student["encoder"]  # type: ignore[return-value]

    def predictions(self, groups: Sequence[Crops]) -> list[tuple[Tensor, Tensor | None]]:
        """Predicted maps [B, V, g, g, C], and vectors [B * V, C] where they are learnt, of the crops of each size."""
        outputs = self.encoder.side_by_side([crops.pixels.flatten(0, 1) for crops in groups])
        predicted = []
        for tokens, crops in zip(outputs, groups, strict=True):
            vectors = None if self.pooled_head is None else self.pooled_head(self.encoder.pooled(tokens))
            predicted.append((_by_image(self.patch_head(tokens.patches), crops), vectors))
        return predicted

    # For evaluation, and checkpoints without the teacher

    @property
    def encoders(self) -> Mapping[str, nn.Module]:
        return {"teacher": self.encoder, "student": self.encoder}

    @torch.no_grad()
    def diagnose(self, views: Views) -> dict[str, Tensor]:
        """``teacher_score`` of each image: cosine of the predicted patches of its global crops with the teacher's,
        minus the mean cosine with the same patches of up to eight other images, after the mean vector of each side over
        the batch is subtracted.
        """
        ((maps, _),), ((target_maps, _),) = self.predictions([views.global_crops]), self.targets([views.global_crops])
        predicted, target = (
            each.float() - each.float().mean((0, 1, 2, 3)) for each in (maps, losses.standardised(target_maps))
        )
        own, *others = (-losses.region(predicted, target.roll(shift, 0)) for shift in range(min(len(target), 9)))
        return {"teacher_score": (own - (torch.stack(others).mean(0) if others else 0)).mean(1)}

    @property
    def given(self) -> Mapping[str, GivenWeights]:
        return {"teacher": self._given}

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        state = super().state_dict(*args, **kwargs)
        return {name: value for name, value in state.items() if not name.startswith("teacher.")}

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        teacher = {f"teacher.{name}": value for name, value in self.teacher.state_dict().items()}
        return super().load_state_dict({**state_dict, **teacher}, *args, **kwargs)


def _read_teacher(spec: str, student: Backbone, pooling: str) -> tuple[Backbone, str]:
    """The teacher, with the pooling that the student learns, and a line about it for the user.

    Raises:
        UserError: the weights are missing or damaged, or their model is not known; it reads other channels than the
            student (4); it has no CLS token, or read 16-bit images with another range (2).
    """
    try:
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):  # the student's weights do not depend on it
            weights = read_weights(spec)
            if weights.model is None:
                raise UserError(
                    f"{spec} does not say which model it is ({weights.remark}); export it with "
                    "'gtsa export --model NAME --to timm', and give the export",
                    4,
                )
            teacher, loaded = build_backbone(weights)
    except UserError as error:
        raise UserError(f"--distill.teacher: {error}", error.code) from None
    channels, own = (network.vit.patch_embed.proj.weight.shape[1] for network in (teacher, student))
    if channels != own:
        raise UserError(
            f"--distill.teacher {spec}: it reads images of {channels} channels, and the student of {own}; choose a "
            f"teacher of {own} channels",
            4,
        )
    if teacher.range16 != student.range16:
        black, white = teacher.range16
        raise UserError(
            f"--distill.teacher {spec}: it was trained with 16-bit values from {black:g} to {white:g}; give the "
            f"student the same with --range16 {black:g} {white:g}"
        )
    teacher.pooling = _pooling(teacher, weights, pooling, spec)
    vector = "CLS token" if teacher.pooling == "cls" else "mean of the patches"
    return teacher, f"teacher: {loaded}; its pooled feature is the {vector}"


def _pooling(teacher: Backbone, weights: Weights, wanted: str, spec: str) -> Literal["cls", "mean"]:
    """Which pooled vector is learnt. Raises UserError if it is a CLS token that the teacher lacks."""
    has_cls = getattr(teacher.vit, "cls_token", None) is not None
    if wanted == "cls" and not has_cls:
        raise UserError(f"--distill.pooling cls: {spec} has no CLS token; choose mean")
    if wanted == "own":
        says_it = weights.network or "global_pool" in weights.arguments  # a run, or an export
        wanted = weights.pooling if says_it else "cls" if has_cls else "mean"
    return "cls" if wanted == "cls" else "mean"


def _by_image(maps: Tensor, crops: Crops) -> Tensor:
    """[B * V, h, w, C] -> [B, V, h, w, C]."""
    return maps.reshape(*crops.rotations.shape, *maps.shape[1:])


def _resampled(maps: Tensor, grid: int) -> Tensor:
    """Maps [N, h, w, C] on a grid of grid x grid cells."""
    height, width = maps.shape[1:3]
    if height == width == grid:
        return maps
    whole = torch.tensor([0, 0, width, height], dtype=torch.float64, device=maps.device)
    return pool(maps, whole.expand(len(maps), 1, 4), grid)[:, 0]
