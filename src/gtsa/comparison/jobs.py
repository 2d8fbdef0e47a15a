"""Jobs of a comparison: each is one network of a row, trained and evaluated by all tasks.

A job leaves a folder ``OUT/cells/ROW/STAGE-NUMBER`` with all that the report needs:

job.json                what the process was given that does the job
result.json             settings, figures, costs, or why it failed; it is written last, and only then the job is done
per_image.npz            what the figures follow from, image by image, for intervals; trials have none
maps.png                feature maps of the same images for every row
run/                    logs and export of the pretraining; its checkpoints go once the job is done
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from gtsa.comparison.rows import Row
from gtsa.comparison.settings import Compare
from gtsa.core.settings import merged, validated
from gtsa.data.sources import open_source
from gtsa.evaluation import evaluators, tasks
from gtsa.evaluation.evaluator import Evaluator
from gtsa.evaluation.settings import Evaluate, EvaluatorSettings
from gtsa.pretraining.settings import METHODS
from gtsa.training.trainer import digest_of

STAGES = {"images": "equal images", "flops": "equal operations"}  # of what the report tells
TRIED = 1_000  # seed of all trials: the same start and images for all settings, and those of no run
FREE = ("device", "workers", "devices", "precision")  # settings that decide no more than the last digits
SEED = 0  # of all evaluations: every network is asked alike, so that images and folds pair up


@dataclass(frozen=True)
class Job:
    """One network of a row. ``stage``: trial, images (the common number of images) or flops (of operations)."""

    row: Row
    stage: str
    number: int  # the seed; of a trial its number
    changes: Mapping[str, Any] = field(default_factory=dict)  # of the row's settings

    @property
    def name(self) -> str:
        return f"{self.row.name}/{self.stage}-{self.number}"


def written(job: Job, s: Any) -> str:
    """A job as JSON, with the settings of the comparison: all that the process for it needs."""
    return json.dumps({"settings": json.loads(s.model_dump_json()), "job": asdict(job)}, indent=1)


def read(path: Path) -> tuple[Job, Any]:
    """The job that ``written`` wrote, and the settings."""
    found = json.loads(path.read_text())
    job = found["job"]
    return Job(Row(**job.pop("row")), **job), validated(Compare, found["settings"])


# What a job is to do


def training_of(job: Job, s: Any) -> dict[str, Any]:
    """Settings of gtsa pretrain for a job."""
    given: dict[str, Any] = {
        "model": s.model, "steps": s.steps, "batch_size": s.batch_size, "precision": s.precision, "device": s.device,
        "workers": s.workers, "devices": 1,
    }  # fmt: skip
    steps = {"steps": job.changes["steps"]} if "steps" in job.changes else {}
    for more in (s.pretrain, job.changes, job.row.settings, steps):  # a row's own words count more than its trials
        given = merged(given, more)
    given |= {"data": s.data, "seed": job.number if job.stage != "trial" else TRIED}
    sections = {"views", given["method"]}
    return {k: v for k, v in given.items() if k not in METHODS or k in sections}


def tasks_of(job: Job, s: Any, opened: tasks.Opened | None = None) -> Iterator[tuple[str, Any, tasks.Task]]:
    """(feature, settings, question) of all that a job is asked; a trial is asked the primary tasks alone.

    Args:
        opened: labels that were opened for other jobs; what is opened here joins them.
    """
    opened = {} if opened is None else opened
    wanted = primary_tasks(s) if job.stage == "trial" else s.task
    for task in s.task:
        if task not in wanted:
            continue
        shared = told_of(task, s)
        if job.stage == "trial" and shared["val"]:  # settings are chosen within the training images
            shared |= {"val": (), "folds": shared["folds"] or 5}
        given = {k: v for k, v in shared.items() if v is not None and v != ()}
        vector = task in ("knn", "linear", "finetune", "rotation")
        for tokens in s.tokens if vector and job.stage != "trial" else s.tokens[:1]:  # of several the first decides
            more = {"tokens": tokens, "seed": SEED, "precision": s.precision, "device": s.device, "workers": s.workers}
            asked = validated(Evaluate, {"weights": "-", "task": (task,), **more, **given}, f"--task {task}")
            for question in tasks.open_tasks(asked, opened):
                pairs = job.stage == "trial" and bool(question.folds) and not told_of(task, s)["val"]
                yield tokens if vector else "patches", asked, replace(question, pairs=pairs)


def told_of(task: str, s: Any) -> dict[str, Any]:
    """Settings of gtsa evaluate for a task: the common ones, and over these its own."""
    return {"train": s.train, "val": s.val, "folds": s.folds, **s.evaluate, **s.tasks.get(task, {})}


def evaluator_of(task: str, s: Any) -> Evaluator:
    given = validated(EvaluatorSettings[task], told_of(task, s).get(task, {}), f"--task {task}")
    return evaluators.found()[task](**dict(given))


def primary_tasks(s: Any) -> tuple[str, ...]:
    """The tasks that the primary figure is of, each once."""
    return tuple(dict.fromkeys(part.split(":")[0] for part in s.primary.split("+")))


def looked(s: Any) -> dict[str, Any]:
    """Settings of gtsa evaluate for what is asked during training."""
    shared = {"train": s.train, "val": s.val, "folds": s.folds}
    given = {"weights": "-", "task": primary_tasks(s), **s.evaluate, **shared}
    return {k: v for k, v in given.items() if v is not None and v != ()}


def engine_of(s: Any) -> dict[str, Any]:
    """Settings of gtsa evaluate that say where it runs."""
    on = {"precision": s.precision, "device": s.device, "workers": s.workers}
    return {"weights": "-", "task": ("health",), "val": ("-",), **on}


def digest_for(job: Job, s: Any) -> str:
    """Of all that decides a job's figures: a result that was made for something else is not taken."""
    told = {"source": job.row.source, "model": s.model}
    if job.row.source is None:
        told = training_of(job, s) | {"data": _images(s.data)}
    asked = (s.task, s.train, s.val, s.folds, s.tokens, s.evaluate, s.tasks)
    primary = (s.primary, "inner folds") if job.stage == "trial" else ""
    whole = job.name, {k: v for k, v in told.items() if k not in FREE}, asked, primary
    return digest_of(json.dumps(whole, sort_keys=True))[:16]  # as JSON, which knows no tuples: YAML has none either


@functools.cache
def _images(data: str) -> str:
    """Digest of the images' names, so that a comparison can go on wherever its data lie."""
    source = open_source(data)
    return digest_of(*(source.name(index) for index in range(len(source))))


# What it leaves
