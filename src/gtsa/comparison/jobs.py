"""Jobs of a comparison. A job is one network of a row: it is trained, then evaluated on all tasks.

Each job has a folder ``OUT/cells/ROW/STAGE-NUMBER`` with all that the report needs:

job.json                the job and the settings of the comparison, for the process that runs the job
result.json             settings, metrics and costs, or the reason of a failure; written last: then the job is done
per_image.npz           results of every image, for intervals; trials have none
maps.png                feature maps of the same images for every row
run/                    logs and export of the pretraining; its checkpoints are removed when the job is done
trained.json, teacher/  with --only training: settings, costs and weights of a network that waits for its evaluation
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from gtsa.comparison.rows import Row
from gtsa.comparison.settings import Compare, list_tasks_of
from gtsa.core.settings import is_auto, merged, validated
from gtsa.data.images.pixels import Range
from gtsa.data.sources import Selection, open_source
from gtsa.evaluation import evaluators, tasks
from gtsa.evaluation.evaluator import Evaluator
from gtsa.evaluation.settings import Evaluate, EvaluatorSettings
from gtsa.models.transform import FULL_RANGE
from gtsa.models.weight_sources import read_weights
from gtsa.pretraining.settings import METHODS, Pretrain
from gtsa.training.digest import digest_of

STAGES = {"images": "equal images", "flops": "equal operations"}  # the stages in the report
TRIAL_SEED = 1_000  # of all trials: equal initialisation and images for all settings; no final run has this seed
SELECTING = ("data_root", "include", "exclude", "follow_links")  # settings that choose among the images
UNCOMPARED = ("device", "workers", "devices", "precision")  # settings that change at most the last digits of a result
EVALUATION_SEED = 0  # of all evaluations: images and folds are the same for every network, so results are paired


@dataclass(frozen=True)
class Job:
    """One network of a row. ``stage``: trial, images (equal number of images) or flops (equal operations)."""

    row: Row
    stage: str
    number: int  # the seed; for a trial its number
    changes: Mapping[str, object] = field(default_factory=dict)  # to the settings of the row

    @property
    def name(self) -> str:
        return f"{self.row.name}/{self.stage}-{self.number}"


def job_to_json(job: Job, settings: Compare) -> str:
    """A job with the settings of the comparison as JSON: the complete input of the process that runs it."""
    return json.dumps({"settings": json.loads(settings.model_dump_json()), "job": asdict(job)}, indent=1)


def read_job(path: Path) -> tuple[Job, Compare]:
    """Reads back what ``job_to_json`` wrote."""
    content = json.loads(path.read_text())
    job = content["job"]
    return Job(Row(**job.pop("row")), **job), validated(Compare, content["settings"])


# Settings of a job


def make_pretrain_settings(job: Job, settings: Compare) -> dict[str, Any]:
    """Settings of gtsa pretrain for a job."""
    combined: dict[str, Any] = {
        "model": settings.model, "steps": settings.steps, "batch_size": settings.batch_size,
        "precision": settings.precision, "device": settings.device, "workers": settings.workers, "devices": 1,
    }  # fmt: skip
    steps = {"steps": job.changes["steps"]} if "steps" in job.changes else {}
    for overrides in (settings.pretrain, job.changes, job.row.settings, steps):  # the row overrides its trials
        combined = merged(combined, overrides)
    seed = TRIAL_SEED if job.stage == "trial" else job.row.seed_offset + job.number
    combined |= {"data": settings.data, "seed": seed}
    sections = {"views", combined["method"]}
    return {key: value for key, value in combined.items() if key not in METHODS or key in sections}


def select_images(settings: Compare) -> Selection:
    """Which images of the data all rows are trained on."""
    names = [name for name in SELECTING if name in settings.pretrain]
    given = validated(Pretrain, {"model": settings.model, **settings.pretrain})
    return Selection(**{name: getattr(given, name) for name in names})


def range16_of(settings: Compare) -> Range:
    """The range of 16-bit images of all rows: that of the common settings of pretraining, or of their --init."""
    common = validated(Pretrain, {"model": settings.model, **settings.pretrain})
    if not is_auto(common.range16):
        return common.range16
    return read_weights(common.init).range16 if common.init else FULL_RANGE


def open_tasks(
    job: Job, settings: Compare, opened: tasks.Opened | None = None
) -> Iterator[tuple[str, Evaluate, tasks.Task]]:
    """(feature, evaluation settings, task) of every evaluation of a job. A trial has only the primary tasks.

    Args:
        opened: labels that are already open; newly opened labels are added to it.
    """
    opened = {} if opened is None else opened
    trial = job.stage == "trial"
    for name in settings.task:
        evaluator = settings.evaluator_of(name)
        if trial and name not in list_tasks_of(settings.primary):
            continue
        shared = merge_task_settings(name, settings)
        inner_folds = trial and not shared["val"]
        if trial and shared["val"]:  # settings are chosen on the training images alone
            shared |= {"val": (), "folds": shared["folds"] or 5}
        given = {"seed": EVALUATION_SEED, **_device_settings(settings), **_without_missing(shared)}
        vector = evaluator in ("knn", "linear", "finetune", "rotation")
        for tokens in settings.tokens if vector and not trial else settings.tokens[:1]:  # the first decides
            evaluate = validated(
                Evaluate, {"weights": "-", "task": (evaluator,), "tokens": tokens, **given}, f"--task {name}"
            )
            for task in tasks.open_tasks(evaluate, opened):
                feature = tokens if vector else "patches"
                yield feature, evaluate, replace(task, name=name, pairs=inner_folds and bool(task.folds))


def merge_task_settings(task: str, settings: Compare) -> dict[str, Any]:
    """Settings of gtsa evaluate for a task: the common ones, overridden by those of the task."""
    given = {**_data_settings(settings), **settings.evaluate, **settings.tasks.get(task, {})}
    return {name: value for name, value in given.items() if name != "evaluator"}


def images_of(task: str, settings: Compare) -> str:
    """The images that a task is evaluated on, as text: tasks with the same text have the same images."""
    given = merge_task_settings(task, settings)
    return json.dumps([given["val"] or (given["train"], given["folds"]), given.get("groups")])


def make_evaluator(task: str, settings: Compare) -> Evaluator:
    name = settings.evaluator_of(task)
    options = merge_task_settings(task, settings).get(name, {})
    return evaluators.load_all()[name](**dict(validated(EvaluatorSettings[name], options, f"--task {task}")))


def make_online_evaluation_settings(settings: Compare) -> dict[str, object]:
    """Settings of gtsa evaluate for evaluations during training."""
    tasks_and_options = {"weights": "-", "task": list_tasks_of(settings.primary), **settings.evaluate}
    return _without_missing({**tasks_and_options, **_data_settings(settings)})


def make_device_settings(settings: Compare) -> dict[str, object]:
    """Settings of gtsa evaluate that choose device, precision and workers."""
    return {"weights": "-", "task": ("health",), "val": ("-",), **_device_settings(settings)}


def _data_settings(settings: Compare) -> dict[str, object]:
    return {"train": settings.train, "val": settings.val, "folds": settings.folds}


def _device_settings(settings: Compare) -> dict[str, object]:
    return {"precision": settings.precision, "device": settings.device, "workers": settings.workers}


def _without_missing(values: Mapping[str, object]) -> dict[str, object]:
    return {key: value for key, value in values.items() if value is not None and value != ()}


# Identity of a job


def compute_digest(job: Job, settings: Compare) -> str:
    """Digest of all settings that decide the metrics of a job. A result with a different digest is refused."""
    evaluation: tuple[object, ...] = (
        settings.task, settings.train, settings.val, settings.folds, settings.tokens, settings.evaluate, settings.tasks
    )  # fmt: skip
    evaluation += ("tokens in half precision",) if settings.cache_tokens else ()
    primary = (settings.primary, "inner folds") if job.stage == "trial" else ""
    return _digest(job.name, _list_network_settings(job, settings), evaluation, primary)


def compute_training_digest(job: Job, settings: Compare) -> str:
    """Digest of all settings that decide the network of a job, before its evaluation."""
    return _digest(job.name, _list_network_settings(job, settings))


def _list_network_settings(job: Job, settings: Compare) -> dict[str, object]:
    if job.row.source is not None:
        return {"source": job.row.source, "model": settings.model}
    network = make_pretrain_settings(job, settings)
    names = _digest_image_names(settings.data, select_images(settings))
    return {key: value for key, value in network.items() if key not in UNCOMPARED} | {"data": names}


def _digest(*everything: object) -> str:
    return digest_of(json.dumps(everything, sort_keys=True))[:16]  # tuples and lists are the same in JSON, as in YAML


@functools.cache
def _digest_image_names(data: str, selection: Selection) -> str:
    """Digest of the names of the images, so that a comparison can be resumed after its data were moved."""
    source = open_source(data, selection)
    return digest_of(*(source.name(index) for index in range(len(source))))
