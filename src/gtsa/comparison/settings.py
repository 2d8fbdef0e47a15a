"""The settings of gtsa compare."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from gtsa.core.errors import UserError
from gtsa.core.settings import AUTO, MISSING, Auto, Count, Documented, Missing, Natural
from gtsa.evaluation.settings import EvaluatorSettings
from gtsa.pretraining.settings import METHODS, MULTICROP

CONTROLS = ("untrained", "colour", "position")

ABLATIONS: dict[str, dict[str, Any]] = {
    "gtsa-no-rotation": {"method": "gtsa", "views": {"rotations": False}},
    "gtsa-no-rotation-prediction": {"method": "gtsa", "gtsa": {"rotation_weight": 0.0}},
    "gtsa-no-region-target": {"method": "gtsa", "gtsa": {"region_target": "global"}},
    "gtsa-no-patch-correspondence": {"method": "gtsa", "gtsa": {"patch_weight": 0.0}},
    "gtsa-no-multi-crop": {"method": "gtsa", "views": {"local_crops_number": 0}},
    "dino-gtsa-views": {
        "method": "dino",
        "views": {
            name: MULTICROP.arguments[name][1]
            for name in (
                "rotations", "hflip", "global_crops_scale", "local_crops_scale", "global_overlap", "local_overlap",
                "brightness", "contrast", "saturation", "hue", "gaussian_blur", "solarize",
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
    data: str | Missing = MISSING
    """Images to pretrain on, as for 'gtsa pretrain'."""
    out: str | Missing = MISSING
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
    trials: Natural = 0
    """Trials of settings for every method, its preset and random ones, as many for each; 0: settings are as given."""
    trial_steps: Count | None = None
    """Of a trial. Default: a third of --steps."""
    learning_rates: tuple[float, float] = (2.5e-4, 1e-3)
    """Range of learning rates that trials are drawn from."""
    equal_flops: bool = False
    """Beside runs of equal images, runs of equal floating-point operations: as many as the first method's."""
    evaluate_every: Natural = 0
    """Steps between evaluations of the primary tasks during training, for learning curves. 0: none."""
    pictures: Natural = 4
    """Images whose feature maps the report shows."""
    precision: Literal["auto", "32", "bf16", "fp16"] = "auto"
    """auto: bf16 on a GPU that has it, else 32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPUs if there are any; each works at a run of its own."""
    workers: Natural | Auto = AUTO
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
        if not 0 < self.learning_rates[0] <= self.learning_rates[1]:
            problems.append(
                f"learning_rates: 0 < low <= high, not {self.learning_rates[0]:g} {self.learning_rates[1]:g}"
            )
        if problems:
            raise UserError("\n".join(problems))
        return self


Compare.model_fields["ablate"].description = f"Variants of methods, each a row: {', '.join(ABLATIONS)}."
