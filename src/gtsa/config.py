"""The settings of the verbs. A configuration is a call written down."""

from __future__ import annotations

import difflib
import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from gtsa import evals, methods
from gtsa.core.errors import Remedy
from gtsa.core.plugins import declared
from gtsa.core.settings import Auto, Count, Documented, Natural, Positive, Strict, merged, settings_of, with_sections

MULTICROP = declared(Path(__file__).parent / "data" / "multicrop.py", "MultiCrop")
assert MULTICROP is not None
ViewSettings = settings_of(MULTICROP, "views", auto=("global_size", "local_size"))
METHODS = methods.declared()
MethodSettings: dict[str, type[Strict]] = {
    name: settings_of(method, name, skip=("encoder",), auto=method.constants["sized"])
    for name, method in METHODS.items()
}
EvaluatorSettings: dict[str, type[Strict]] = {
    name: settings_of(evaluator, name) for name, evaluator in evals.declared().items()
}


class _Pretrain(Documented):
    data: str | None = None
    """Folder of images (nested), or a .txt file with one path a line. Without it: the sample that comes with gtsa."""
    out: str | None = None
    """Folder that the run is written into."""
    method: str = "gtsa"
    """What to learn by: see 'gtsa methods'."""
    model: str = "auto"
    """Name of a vision transformer of timm, untrained. auto: that of --init, or vit_small_patch16_224."""
    init: str | None = None
    """Weights to start from: a run, an export, timm:NAME, a timm or Hugging Face ViT folder, a .safetensors or .pth."""
    head_start: Annotated[float, Field(ge=0, lt=1)] | Auto = "auto"
    """Share of the run in which the encoder rests and what is new learns alone. auto: 0.1 with --init, else 0."""
    encoder_rate: Annotated[float, Field(gt=0)] | Auto = "auto"
    """Learning rate of the encoder's last block, times that of the rest. auto: 0.1 with --init, else 1."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] | Auto = "auto"
    """Learning rate of every block, times that of the block above. auto: 0.75 with --init, else 1."""
    anchor: Annotated[float, Field(ge=0)] | Auto = "auto"
    """Weight of a loss that holds likenesses between patches to what they were at the start. auto: 1 with --init."""
    epochs: Count | Auto = "auto"
    """Times that every image is seen. auto: 100, or more so that there are 1,000 steps."""
    steps: Count | None = None
    """Optimiser steps; takes the place of --epochs."""
    batch_size: Count | Auto = "auto"
    """Images a step, over all devices. auto: an eighth of the images, at least 8 and at most 512."""
    accumulate: Count | Auto = "auto"
    """Micro-batches that a step is made of, to save memory. auto: as few as fit."""
    learning_rate: Positive | Auto = "auto"
    """Peak. auto: 5e-4 (mae: 1.5e-4) x batch / 256 as published; below 256 images the root of batch / 256."""
    final_learning_rate: float = Field(1e-6, ge=0)
    """At the end of the cosine."""
    warmup: float = Field(0.1, ge=0, lt=1)
    """Share of the run in which the learning rate rises."""
    weight_decay: float = Field(0.04, ge=0)
    """At the start; none on biases and one-dimensional parameters."""
    final_weight_decay: float = Field(0.4, ge=0)
    """At the end of its cosine."""
    clip: float = Field(3.0, ge=0)
    """Largest gradient norm of each parameter tensor; 0: no clipping."""
    beta2: float = Field(0.999, gt=0, lt=1)
    """Of AdamW: share of the old second moment that is kept in a step."""
    drop_path: float = Field(0.1, ge=0, lt=1)
    """Stochastic depth of the student's last block."""
    precision: Literal["auto", "32", "bf16", "fp16"] = "auto"
    """auto: bf16 on a GPU that has it, else 32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPUs if there are any."""
    devices: Count | Auto = "auto"
    """Processes on this machine, one a GPU. auto: all GPUs, one on CPU. Under torchrun: what it started."""
    nodes: int = Field(1, ge=1)
    """Machines; start each with torchrun."""
    deterministic: bool = False
    """Deterministic kernels on GPUs too (slower); on CPU they always are."""
    workers: Natural | Auto = "auto"
    """Processes that read images, for each device."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Views, order and initial weights follow from it."""
    checkpoint_every: Count | Auto = "auto"
    """Steps. auto: about twenty in a run, at most every 1,000 steps."""
    keep: int = Field(2, ge=1)
    """Checkpoints that are kept."""
    evaluate_every: Count | Auto = "auto"
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
    hold_out: Natural | Auto = "auto"
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
    views: ViewSettings = ViewSettings()  # type: ignore[valid-type]
    """How views are drawn."""

    @model_validator(mode="before")
    @classmethod
    def _as_published(cls, values: Any) -> Any:
        """Settings are those that the method was published with, but for what is given."""
        method = values.get("method", "gtsa")
        known = isinstance(method, str) and method in METHODS  # a file of settings may say anything
        return merged(METHODS[method].constants["published"], values) if known else values

    @model_validator(mode="after")
    def _consistent(self) -> _Pretrain:
        problems = []
        if self.method not in MethodSettings:
            problems.append(f"method: there is no {self.method!r}; there is {', '.join(MethodSettings)}")
        if self.steps is not None and self.epochs != "auto":
            problems.append("steps and epochs: give one of the two")
        if self.resume and self.overwrite:
            problems.append("resume and overwrite: give one of the two")
        if self.range16[0] >= self.range16[1]:
            problems.append(f"range16: black {self.range16[0]} must be below white {self.range16[1]}")
        if self.init is None and self.anchor not in ("auto", 0):
            problems.append("anchor: holds features to those of weights to start from; give --init")
        if self.eval and not (self.eval_val or self.eval_folds or self.eval_config):
            problems.append("eval: give --eval-val IMAGES [LABELS], or --eval-folds N with --eval-train IMAGES LABELS")
        if (self.eval_train or self.eval_val) and not self.eval:
            problems.append(
                f"eval: name what to ask of these images, e.g. knn; there is {', '.join(EvaluatorSettings)}"
            )
        if self.keep_best and self.keep_best.split(":")[0] not in self.eval:
            problems.append(f"keep_best: {self.keep_best.split(':')[0]} is not among --eval {' '.join(self.eval)}")
        v: Any = self.views
        fewest = METHODS[self.method].constants["fewest_views"] if self.method in METHODS else 2
        if v.global_crops < 1 or v.local_crops < 0 or v.global_crops + v.local_crops < fewest:
            problems.append("views: at least one global crop and one other view are needed")
        for name in ("global_share", "local_share"):
            low, high = getattr(v, name)
            if not 0 < low <= high <= 1:
                problems.append(f"views.{name}: 0 < low <= high <= 1, not {low} {high}")
        if not 0 < v.aspect[0] <= v.aspect[1]:
            problems.append(f"views.aspect: 0 < low <= high, not {v.aspect[0]} {v.aspect[1]}")
        for name in ("jitter", "grey", "blur", "solarise", "flip", "global_overlap", "local_overlap"):
            given = getattr(v, name)
            if not all(0 <= share <= 1 for share in (given if isinstance(given, tuple) else (given,))):
                problems.append(f"views.{name}: from 0 to 1, not {given}")
        if self.method in METHODS and METHODS[self.method].constants["compares_places"]:
            problems += [
                f"views.{name}: must be {wanted} for {self.method}, which compares what crops show of the same place"
                for name, wanted, wrong in (
                    ("flip", "0", v.flip > 0),
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
            raise Remedy("\n".join(problems))
        return self

    @property
    def options(self) -> dict[str, Any]:
        """Arguments for the constructor of the chosen method."""
        options = dict(getattr(self, self.method).model_dump())
        if not self.views.rotations and "rotation_weight" in options:  # type: ignore[attr-defined]
            options["rotation_weight"] = 0.0  # nothing to predict where nothing is turned
        return options


Pretrain = with_sections(_Pretrain, "Pretrain", MethodSettings, "Options of --method {}.")
"""All settings of ``gtsa pretrain``: _Pretrain, and a section for each method that there is."""


class _Evaluate(Documented):
    weights: str
    """A run, an export, timm:NAME, random:NAME, a timm or Hugging Face ViT folder, a .safetensors or .pth file."""
    task: tuple[str, ...] = ()
    """What to ask."""
    train: tuple[str, ...] = ()
    """IMAGES [LABELS] to learn from."""
    val: tuple[str, ...] = ()
    """IMAGES [LABELS] to judge by."""
    folds: Annotated[int, Field(ge=2)] | None = None
    """Takes the place of --val: every image of --train is judged once, by what was learnt from the other folds."""
    tokens: Literal["mean", "cls", "both"] = "mean"
    """One vector an image: the mean of the patch tokens (GTSA trains no CLS token), the CLS token, or both."""
    network: Literal["teacher", "student"] = "teacher"
    """Of a run."""
    model: str | None = None
    """timm's name of the model, where the weights are a bare file that does not say."""
    out: str | None = None
    """JSON file for settings, fingerprints and figures."""
    predictions: str | None = None
    """Folder for predictions: a table of classes, masks as PNG, detections as COCO JSON."""
    pictures: Natural = 0
    """Images to draw with prediction and truth side by side, into the folder of --predictions."""
    work: str | None = None
    """Folder where long trainings keep their checkpoints; the same command goes on from them."""
    ignore: int | None = None
    """Value in masks that counts for nothing, e.g. 255."""
    reduce_zero_label: bool = False
    """Masks count classes from 1, and 0 counts for nothing (ADE20K)."""
    classes: str | None = None
    """Text file with the names of the classes of masks, one a line, in the order of their numbers."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Folds and every training follow from it."""
    batch_size: Count = 32
    """Images that go through the frozen backbone at once."""
    workers: Natural | Auto = "auto"
    """Processes that read images."""
    precision: Literal["auto", "32", "bf16", "fp16"] = "auto"
    """auto: bf16 on a GPU that has it, else 32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU if there is one."""
    devices: Literal[1] = 1
    """An evaluation runs on one device."""
    nodes: Literal[1] = 1
    """On one machine."""

    @model_validator(mode="after")
    def _consistent(self) -> _Evaluate:
        problems = []
        if not self.task:
            problems.append(f"task: name one or several of {', '.join(EvaluatorSettings)}")
        for name in self.task:
            if name not in EvaluatorSettings:
                near = difflib.get_close_matches(name.replace("-", "_"), EvaluatorSettings, 1)
                hint = f", did you mean {near[0]}?" if near else ";"
                problems.append(f"task: there is no {name!r}{hint} there is {', '.join(EvaluatorSettings)}")
        for name in ("train", "val"):
            if len(getattr(self, name)) > 2:
                problems.append(f"{name}: IMAGES and LABELS, not {len(getattr(self, name))} places")
        if self.folds and (self.val or not self.train):
            problems.append("folds: goes with --train alone, whose images are judged fold by fold")
        if not self.folds and not self.val and self.task != ("health",):  # a run has images of its own for that
            problems.append("val: give the images to judge by, or --folds N with --train")
        if self.pictures and not self.predictions:
            problems.append("pictures: name a folder with --predictions")
        if problems:
            raise Remedy("\n".join(problems))
        return self


_Evaluate.model_fields["task"].description = f"What to ask, one or several of {', '.join(EvaluatorSettings)}."
Evaluate = with_sections(_Evaluate, "Evaluate", EvaluatorSettings, "Options of --task {}.")
"""All settings of ``gtsa evaluate``: _Evaluate, and a section for each evaluation that there is."""


CONTROLS = ("untrained", "colour", "position")
ABLATIONS: dict[str, dict[str, Any]] = {
    "gtsa-no-rotation": {"method": "gtsa", "views": {"rotations": False}},
    "gtsa-no-rotation-prediction": {"method": "gtsa", "gtsa": {"rotation_weight": 0.0}},
    "gtsa-no-region-target": {"method": "gtsa", "gtsa": {"region_target": "global"}},
    "gtsa-no-patch-correspondence": {"method": "gtsa", "gtsa": {"patch_weight": 0.0}},
    "gtsa-no-multi-crop": {"method": "gtsa", "views": {"local_crops": 0}},
    "dino-gtsa-views": {
        "method": "dino",
        "views": {
            name: MULTICROP.arguments[name][1]
            for name in (
                "rotations", "flip", "global_share", "local_share", "global_overlap", "local_overlap", "brightness",
                "contrast", "saturation", "hue", "blur", "solarise",
            )
        },
    },
    "dino-rotations": {"method": "dino", "views": {"rotations": True}},
}  # fmt: skip
"""Variants of methods: what ``gtsa compare --ablate`` takes."""


class Compare(Documented):
    """All settings of ``gtsa compare``."""

    methods: tuple[str, ...] = ("gtsa", "dino")
    """What to compare; the first one is what the others are compared with."""
    ablate: tuple[str, ...] = ()
    """Variants of methods, each a row."""
    controls: tuple[str, ...] = CONTROLS
    """Rows that learn nothing: untrained networks, colour and edges of each patch, its position."""
    weights: tuple[str, ...] = ()
    """Rows of weights as they are, e.g. timm:vit_small_patch16_224.dino."""
    rows: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Further rows (YAML and Python): {name: settings of gtsa pretrain}."""
    data: str | None = None
    """Images to pretrain on, as for 'gtsa pretrain'."""
    out: str | None = None
    """Folder for everything; the same command goes on with it."""
    model: str = "vit_small_patch16_224"
    """Name of a vision transformer of timm."""
    steps: Count = 5000
    """Of every run."""
    batch_size: Count = 128
    """Images a step, the same for all methods."""
    pretrain: dict[str, Any] = Field(default_factory=dict)
    """Further settings of every run (YAML and Python), as for 'gtsa pretrain', e.g. views or a method's section."""
    task: tuple[str, ...] = ("segmentation", "in_context")
    """What to ask, as in 'gtsa evaluate --task'."""
    train: tuple[str, ...] = ()
    """IMAGES [LABELS] to learn from; several tasks with labels of their own: see tasks."""
    val: tuple[str, ...] = ()
    """IMAGES [LABELS] to judge by."""
    folds: Annotated[int, Field(ge=2)] | None = None
    """Takes the place of --val."""
    tokens: tuple[Literal["mean", "cls", "both"], ...] = ("mean",)
    """What one vector an image is made of, for tasks that want one; each is asked."""
    evaluate: dict[str, Any] = Field(default_factory=dict)
    """Further settings of the evaluations (YAML and Python), as for 'gtsa evaluate', e.g. ignore."""
    tasks: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Settings of single tasks over these (YAML and Python): {task: {train: ..., val: ..., folds: ...}}."""
    primary: str = "segmentation:mIoU+in_context:mIoU"
    """The figure that decides, named beforehand: TASK:FIGURE, or the mean of several joined by +."""
    seeds: Annotated[int, Field(ge=1)] = 5
    """Runs of every row, each with another seed."""
    tune: Natural = 0
    """Trials of settings for every method, its preset and random ones, as many for each; 0: settings are as given."""
    tune_steps: Count | None = None
    """Of a trial. Default: a third of --steps."""
    rates: tuple[float, float] = (2.5e-4, 1e-3)
    """Range of learning rates that trials are drawn from."""
    equal_flops: bool = False
    """Beside runs of equal images, runs of equal floating-point operations: as many as the first method's."""
    looks: Natural = 0
    """Times that the primary tasks are asked on the way, for learning curves."""
    pictures: Natural = 4
    """Images whose feature maps the report shows."""
    precision: Literal["auto", "32", "bf16", "fp16"] = "auto"
    """auto: bf16 on a GPU that has it, else 32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPUs if there are any; each works at a run of its own."""
    workers: Natural | Auto = "auto"
    """Processes that read images, for each run."""
    jobs: Count = 1
    """Networks at a time on each device; on a CPU they share its cores."""

    @model_validator(mode="after")
    def _consistent(self) -> Compare:
        problems = []
        if not self.data:
            problems.append("data: give the images to pretrain on")
        if not self.out:
            problems.append("out: name a folder")
        for name in self.methods:
            if name not in METHODS:
                problems.append(f"methods: there is no {name!r}; there is {', '.join(METHODS)}")
        if len(set(self.methods)) < len(self.methods) or not self.methods:
            problems.append("methods: name at least one, each once")
        for name in self.controls:
            if name not in CONTROLS:
                problems.append(f"controls: there is no {name!r}; there is {', '.join(CONTROLS)}")
        for name in self.task:
            if name not in EvaluatorSettings:
                problems.append(f"task: there is no {name!r}; there is {', '.join(EvaluatorSettings)}")
        for name in self.tasks:
            if name not in self.task:
                problems.append(f"tasks: {name} is not among --task {' '.join(self.task)}")
        for part in self.primary.split("+"):
            if part.split(":")[0] not in self.task:
                problems.append(f"primary: {part.split(':')[0]} is not among --task {' '.join(self.task)}")
        if not 0 < self.rates[0] <= self.rates[1]:
            problems.append(f"rates: 0 < low <= high, not {self.rates[0]:g} {self.rates[1]:g}")
        if problems:
            raise Remedy("\n".join(problems))
        return self


Compare.model_fields["ablate"].description = f"Variants of methods, each a row: {', '.join(ABLATIONS)}."
