"""The settings of gtsa evaluate."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from gtsa.core.errors import UserError
from gtsa.core.settings import AUTO, Auto, Count, Documented, Natural, Strict, settings_of, with_sections
from gtsa.evaluation import evaluators

EvaluatorSettings: dict[str, type[Strict]] = {
    name: settings_of(evaluator, name) for name, evaluator in evaluators.declared().items()
}


class EvaluateSettings(Documented):
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
    workers: Natural | Auto = AUTO
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
    def _consistent(self) -> EvaluateSettings:
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
            raise UserError("\n".join(problems))
        return self


EvaluateSettings.model_fields["task"].description = f"What to ask, one or several of {', '.join(EvaluatorSettings)}."

if TYPE_CHECKING:
    Evaluate = EvaluateSettings
else:
    Evaluate = with_sections(EvaluateSettings, "Evaluate", EvaluatorSettings, "Options of --task {}.")
    """All settings of ``gtsa evaluate``: those above, and a section for each evaluation that there is."""
