"""The settings of gtsa pretrain. A configuration is a call written down."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from gtsa import methods
from gtsa.core.errors import UserError
from gtsa.core.plugins import declared
from gtsa.core.settings import (
    AUTO,
    MISSING,
    Auto,
    Count,
    Documented,
    Missing,
    Natural,
    Positive,
    Strict,
    is_auto,
    merged,
    settings_of,
    with_sections,
)
from gtsa.evaluation.settings import EvaluatorSettings

_found = declared(Path(__file__).parents[1] / "data" / "multicrop.py", "MultiCrop")
assert _found is not None
MULTICROP = _found
if TYPE_CHECKING:
    from gtsa.data.multicrop import MultiCrop

    class ViewSettings(MultiCrop):
        """MultiCrop's arguments; sizes may be auto."""

        def model_copy(self, *, update: Mapping[str, object]) -> ViewSettings: ...
        def model_dump(self) -> dict[str, Any]: ...

else:
    ViewSettings = settings_of(MULTICROP, "views", auto=("global_crops_size", "local_crops_size"))
METHODS = methods.declared()
MethodSettings: dict[str, type[Strict]] = {
    name: settings_of(method, name, skip=("encoder",), auto=method.constants["auto_settings"])
    for name, method in METHODS.items()
}


class PretrainSettings(Documented):
    data: str | Missing = MISSING
    """Folder of images (nested), or a .txt file with one path a line. Without it: the sample that comes with gtsa."""
    out: str | Missing = MISSING
    """Folder that the run is written into."""
    method: str = "gtsa"
    """What to learn by: see 'gtsa methods'."""
    model: str = "auto"
    """Name of a vision transformer of timm, untrained. auto: that of --init, or vit_small_patch16_224."""
    init: str | None = None
    """Weights to start from: a run, an export, timm:NAME, a timm or Hugging Face ViT folder, a .safetensors or .pth."""
    freeze_encoder: Annotated[float, Field(ge=0, lt=1)] | Auto = AUTO
    """Share of the run in which the encoder rests and what is new learns alone. auto: 0.1 with --init, else 0."""
    encoder_lr_scale: Annotated[float, Field(gt=0)] | Auto = AUTO
    """Learning rate of the encoder's last block, times that of the rest. auto: 0.1 with --init, else 1."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] | Auto = AUTO
    """Learning rate of every block, times that of the block above. auto: 0.75 with --init, else 1."""
    gram_weight: Annotated[float, Field(ge=0)] | Auto = AUTO
    """Weight of a loss that holds likenesses between patches to what they were at the start. auto: 1 with --init."""
    epochs: Count | Auto = AUTO
    """Times that every image is seen. auto: 100, or more so that there are 1,000 steps."""
    steps: Count | Auto = AUTO
    """Optimiser steps. auto: as --epochs has it."""
    batch_size: Count | Auto = AUTO
    """Images a step, over all devices. auto: an eighth of the images, at least 8 and at most 512."""
    accumulate: Count | Auto = AUTO
    """Micro-batches that a step is made of, to save memory. auto: as few as fit."""
    learning_rate: Positive | Auto = AUTO
    """Peak. auto: 5e-4 (mae: 1.5e-4) x batch / 256 as published; below 256 images the root of batch / 256."""
    final_learning_rate: float = Field(1e-6, ge=0)
    """At the end of the cosine."""
    warmup: float = Field(0.1, ge=0, lt=1)
    """Share of the run in which the learning rate rises."""
    weight_decay: float = Field(0.04, ge=0)
    """At the start; none on biases and one-dimensional parameters."""
    final_weight_decay: float = Field(0.4, ge=0)
    """At the end of its cosine."""
    clip_grad: float = Field(3.0, ge=0)
    """Largest gradient norm of each parameter tensor; 0: no clipping."""
    beta2: float = Field(0.999, gt=0, lt=1)
    """Of AdamW: share of the old second moment that is kept in a step."""
    drop_path: float = Field(0.1, ge=0, lt=1)
    """Stochastic depth of the student's last block."""
    precision: Literal["auto", "32", "bf16", "fp16"] = "auto"
    """auto: bf16 on a GPU that has it, else 32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPUs if there are any."""
    devices: Count | Auto = AUTO
    """Processes on this machine, one a GPU. auto: all GPUs, one on CPU. Under torchrun: what it started."""
    nodes: int = Field(1, ge=1)
    """Machines; start each with torchrun."""
    deterministic: bool = False
    """Deterministic kernels on GPUs too (slower); on CPU they always are."""
    workers: Natural | Auto = AUTO
    """Processes that read images, for each device."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Views, order and initial weights follow from it."""
    checkpoint_every: Count | Auto = AUTO
    """Steps. auto: about twenty in a run, at most every 1,000 steps."""
    keep_checkpoints: int = Field(2, ge=1)
    """Checkpoints that are kept."""
    evaluate_every: Count | Auto = AUTO
    """Steps between looks: health, pictures, --eval. auto: ten in a run, at least 50 apart."""
    log_every: int = Field(10, ge=1)
    """Steps between lines of the log."""
    eval: tuple[str, ...] = ()
    """Evaluations of the teacher at every look, as in 'gtsa evaluate --task'."""
    eval_train: tuple[str, ...] = ()
    """IMAGES [LABELS] that they learn from."""
    eval_val: tuple[str, ...] = ()
    """IMAGES [LABELS] that they judge by."""
    eval_folds: Annotated[int, Field(ge=2)] | None = None
    """Takes the place of --eval-val."""
    eval_config: str | None = None
    """YAML file with further settings of 'gtsa evaluate'."""
    keep_best: str | None = None
    """Keep and export the best by a figure of --eval, the higher the better: TASK (its first one) or TASK:FIGURE. With
    --init it is the first of --eval where it is not given, and the start is one to choose from."""
    hold_out: Natural | Auto = AUTO
    """Images left out of training to judge it by. auto: a tenth, at most 64; none below 20 images."""
    max_bad: float = Field(0.01, ge=0, le=1)
    """Share of unreadable images that is forgiven; one always is."""
    range16: tuple[float, float] = (0, 65535)
    """Values of 16-bit images that are taken as black and white."""
    data_root: str | None = None
    """For list files: the folder that paths are relative to and must lie in. Default: the list file's own."""
    include: tuple[str, ...] = ()
    """Patterns of paths below the data folder; other images are left out. A folder's name is for all that is in it."""
    exclude: tuple[str, ...] = ()
    """Patterns of paths below the data folder that are left out, e.g. masks '*_depth.png'."""
    follow_links: bool = False
    """Follow symbolic links that lead out of the data folder."""
    resume: bool = False
    """Go on with the run in --out; starts it if the folder is empty."""
    overwrite: bool = False
    """Remove the run in --out and start anew."""
    plan: bool = False
    """Print the plan, with what the run takes, and stop; nothing is written."""
    views: ViewSettings = ViewSettings()
    """How views are drawn."""

    @model_validator(mode="before")
    @classmethod
    def _as_published(cls, values: Any) -> Any:
        """Settings are those that the method was published with, but for what is given."""
        method = values.get("method", "gtsa")
        known = isinstance(method, str) and method in METHODS  # a file of settings may say anything
        return merged(METHODS[method].constants["published_settings"], values) if known else values

    @model_validator(mode="after")
    def _consistent(self) -> PretrainSettings:
        problems = []
        if self.method not in MethodSettings:
            problems.append(f"method: there is no {self.method!r}; there is {', '.join(MethodSettings)}")
        if not is_auto(self.steps) and not is_auto(self.epochs):
            problems.append("steps and epochs: give one of the two")
        if self.resume and self.overwrite:
            problems.append("resume and overwrite: give one of the two")
        if self.range16[0] >= self.range16[1]:
            problems.append(f"range16: black {self.range16[0]} must be below white {self.range16[1]}")
        if self.init is None and not is_auto(self.gram_weight) and self.gram_weight > 0:
            problems.append("gram_weight: holds features to those of weights to start from; give --init")
        if self.eval and not (self.eval_val or self.eval_folds or self.eval_config):
            problems.append("eval: give --eval-val IMAGES [LABELS], or --eval-folds N with --eval-train IMAGES LABELS")
        if (self.eval_train or self.eval_val) and not self.eval:
            problems.append(
                f"eval: name what to ask of these images, e.g. knn; there is {', '.join(EvaluatorSettings)}"
            )
        if self.keep_best and self.keep_best.split(":")[0] not in self.eval:
            problems.append(f"keep_best: {self.keep_best.split(':')[0]} is not among --eval {' '.join(self.eval)}")
        v = self.views
        fewest = METHODS[self.method].constants["min_views"] if self.method in METHODS else 2
        if (
            v.global_crops_number < 1
            or v.local_crops_number < 0
            or v.global_crops_number + v.local_crops_number < fewest
        ):
            problems.append("views: at least one global crop and one other view are needed")
        for name in ("global_crops_scale", "local_crops_scale"):
            low, high = getattr(v, name)
            if not 0 < low <= high <= 1:
                problems.append(f"views.{name}: 0 < low <= high <= 1, not {low} {high}")
        if not 0 < v.aspect[0] <= v.aspect[1]:
            problems.append(f"views.aspect: 0 < low <= high, not {v.aspect[0]} {v.aspect[1]}")
        for name in (
            "color_jitter",
            "grayscale",
            "gaussian_blur",
            "solarize",
            "hflip",
            "global_overlap",
            "local_overlap",
        ):
            given = getattr(v, name)
            if not all(0 <= share <= 1 for share in (given if isinstance(given, tuple) else (given,))):
                problems.append(f"views.{name}: from 0 to 1, not {given}")
        if self.method in METHODS and METHODS[self.method].constants["needs_overlap"]:
            problems += [
                f"views.{name}: must be {wanted} for {self.method}, which compares what crops show of the same place"
                for name, wanted, wrong in (
                    ("hflip", "0", v.hflip > 0),
                    ("global_overlap", "above 0", v.global_overlap == 0),
                    ("local_overlap", "above 0", v.local_overlap == 0),
                )
                if wrong
            ]
        for name, most in (("brightness", math.inf), ("contrast", math.inf), ("saturation", math.inf), ("hue", 0.5)):
            if not 0 <= getattr(v, name) <= most:
                problems.append(f"views.{name}: from 0 to {most}, not {getattr(v, name)}".replace("to inf", "upwards"))
        if not 0 < v.sigma[0] <= v.sigma[1]:
            problems.append(f"views.sigma: 0 < low <= high, not {v.sigma[0]} {v.sigma[1]}")
        if problems:
            raise UserError("\n".join(problems))
        return self

    @property
    def options(self) -> dict[str, Any]:
        """Arguments for the constructor of the chosen method."""
        options = dict(getattr(self, self.method).model_dump())
        if not self.views.rotations and "rotation_weight" in options:
            options["rotation_weight"] = 0.0  # nothing to predict where nothing is turned
        return options


if TYPE_CHECKING:
    Pretrain = PretrainSettings
else:
    Pretrain = with_sections(PretrainSettings, "Pretrain", MethodSettings, "Options of --method {}.")
    """All settings of ``gtsa pretrain``: those above, and a section for each method that there is."""
