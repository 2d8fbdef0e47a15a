"""Reads and writes the results of jobs."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from gtsa.comparison.jobs import UNCOMPARED, Job, compute_digest, make_pretrain_settings
from gtsa.comparison.settings import Compare
from gtsa.core.errors import UserError
from gtsa.core.files import store
from gtsa.core.migration import SCHEMA
from gtsa.core.settings import flat
from gtsa.evaluation.evaluator import PerImage

CurveEntry = dict[str, Any]  # a line of a run's logs: "step", and scores, rank, verdict or metrics


class TaskResult(TypedDict, total=False):
    """Metrics of one task.

    ``groups``: with --groups the group of each image. ``without`` (trials only): for every fold, the metrics of all
    other images.
    """

    task: str
    feature: str
    metrics: dict[str, float]
    images: int
    groups: list[int]
    without: list[dict[str, float]]


class Result(TypedDict, total=False):
    """Content of result.json. A failed job has only ``status`` and ``reason``; only trained rows have costs."""

    schema: int
    row: str
    stage: str
    number: int
    digest: str
    status: str  # done or failed
    reason: str  # of a failure
    settings: dict[str, object]
    steps: int
    images_seen: int
    flops_per_image: float
    seconds: float  # of training
    peak_memory: int
    device: str
    torch: str
    curve: list[CurveEntry]
    weights: str
    results: list[TaskResult]
    seconds_in_all: float


def folder_of(job: Job, settings: Compare) -> Path:
    return Path(settings.out) / "cells" / job.row.name / f"{job.stage}-{job.number}"


def commit(job: Job, settings: Compare, result: Result) -> None:
    """Writes the result of a job, completely or not at all."""
    identity = Result(
        schema=SCHEMA,
        row=job.row.name,
        stage=job.stage,
        number=job.number,
        digest=compute_digest(job, settings),
    )
    text = json.dumps({**identity, **result}, indent=1) + "\n"
    store(folder_of(job, settings) / "result.json", text.encode())


def read_result(job: Job, settings: Compare) -> Result | None:
    """The result of a job, or None if it has none yet. Raises UserError if it was made with other settings (4)."""
    file = folder_of(job, settings) / "result.json"
    try:
        result: Result = json.loads(file.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}); remove it to run the job again", 4) from None
    if result.get("schema", 1) != SCHEMA:
        raise UserError(f"{file} was made by another version of gtsa; give another --out, or remove its folder", 4)
    if result.get("digest") != compute_digest(job, settings):
        changes = describe_changes(result, job, settings)
        raise UserError(f"{file} was made with other settings ({changes}); give another --out, or remove its folder", 4)
    return result


def describe_changes(result: Result, job: Job, settings: Compare) -> str:
    """The settings that differ between a stored result and the present comparison, as far as they were stored."""
    changes = []
    if "settings" in result and job.row.source is None:
        old, new = _flatten(result["settings"]), _flatten(make_pretrain_settings(job, settings))
        changes = [
            f"{name}: {old.get(name, 'not given')}, now {new.get(name, 'not given')}"
            for name in sorted(old.keys() | new.keys())
            if old.get(name) != new.get(name)
        ]
    return "; ".join(changes) or "its images, its tasks, or settings that were not stored"


def _flatten(settings: Mapping[str, object]) -> dict[str, object]:
    """Pretraining settings by dotted name, with JSON types, without paths and online evaluations."""
    plain: dict[str, object] = json.loads(json.dumps(settings))
    ignored = (*UNCOMPARED, "data", "out")
    return flat({key: value for key, value in plain.items() if key not in ignored and not key.startswith("eval")})


def read_successful_result(job: Job, settings: Compare) -> Result | None:
    """The result of a job, or None if it has none yet or failed."""
    result = read_result(job, settings)
    return result if result and result["status"] == "done" else None


def get_final_verdict(result: Result) -> str:
    """The last verdict of a run, e.g. collapsing; empty if the run has no verdict."""
    verdicts: list[str] = [entry["verdict"] for entry in result.get("curve", ()) if "verdict" in entry]
    return verdicts[-1] if verdicts else ""


# Results of every image


def write_per_image(job: Job, settings: Compare, per_image: Mapping[tuple[str, str], PerImage]) -> None:
    """Writes {(task, feature): per_image}, for intervals."""
    arrays: dict[str, Any] = {}  # Any, as savez has keyword arguments of other types
    lists: dict[str, Sequence[object]] = {}
    for (task, feature), results in per_image.items():
        for name, values in results.items():
            key = f"{task}/{feature}/{name}"
            if isinstance(values, Tensor):
                arrays[key] = values.cpu().numpy()
            elif values and all(isinstance(value, Tensor) and value.shape == values[0].shape for value in values):
                arrays[key] = torch.stack(list(values)).cpu().numpy()
            else:
                lists[key] = values
    buffer = io.BytesIO()  # compressed, because confusion matrices of single images are mostly zeros
    np.savez_compressed(buffer, **arrays)
    store(folder_of(job, settings) / "per_image.npz", buffer.getvalue())
    if lists:
        store(folder_of(job, settings) / "per_image.json", json.dumps(lists).encode())


def read_per_image(job: Job, settings: Compare) -> dict[tuple[str, str], PerImage]:
    """{(task, feature): per_image} of a job that is done, as ``write_per_image`` wrote it."""
    folder = folder_of(job, settings)
    per_image: dict[tuple[str, str], PerImage] = {}
    with np.load(folder / "per_image.npz") as arrays:
        for key, array in arrays.items():
            task, feature, name = key.split("/")
            per_image.setdefault((task, feature), {})[name] = torch.from_numpy(array)
    file = folder / "per_image.json"
    for key, values in (json.loads(file.read_text()) if file.exists() else {}).items():
        task, feature, name = key.split("/")
        per_image.setdefault((task, feature), {})[name] = values
    return per_image
