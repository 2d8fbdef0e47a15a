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
from gtsa.data.sources import range16_problems
from gtsa.evaluation.settings import EvaluatorSettings

_found = declared(Path(__file__).parents[1] / "data" / "views" / "multicrop.py", "MultiCrop")
assert _found is not None
MULTICROP = _found
if TYPE_CHECKING:
    from gtsa.data.sources import Selection
    from gtsa.data.views.multicrop import MultiCrop

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

LOGGERS = ("wandb", "mlflow")
NOT_PROFILED = (  # settings that do not change a step; gtsa profile has none of them
    "out", "resume", "overwrite", "plan", "report", "devices", "nodes", "steps", "epochs", "loggers", "hold_out",
    "checkpoint_every", "keep_checkpoints", "evaluate_every", "evaluate_images", "log_every", "keep_best", "eval",
    "eval_train", "eval_val", "eval_folds", "eval_config",
)  # fmt: skip
VIEW_RANGES = (  # (setting, above, at most): two values, the first not above the second
    ("global_crops_scale", 0, 1), ("local_crops_scale", 0, 1), ("aspect", 0, math.inf), ("sigma", 0, math.inf),
)  # fmt: skip
VIEW_SHARES = ("color_jitter", "grayscale", "gaussian_blur", "solarize", "hflip", "global_overlap", "local_overlap")
VIEW_JITTER = (("brightness", math.inf), ("contrast", math.inf), ("saturation", math.inf), ("hue", 0.5))


class PretrainSettings(Documented):
    data: str | Missing = MISSING
    """Folder of images (nested), .txt file with one path a line, or tar shards. Default: the sample of gtsa."""
    out: str | Missing = MISSING
    """Folder to write the run to."""
    method: str = "gtsa"
    """Training method; 'gtsa methods' lists them."""
    model: str = "auto"
    """Name of a timm vision transformer (see 'gtsa models'). auto: that of --init, or vit_small_patch16_224."""
    patch_size: Count | Auto = AUTO
    """Side of a patch, px. auto: that of --init, or of the model by timm, e.g. 16 for vit_tiny_patch16_224."""
    init: str | None = None
    """Initial weights: a run, an export, timm:NAME, a timm or Hugging Face ViT folder, a .safetensors or .pth."""
    freeze_encoder: Annotated[float, Field(ge=0, lt=1)] | Auto = AUTO
    """Share of the run in which the encoder is frozen and only new heads train. auto: 0.1 with --init, else 0."""
    encoder_lr_scale: Annotated[float, Field(gt=0)] | Auto = AUTO
    """Factor on the learning rate of the encoder's last block. auto: 0.1 with --init, else 1."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] | Auto = AUTO
    """Layer-wise learning rate decay: factor from each block to the one below. auto: 0.75 with --init, else 1."""
    gram_weight: Annotated[float, Field(ge=0)] | Auto = AUTO
    """Weight of a loss that keeps the patches' Gram matrix near that of --init. auto: 1 with --init, else 0."""
    epochs: Count | Auto = AUTO
    """Passes over the images. auto: 100, or as many as make 1,000 steps."""
    steps: Count | Auto = AUTO
    """Optimiser steps. auto: those of --epochs."""
    batch_size: Count | Auto = AUTO
    """Images per step, over all devices. auto: an eighth of the images, from 8 to 512."""
    accumulate: Count | Auto = AUTO
    """Micro-batches per step, to save memory. auto: as few as fit, which a GPU tries before training."""
    learning_rate: Positive | Auto = AUTO
    """Peak learning rate. auto: 5e-4 (mae: 1.5e-4) x batch / 256, as published; below 256 the root of batch / 256."""
    final_learning_rate: float = Field(1e-6, ge=0)
    """Final learning rate of the cosine schedule."""
    warmup: float = Field(0.1, ge=0, lt=1)
    """Share of the run in which the learning rate rises."""
    weight_decay: float = Field(0.04, ge=0)
    """Weight decay at the start; none on biases and one-dimensional parameters."""
    final_weight_decay: float = Field(0.4, ge=0)
    """Final weight decay of the cosine schedule."""
    clip_grad: float = Field(3.0, ge=0)
    """Gradient norm that each parameter tensor is clipped to. 0: no clipping."""
    beta2: float = Field(0.999, gt=0, lt=1)
    """AdamW: decay rate of the second moment."""
    drop_path: float = Field(0.1, ge=0, lt=1)
    """Drop path rate (stochastic depth) of the student's last block; linear from 0 at the first."""
    precision: Literal["auto", "32", "bf16", "fp16"] = "auto"
    """Numeric precision. auto: bf16 on a GPU that supports it, else 32."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Fuse operations of the step with torch.compile. auto: on a GPU, in a run of at least 2,000 steps."""
    activation_checkpointing: bool = False
    """Keep the input of each block alone and recompute the rest in the backward pass: less memory, more time."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Kind of device. auto: all GPUs, or the CPU."""
    devices: Count | Auto = AUTO
    """Processes on this machine, one per GPU. auto: all GPUs; one on CPU. Under torchrun: those that it started."""
    nodes: int = Field(1, ge=1)
    """Number of machines; start each with torchrun."""
    shard: bool = False
    """Spread weights, gradients and moments over all processes (FSDP2), for models that do not fit on one device.
    Give it again with --resume, or leave it out: checkpoints are the same."""
    deterministic: bool = False
    """Use deterministic kernels on GPUs (slower). On a CPU they always are."""
    workers: Natural | Auto = AUTO
    """Processes that read images, per device. auto: by the number of CPU cores."""
    cut: Literal["host", "device"] = "host"
    """Where crops are cut. device: workers only decode, and the GPU cuts; its crops may differ by one grey level."""
    cache: str | None = None
    """Folder for downscaled JPEGs (quality 95), made once and used by later runs. For large photographs, PNGs and
    TIFFs; not for shards."""
    decoder: Literal["pillow", "simplejpeg"] = "pillow"
    """Decoder of JPEGs. simplejpeg is faster (extra jpeg); its pixels differ a little."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of views, order and initial weights."""
    checkpoint_every: Count | Auto = AUTO
    """Steps between checkpoints. auto: about twenty in a run, at most 1,000 steps apart."""
    keep_checkpoints: int = Field(2, ge=1)
    """Number of checkpoints to keep."""
    evaluate_every: Count | Auto = AUTO
    """Steps between evaluations (health, pictures, --eval). auto: ten in a run, at least 50 steps apart."""
    evaluate_images: Count | Auto = AUTO
    """Images of an evaluation of health; if fewer are held out, each is drawn several times. auto: 64, or all held-out
    images if there are more; fewer where an evaluation would take more than 10 s and all together more than a tenth of
    the run. Fewer images widen the intervals of the verdict."""
    log_every: int = Field(10, ge=1)
    """Steps between lines of the log."""
    loggers: tuple[str, ...] = ()
    """Other loggers: wandb, mlflow (extras of these names). JSON lines and TensorBoard are always written."""
    eval: tuple[str, ...] = ()
    """Tasks to evaluate the teacher on during training, as in 'gtsa evaluate --task'."""
    eval_train: tuple[str, ...] = ()
    """IMAGES [LABELS] that the tasks of --eval train on."""
    eval_val: tuple[str, ...] = ()
    """IMAGES [LABELS] that the tasks of --eval evaluate on."""
    eval_folds: Annotated[int, Field(ge=2)] | None = None
    """Cross-validation on --eval-train, in place of --eval-val."""
    eval_config: str | None = None
    """YAML file of further settings of 'gtsa evaluate'."""
    keep_best: str | None = None
    """Keep and export the network with the highest metric of --eval: TASK (its first metric) or TASK:METRIC. With
    --init the default is the first task of --eval, and the start is a candidate too."""
    hold_out: Natural | Auto = AUTO
    """Images held out from training for the verdict. auto: a tenth, at most 64; none below 20 images."""
    max_bad: float = Field(0.01, ge=0, le=1)
    """Share of unreadable images that is accepted; one always is."""
    range16: tuple[float, float] | Auto = AUTO
    """Values of 16-bit images that are mapped to black and white. auto: those of --init, or 0 65535."""
    data_root: str | None = None
    """List files: the folder that paths are relative to and must lie in. Default: the folder of the list file."""
    include: tuple[str, ...] = ()
    """Patterns of paths below the data folder; other images are left out. A folder's name stands for its contents."""
    exclude: tuple[str, ...] = ()
    """Patterns of paths below the data folder to leave out, e.g. masks '*_depth.png'."""
    follow_links: bool = False
    """Follow symbolic links that lead out of the data folder."""
    resume: bool = False
    """Resume the run in --out. With --data: start it if there is none."""
    overwrite: bool = False
    """Remove the run in --out and start a new one."""
    report: bool = True
    """Write report.html at the end of the run (gtsa report)."""
    plan: bool = False
    """Print the plan with time, memory and disk, and stop; nothing is written."""
    views: ViewSettings = ViewSettings()
    """How views are drawn."""

    @model_validator(mode="before")
    @classmethod
    def _as_published(cls, values: object) -> object:
        """The method's published settings are defaults below those given."""
        method = values.get("method", "gtsa") if isinstance(values, Mapping) else None
        if not isinstance(values, Mapping) or not isinstance(method, str) or method not in METHODS:
            return values  # a file of settings may hold anything
        return merged(METHODS[method].constants["published_settings"], values)

    @model_validator(mode="after")
    def _consistent(self) -> PretrainSettings:
        problems = []
        if self.method not in MethodSettings:
            problems.append(f"method: {self.method!r} is unknown; choose from {', '.join(MethodSettings)}")
        if not is_auto(self.steps) and not is_auto(self.epochs):
            problems.append("steps and epochs: give one of the two")
        if self.resume and self.overwrite:
            problems.append("resume and overwrite: give one of the two")
        if not is_auto(self.range16):
            problems += range16_problems(self.range16)
        if self.init is None and not is_auto(self.gram_weight) and self.gram_weight > 0:
            problems.append("gram_weight: compares with the initial weights; give --init")
        if self.eval and not (self.eval_val or self.eval_folds or self.eval_config):
            problems.append("eval: give --eval-val IMAGES [LABELS], or --eval-folds N with --eval-train IMAGES LABELS")
        if (self.eval_train or self.eval_val) and not self.eval:
            problems.append(f"eval: name tasks for these images, e.g. knn; choose from {', '.join(EvaluatorSettings)}")
        if self.keep_best and self.keep_best.split(":")[0] not in self.eval:
            problems.append(f"keep_best: {self.keep_best.split(':')[0]} is not among --eval {' '.join(self.eval)}")
        problems += self._view_problems()
        for name, spec in self.given_weights.items():
            if not spec:
                problems.append(f"{name}: is missing; name weights: a run, an export, a file, or timm:NAME")
        if unknown := [name for name in self.loggers if name not in LOGGERS]:
            problems.append(f"loggers: {unknown[0]!r} is unknown, choose from {', '.join(LOGGERS)}")
        if len(set(self.loggers)) < len(self.loggers):
            problems.append(f"loggers: {' '.join(self.loggers)}: give each once")
        if problems:
            raise UserError("\n".join(problems))
        return self

    def _view_problems(self) -> list[str]:
        """What is wrong with how views are drawn."""
        views, problems = self.views, []
        constants = METHODS[self.method].constants if self.method in METHODS else {}
        counts = views.global_crops_number, views.local_crops_number
        if counts[0] < 1 or counts[1] < 0 or sum(counts) < constants.get("min_views", 2):
            problems.append("views: at least one global crop and one other view are needed")
        for name, least, most in VIEW_RANGES:
            low, high = getattr(views, name)
            if not (least < low <= high <= most):
                limit = "" if most == math.inf else f" <= {most}"
                problems.append(f"views.{name}: {least} < low <= high{limit}, not {low} {high}")
        for name in VIEW_SHARES:
            given = getattr(views, name)
            if not all(0 <= share <= 1 for share in (given if isinstance(given, tuple) else (given,))):
                problems.append(f"views.{name}: from 0 to 1, not {given}")
        for name, most in VIEW_JITTER:
            if not 0 <= getattr(views, name) <= most:
                limit = "from 0 upwards" if most == math.inf else f"from 0 to {most}"
                problems.append(f"views.{name}: {limit}, not {getattr(views, name)}")
        if constants.get("needs_overlap"):
            allowed = (
                ("hflip", "0", views.hflip <= 0),
                ("global_overlap", "above 0", views.global_overlap != 0),
                ("local_overlap", "above 0", views.local_overlap != 0),
            )
            problems += [
                f"views.{name}: must be {value} for {self.method}, which compares crops where they overlap"
                for name, value, fits in allowed
                if not fits
            ]
        return problems

    @property
    def multicrop(self) -> MultiCrop:
        """How views are drawn, once sizes are resolved."""
        from gtsa.data.views.multicrop import MultiCrop

        return MultiCrop(**self.views.model_dump())

    @property
    def selection(self) -> Selection:
        """Which images of the data are used."""
        from gtsa.data.sources import Selection

        return Selection(
            self.range16, self.data_root, self.include, self.exclude, self.follow_links, decoder=self.decoder
        )

    @property
    def given_weights(self) -> dict[str, str]:
        """{setting: weights} that the chosen method reads, beside those of --init."""
        names = METHODS[self.method].constants["given_weights"] if self.method in METHODS else ()
        return {f"{self.method}.{name}": getattr(getattr(self, self.method), name) for name in names}

    @property
    def options(self) -> dict[str, Any]:
        """Arguments for the constructor of the chosen method."""
        options = dict(getattr(self, self.method).model_dump())
        if not self.views.rotations and "rotation_weight" in options:
            options["rotation_weight"] = 0.0  # nothing to predict without rotations
        return options


if TYPE_CHECKING:
    Pretrain = PretrainSettings
else:
    Pretrain = with_sections(PretrainSettings, "Pretrain", MethodSettings, "Options of --method {}.")
    """All settings of ``gtsa pretrain``: those above, and a section for each method that there is."""
