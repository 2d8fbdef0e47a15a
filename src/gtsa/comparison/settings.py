"""The settings of gtsa compare."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from gtsa.core.errors import UserError
from gtsa.core.settings import AUTO, MISSING, Auto, Count, Documented, Missing, Natural, is_auto
from gtsa.evaluation.settings import EvaluatorSettings
from gtsa.pretraining.settings import METHODS, MULTICROP

CONTROLS = ("untrained", "colour", "position")
PRIMARY = "segmentation:mIoU+in_context:mIoU"  # unless one of these tasks is not among --task

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
"""Variants of methods, for ``gtsa compare --ablate``."""


class Compare(Documented):
    """All settings of ``gtsa compare``."""

    methods: tuple[str, ...] = ("gtsa", "dino")
    """Methods to compare. The first is the reference: all others are compared with it."""
    ablate: tuple[str, ...] = ()
    """Variants of methods; each is a row."""
    controls: tuple[str, ...] = CONTROLS
    """Rows without training: untrained networks, colour and edges of each patch, position of each patch."""
    weights: tuple[str, ...] = ()
    """Rows of given weights, without further training, e.g. timm:vit_small_patch16_224.dino."""
    rows: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Further rows (YAML and Python): {name: settings of gtsa pretrain}. With 'seed_offset: N' the seeds of a row begin
    at N, so that a method can be compared with itself."""
    data: str | Missing = MISSING
    """Images for pretraining, as in 'gtsa pretrain'."""
    out: str | Missing = MISSING
    """Folder for all results. The same command resumes the comparison in it."""
    model: str = "vit_small_patch16_224"
    """timm name of a vision transformer."""
    steps: Count = 5000
    """Training steps of every run."""
    batch_size: Count = 128
    """Images per step, the same for all methods."""
    pretrain: dict[str, Any] = Field(default_factory=dict)
    """Further settings of every run (YAML and Python), as in 'gtsa pretrain', e.g. views or a method's section."""
    task: tuple[str, ...] = ("segmentation", "in_context")
    """Evaluations, as in 'gtsa evaluate --task'."""
    train: tuple[str, ...] = ()
    """IMAGES [LABELS] to train the evaluations on. If tasks need different labels, see tasks."""
    val: tuple[str, ...] = ()
    """IMAGES [LABELS] to evaluate on."""
    folds: Annotated[int, Field(ge=2)] | None = None
    """Cross-validation folds of --train, instead of --val."""
    tokens: tuple[Literal["mean", "cls", "both"], ...] = ("mean",)
    """Tokens that become one vector per image, for tasks that use one. Every choice is evaluated."""
    evaluate: dict[str, Any] = Field(default_factory=dict)
    """Further settings of the evaluations (YAML and Python), as in 'gtsa evaluate', e.g. ignore."""
    tasks: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Settings of single tasks (YAML and Python), over the above: {task: {train: ..., val: ..., folds: ...}}. With
    'evaluator: NAME' a task may have any name: so one evaluation is done on several sets of images."""
    primary: Annotated[str, Field(validate_default=True)] = AUTO
    """The metric that decides, fixed beforehand: TASK:METRIC, TASK for its first metric, or the mean of several joined
    by +. auto: segmentation:mIoU+in_context:mIoU, or the first metric of the first --task if one of the two tasks is
    not among --task."""
    seeds: Annotated[int, Field(ge=1)] = 5
    """Runs of every row, each with a different seed."""
    trials: Natural = 0
    """Trials of settings per method: its preset, then random ones. 0: the settings are used as given."""
    trial_steps: Count | None = None
    """Training steps of a trial. Default: a third of --steps."""
    learning_rates: tuple[float, float] = (2.5e-4, 1e-3)
    """Range from which the trials sample learning rates."""
    equal_flops: bool = False
    """Adds runs with as many floating-point operations as the first method's runs of equal images."""
    evaluate_every: Natural = 0
    """Steps between evaluations of the primary tasks during training, for learning curves. 0: no evaluation."""
    cache_tokens: bool = False
    """Run each network once per image and size for all dense tasks; patch tokens are rounded to half precision."""
    pictures: Natural = 4
    """Number of images whose feature maps the report shows."""
    precision: Literal["auto", "32", "bf16", "fp16"] = "auto"
    """auto: bf16 on a GPU that supports it, else 32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: all GPUs if any, else the CPU. Every GPU trains a different network."""
    workers: Natural | Auto = AUTO
    """Processes that read images, per run."""
    jobs: Count = 1
    """Networks at a time per device. On a CPU they share its cores."""
    only: Literal["training", "evaluation"] | None = None
    """Half of the work: train networks and keep them for later, which needs no labels; or evaluate those that are
    trained, e.g. on another machine. Kept weights are rounded to half precision."""
    cells: tuple[str, ...] = ()
    """Networks to train and evaluate now, as ROW/STAGE-SEED, e.g. gtsa/images-0 or 'gtsa/*'. Default: all."""
    status: bool = False
    """Print how far each network is, and stop; nothing is written."""
    plan: bool = False
    """Print which networks would be trained and evaluated, and stop; nothing is written."""

    @field_validator("primary")
    @classmethod
    def _resolve_primary(cls, primary: str, info: ValidationInfo) -> str:
        tasks = info.data.get("task", ())
        if not is_auto(primary):
            return primary
        return PRIMARY if set(list_tasks_of(PRIMARY)) <= set(tasks) else next(iter(tasks), PRIMARY)

    @model_validator(mode="after")
    def _consistent(self) -> Compare:
        problems = []
        if not self.data:
            problems.append("data: give the images for pretraining")
        if not self.out:
            problems.append("out: give a folder")
        for name in self.methods:
            if name not in METHODS:
                problems.append(f"methods: unknown method {name!r}; available: {', '.join(METHODS)}")
        if len(set(self.methods)) < len(self.methods) or not self.methods:
            problems.append("methods: give at least one, and each only once")
        for name in self.controls:
            if name not in CONTROLS:
                problems.append(f"controls: unknown control {name!r}; available: {', '.join(CONTROLS)}")
        problems += self._list_evaluation_problems()
        problems += self._list_half_problems()
        if not 0 < self.learning_rates[0] <= self.learning_rates[1]:
            problems.append(
                f"learning_rates: must be 0 < low <= high, not {self.learning_rates[0]:g} {self.learning_rates[1]:g}"
            )
        if problems:
            raise UserError("\n".join(problems))
        return self

    def _list_evaluation_problems(self) -> list[str]:
        """What is wrong with tasks, primary metric and evaluation images."""
        problems = []
        for name in self.task:
            if self.evaluator_of(name) not in tuple(EvaluatorSettings):
                problems.append(
                    f"task: unknown task {self.evaluator_of(name)!r:.100}; available: {', '.join(EvaluatorSettings)}, "
                    "and names that have an 'evaluator' under tasks"
                )
            if wrong := sorted(set(name) & set("/:+")):
                problems.append(f"task: {name!r:.100} has a {wrong[0]}; give another name")
        for name in self.tasks:
            if name not in self.task:
                problems.append(f"tasks: {name} is not among --task {' '.join(self.task)}")
        if not self.task:
            problems.append(f"task: give one or several of {', '.join(EvaluatorSettings)}")
        elif wrong := [name for name in list_tasks_of(self.primary) if name not in self.task]:
            problems += [f"primary: {name} is not among --task {' '.join(self.task)}" for name in wrong]
        if missing := [name for name in self.task if not self._has_images(name)]:
            problems.append(
                f"val: give the evaluation images of {', '.join(missing)}, or --folds N with --train IMAGES [LABELS]"
            )
        return problems

    def _list_half_problems(self) -> list[str]:
        """What ``only`` excludes: trials and equal operations are chosen by evaluations."""
        if self.only is None:
            return []
        needed = {"trials": self.trials, "equal_flops": self.equal_flops, "evaluate_every": self.evaluate_every}
        return [f"{name}: needs training and evaluation in one; leave only out" for name in needed if needed[name]]

    def evaluator_of(self, task: str) -> str:
        """The name of the evaluation that a task does."""
        name: str = self.tasks.get(task, {}).get("evaluator", task)
        return name

    def _has_images(self, task: str) -> bool:
        """Whether there are images to evaluate a task on."""
        given = {"val": self.val, "folds": self.folds, **self.evaluate, **self.tasks.get(task, {})}
        return bool(given["val"] or given["folds"])


def list_tasks_of(primary: str) -> tuple[str, ...]:
    """The tasks of a primary metric, each once."""
    return tuple(dict.fromkeys(part.split(":")[0] for part in primary.split("+")))


Compare.model_fields["ablate"].description = f"Variants of methods; each is a row: {', '.join(ABLATIONS)}."
