"""The settings of gtsa evaluate."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from gtsa.core.errors import UserError
from gtsa.core.settings import AUTO, Auto, Count, Documented, Natural, Strict, settings_of, with_sections
from gtsa.data.sources import range16_problems
from gtsa.evaluation import evaluators

EvaluatorSettings: dict[str, type[Strict]] = {
    name: settings_of(evaluator, name) for name, evaluator in evaluators.declared().items()
}


class EvaluateSettings(Documented):
    weights: str
    """A run, an export, timm:NAME, random:NAME, a timm or Hugging Face ViT folder, a .safetensors or .pth file."""
    task: tuple[str, ...] = ()
    """Tasks to run."""
    train: tuple[str, ...] = ()
    """IMAGES [LABELS] of the training set."""
    val: tuple[str, ...] = ()
    """IMAGES [LABELS] of the evaluation set."""
    folds: Annotated[int, Field(ge=2)] | None = None
    """Cross-validation instead of --val: each image of --train is evaluated once, after training on the other folds."""
    tokens: Literal["mean", "cls", "both"] = "mean"
    """One vector per image: the mean of the patch tokens (GTSA trains no CLS token), the CLS token, or both."""
    network: Literal["teacher", "student"] = "teacher"
    """Network of a run to evaluate."""
    model: str | None = None
    """Name of the timm model, if a file of weights does not hold it."""
    out: str | None = None
    """JSON file for settings, fingerprints and metrics."""
    predictions: str | None = None
    """Folder for predictions: a table of classes, masks as PNG, detections as COCO JSON."""
    pictures: Natural = 0
    """Images to draw with prediction and truth side by side, into the folder of --predictions."""
    work: str | None = None
    """Folder for checkpoints of long trainings; the same command resumes from them."""
    cache: str | None = None
    """Folder for patch tokens, in half precision: dense tasks and later evaluations see no image twice."""
    ignore: int | None = None
    """Value of unlabelled pixels in masks, e.g. 255."""
    reduce_zero_label: bool = False
    """Classes in masks are numbered from 1; 0 is unlabelled (ADE20K)."""
    classes: str | None = None
    """Text file with the names of the classes of masks, one per line, in the order of their numbers."""
    groups: str | None = None
    """CSV of columns path and group: images of one group are not independent (a place, a flight, a patient). Intervals
    draw whole groups, and folds keep them together."""
    range16: tuple[float, float] | None = None
    """Values of 16-bit images that become black and white. Default: those of the weights, or 0 65535."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of folds and trainings."""
    batch_size: Count = 32
    """Images per forward pass of the frozen backbone."""
    workers: Natural | Auto = AUTO
    """Processes that read images."""
    precision: Literal["auto", "32", "bf16", "fp16"] = "auto"
    """Numeric precision. auto: bf16 on a GPU that supports it, else 32."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Fuse operations of a training's steps with torch.compile: finetune, linear, segmentation. auto: on a GPU, in a
    training of at least 2,000 steps."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Kind of device. auto: the GPU if there is one."""
    devices: Literal[1] = 1
    """An evaluation uses one device."""
    nodes: Literal[1] = 1
    """An evaluation uses one machine."""

    @model_validator(mode="after")
    def _consistent(self) -> EvaluateSettings:
        problems = []
        if not self.task:
            problems.append(f"task: give one or several of {', '.join(EvaluatorSettings)}")
        for name in self.task:
            if name not in EvaluatorSettings:
                near = difflib.get_close_matches(name.replace("-", "_"), EvaluatorSettings, 1)
                hint = f", did you mean {near[0]}?" if near else ";"
                problems.append(f"task: unknown task {name!r}{hint} the tasks are {', '.join(EvaluatorSettings)}")
        for name in ("train", "val"):
            if len(getattr(self, name)) > 2:
                problems.append(f"{name}: give IMAGES and LABELS, not {len(getattr(self, name))} paths")
        if self.folds and (self.val or not self.train):
            problems.append("folds: needs --train and no --val: the images of --train are evaluated fold by fold")
        if not self.folds and not self.val and self.task != ("health",):  # which can use the held-out images of a run
            problems.append("val: give the evaluation images, or --folds N with --train")
        problems += range16_problems(self.range16)
        if self.pictures and not self.predictions:
            problems.append("pictures: give a folder with --predictions")
        if problems:
            raise UserError("\n".join(problems))
        return self


EvaluateSettings.model_fields["task"].description = f"Tasks to run, one or several of {', '.join(EvaluatorSettings)}."

if TYPE_CHECKING:
    Evaluate = EvaluateSettings
else:
    Evaluate = with_sections(EvaluateSettings, "Evaluate", EvaluatorSettings, "Options of --task {}.")
    """All settings of ``gtsa evaluate``: those above, and a section for each evaluation."""
