"""Feature distillation (Wei et al. 2022, arXiv 2205.14141) on multi-crop views: a small student of any larger network.

Shapes: B images, G global and V local crops, g x g patches of the student, D its width, C the teacher's width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gtsa.core.errors import UserError
from gtsa.core.types import Crops, GivenWeights, Method, Tokens, Views
from gtsa.methods.parts import losses
from gtsa.methods.parts.geometry import align, pool
from gtsa.models.backbone import Backbone
from gtsa.models.weight_sources import Weights, read_weights
from gtsa.models.weights import build_backbone

VIEWS = {
    "rotations": False, "brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1,
}  # fmt: skip


class Distill(Method):
    """A student learns the patch features and the pooled feature of a frozen teacher, of any patch size and width.

    The teacher sees the global crops with its own normalisation of pixels, resized to the nearest multiple of its patch
    size; its position embeddings are resampled. Its maps are brought to the student's grid by RoIAlign: bilinear, and
    the mean of several points where they shrink. A local crop learns its region of the teacher's global maps. The
    teacher is no part of the checkpoint: it is read again, and must be the same.

    Args:
        encoder: the student's encoder; it is what is exported.
        teacher: weights of the teacher: a run, an export, timm:NAME, a timm or Hugging Face ViT folder, a .safetensors
            or .pth file.
        pooling: the teacher's pooled feature, one vector an image. cls: its CLS token; mean: the mean of its patches;
            own: as a run or an export says, else cls if there is a CLS token.
        pooled_weight: weight of the loss on the pooled feature; 0 leaves it out.
        local_weight: weight of the loss on the patches of local crops; 0 leaves it out.
    """

    legend = (
        "patch, local, pooled = smooth L1 distance to the teacher's features (0: equal), of patches of global crops, "
        "of regions of local crops, and of the pooled vector"
    )
    published_settings: ClassVar = {"views": VIEWS, "drop_path": 0.0}
    min_views = 1
    needs_overlap = True
    given_weights: ClassVar = ("teacher",)
    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        encoder: Backbone,
        teacher: str | None = None,
        pooling: Literal["own", "cls", "mean"] = "own",
        pooled_weight: float = 1.0,
        local_weight: float = 1.0,
    ) -> None:
        super().__init__()
        assert teacher is not None  # given_weights
        if min(pooled_weight, local_weight) < 0:
            raise UserError("distill.pooled_weight, local_weight: must not be negative; 0 leaves a loss out")
        network, loaded = _read_teacher(teacher, encoder, pooling)
        self._given = GivenWeights(network.fingerprint, loaded)  # before its weights are sharded
        encoder.pooling = network.pooling if encoder.num_prefix_tokens else "mean"
        self.student = nn.ModuleDict({"encoder": encoder})
        self.teacher = nn.ModuleDict({"encoder": network}).requires_grad_(False).eval()
        self.patch_head = nn.Linear(encoder.embed_dim, network.embed_dim)
        self.pooled_head = nn.Linear(encoder.embed_dim, network.embed_dim) if pooled_weight > 0 else None
        self.pooled_weight, self.local_weight = pooled_weight, local_weight
        (mean, std), (own_mean, own_std) = (
            [torch.tensor(values)[:, None, None] for values in each.normalisation] for each in (encoder, network)
        )
        self.register_buffer("scale", std / own_std, persistent=False)
        self.register_buffer("shift", (mean - own_mean) / own_std, persistent=False)

    def forward(self, views: Views, time: float) -> dict[str, Tensor]:
        seen = views.global_crops
        targets, pooled = self.targets(seen)  # [B, G, h, w, C], [B, G, C]
        of_global, *of_local = self._tokens(views.groups if self.local_weight > 0 else [seen])
        predicted = self.patch_head(_unflattened(of_global.patches, seen))  # [B, G, g, g, C]
        parts = {"patch": losses.feature(predicted, _resampled(targets, predicted.shape[2])).mean()}
        loss = parts["patch"]
        if of_local and views.local_crops is not None:
            maps = _unflattened(of_local[0].patches, views.local_crops)
            parts["local"] = self.local_loss(maps, targets, views.local_crops, seen).mean()
            loss = loss + self.local_weight * parts["local"]
        if self.pooled_head is not None:
            vectors = self.pooled_head(_unflattened(self.encoder.pooled(of_global), seen))
            parts["pooled"] = losses.feature(vectors, pooled).mean()
            loss = loss + self.pooled_weight * parts["pooled"]
        return {"loss": loss, **parts}

    def train(self, mode: bool = True) -> Distill:
        super().train(mode)
        self.teacher.eval()
        return self

    # The teacher

    @torch.no_grad()
    def targets(self, crops: Crops) -> tuple[Tensor, Tensor]:
        """The teacher's maps [B, G, h, w, C] on its own grid, and its pooled vectors [B, G, C]."""
        teacher: Backbone = self.teacher["encoder"]  # type: ignore[assignment]
        pixels = crops.pixels.flatten(0, 1) * self.scale + self.shift  # normalised as the teacher's own training had it
        side = max(2, round(crops.side / teacher.patch_size)) * teacher.patch_size
        if side != crops.side:
            pixels = F.interpolate(pixels, (side, side), mode="bilinear", antialias=True)
        tokens = teacher(pixels)
        return _unflattened(tokens.patches, crops), _unflattened(teacher.pooled(tokens), crops)

    # A local crop learns its region of the teacher's maps

    def local_loss(self, student: Tensor, targets: Tensor, view: Crops, seen: Crops) -> Tensor:
        """The distance [B, V, G, c, c] of local crops and global ones, in the cells of the region that both show.

        Args:
            student: [B, V, h, w, D] maps of the local crops ``view``.
            targets: [B, G, h, w, C] maps of the global crops ``seen``.
        """
        regions, target = align(student, targets, view, seen, round(0.7 * student.shape[2]))
        return losses.feature(self.patch_head(regions), target)

    # The student

    @property
    def encoder(self) -> Backbone:
        return self.student["encoder"]  # type: ignore[return-value]

    def _tokens(self, groups: Sequence[Crops]) -> list[Tokens]:
        return self.encoder.side_by_side([crops.pixels.flatten(0, 1) for crops in groups])

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
        seen = views.global_crops
        predicted = self.patch_head(_unflattened(self._tokens([seen])[0].patches, seen))
        target = _resampled(self.targets(seen)[0], predicted.shape[2])
        predicted, target = (
            each.float() - each.float().mean((0, 1, 2, 3)) for each in (predicted, losses.standardised(target))
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


def _unflattened(values: Tensor, crops: Crops) -> Tensor:
    """[B * V, ...] -> [B, V, ...]."""
    return values.reshape(*crops.rotations.shape, *values.shape[1:])


def _resampled(maps: Tensor, grid: int) -> Tensor:
    """Maps [B, G, h, w, C] on a grid of grid x grid cells."""
    height, width = maps.shape[2:4]
    if height == width == grid:
        return maps
    box = maps.new_tensor([0, 0, width, height], dtype=torch.float64).expand(*maps.shape[:2], 1, 4)
    return pool(maps, box, grid)[:, :, 0]
