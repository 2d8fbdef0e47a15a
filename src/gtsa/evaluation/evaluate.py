"""gtsa evaluate: how good are the features? One or several tasks, on anybody's weights."""

from __future__ import annotations

import glob
import json
import math
import os
import platform
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NotRequired, TypedDict, Unpack

import numpy as np
import torch
from lightning_fabric import Fabric

from gtsa.core.errors import UserError
from gtsa.core.files import check_writable, clear_drafts, read_json, store
from gtsa.core.settings import validated, with_keywords
from gtsa.core.terminal import say, table
from gtsa.data.images.pixels import Range
from gtsa.data.labels import Labelled
from gtsa.evaluation import intervals, predictions, tasks
from gtsa.evaluation.arguments import EvaluateArguments
from gtsa.evaluation.evaluator import PerImage
from gtsa.evaluation.settings import Evaluate
from gtsa.models.backbone import Backbone
from gtsa.models.formats import weights_path
from gtsa.models.weights import load_backbone
from gtsa.training import threads
from gtsa.training.devices import launch_fabric, resolve_device, resolve_workers

VERSIONS = ("gtsa", "torch", "torchvision", "timm", "numpy", "scikit-learn", "torchmetrics", "faster-coco-eval")


class Result(TypedDict):
    """The result of one task."""

    task: str
    settings: Mapping[str, object]
    images: dict[str, int]
    classes: int
    data: dict[str, str]
    metrics: dict[str, float]
    chance: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    per_class: dict[str, dict[str, float | None]]
    seconds: float


class Report(TypedDict):
    """What --out writes."""

    weights: dict[str, str]
    requested: dict[str, object]  # the settings that the user gave
    tokens: str
    range16: Range  # values of 16-bit images that were black and white
    seed: int
    device: str
    versions: dict[str, str]
    results: list[Result]
    unfinished: NotRequired[list[str]]  # tasks that have no result yet


@with_keywords(Evaluate)
@threads.considerate()
def evaluate(
    weights: str | os.PathLike[str], task: str | Sequence[str] = (), **settings: Unpack[EvaluateArguments]
) -> Report:
    """Evaluates a backbone on labelled images, with one task or several.

    Args:
        weights: a run, an export, ``timm:NAME``, ``random:NAME``, a Hugging Face ViT folder, a .safetensors or .pth
            file.
        task: one or several tasks: see ``gtsa evaluate --help``.
        settings: as listed by ``gtsa evaluate --help``; sections are dictionaries, e.g. ``knn={"k": (10,)}``.

    Returns:
        The content of --out: settings, fingerprints of weights and data, versions, and metrics with sample counts.

    Raises:
        UserError: a mistake that the user can fix; ``code`` is its kind (core.errors.EXIT_CODES).
    """
    # Settings and device.
    names = (task,) if isinstance(task, str) else tuple(task)
    plan = resolve_device(validated(Evaluate, {"weights": weights_path(weights), "task": names, **settings}))
    resolve_workers(plan)
    resolved: Evaluate = plan.settings
    requested: dict[str, object] = json.loads(resolved.model_dump_json(exclude_unset=True))

    # Where results go: mistakes are reported before any work.
    _check_destinations(resolved, requested)

    # The tasks with their data, opened and checked.
    opened = tasks.open_tasks(resolved)
    if resolved.compile == "on":
        for each in opened:
            if reason := each.evaluator.not_compiled:
                say(f"{each.name}: --compile has no effect, as {reason}")

    # The network.
    backbone, description = load_backbone(resolved.weights, resolved.network, resolved.model)
    say(description)
    if resolved.range16 is not None and resolved.range16 != backbone.range16:
        say("16-bit images are read with --range16 {:g} {:g}".format(*resolved.range16))
    fabric = launch_fabric(resolved)
    backbone = backbone.to(fabric.device).eval()
    report = _new_report(resolved, requested, backbone, fabric)

    # Each task. Results are written after each of them: the next one may fail, or be stopped.
    with predictions.mark_unfinished(resolved.predictions, resolved.task, requested):
        for number, current in enumerate(opened, start=1):
            report["results"].append(result := _run_task(current, backbone, fabric, resolved))
            _show(result, current.evaluator.other_metrics)
            if resolved.out:
                _write(Path(resolved.out), report, unfinished=[later.name for later in opened[number:]])
    if resolved.out:
        say(f"results: {resolved.out}")
    return report


# Where results go


def _check_destinations(settings: Evaluate, requested: Mapping[str, object]) -> None:
    """Raises UserError if results could not be written at the end, or would replace those of another evaluation."""
    if settings.out:
        _check_out(Path(settings.out), requested)
    if settings.work and Path(settings.work).exists() and not Path(settings.work).is_dir():
        raise UserError(f"--work {settings.work} is a file; give a folder")
    if settings.predictions:
        predictions.check_folder(settings.predictions, requested)


def _check_out(path: Path, requested: Mapping[str, object]) -> None:
    """Results of the same evaluation, stopped between its tasks, may be replaced."""
    if path.exists() and not _is_unfinished(path, requested):
        raise UserError(f"--out {path} already exists; give another file, or remove this one first")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        clear_drafts(path.parent, glob.escape(path.name))
        check_writable(path)
    except OSError as error:
        raise _not_writable(path, error) from None


def _is_unfinished(path: Path, requested: Mapping[str, object]) -> bool:
    """Whether a file has the results of the same evaluation, stopped between its tasks."""
    report = read_json(path)
    return isinstance(report, dict) and "unfinished" in report and report.get("requested") == requested


def _write(path: Path, report: Report, unfinished: list[str]) -> None:
    content = {**report, **({"unfinished": unfinished} if unfinished else {})}
    try:
        store(path, (json.dumps(content, indent=1) + "\n").encode())
    except OSError as error:
        raise _not_writable(path, error) from None


def _not_writable(path: Path, error: OSError) -> UserError:
    return UserError(f"--out {path} cannot be written: {error.strerror}; give another file", 6)


# Tasks and their results


def _new_report(settings: Evaluate, requested: dict[str, object], backbone: Backbone, fabric: Fabric) -> Report:
    return {
        "weights": {
            "source": settings.weights,
            "model": backbone.model,
            "network": settings.network,
            "fingerprint": backbone.fingerprint,
        },
        "requested": requested,
        "tokens": settings.tokens,
        "range16": settings.range16 or backbone.range16,
        "seed": settings.seed,
        "device": f"{fabric.device.type}, precision {settings.precision}",
        "versions": {"python": platform.python_version(), **_versions()},
        "results": [],
    }


def _versions() -> dict[str, str]:
    versions = {}
    for name in VERSIONS:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def _run_task(task: tasks.Task, backbone: Backbone, fabric: Fabric, settings: Evaluate) -> Result:
    began = time.perf_counter()
    try:
        per_image = task(backbone, fabric, settings)
    except torch.OutOfMemoryError:
        raise UserError(f"--task {task.name}: out of memory; use a smaller --batch-size", 6) from None
    return {
        "task": task.name,
        "settings": task.settings,
        "images": task.images,
        "classes": len(task.val.classes),
        "data": task.data,
        "metrics": task.evaluator.metrics(per_image),
        "chance": _chance(task.val),
        "intervals": _intervals(task, per_image, settings.seed),
        "per_class": _per_class(task, per_image),
        "seconds": time.perf_counter() - began,
    }


def _chance(data: Labelled) -> dict[str, float]:
    """Metrics of guessing: the share of the most frequent class; with several classes an image, their mean share."""
    if data.kind == "classes":
        counts = np.bincount([data.target(i) for i in range(len(data))])
        return {"most frequent class": 100 * float(counts.max() / len(data))}
    if data.kind == "multilabel":
        shares = torch.stack([data.target(i) for i in range(len(data))]).double().mean(0)
        return {"mean share of a class": 100 * float(shares[shares > 0].mean())}
    return {}


def _intervals(task: tasks.Task, per_image: PerImage, seed: int) -> dict[str, tuple[float, float]]:
    """95 % intervals over images. They do not include the variance of training."""
    if not task.evaluator.bootstrap:
        return {}
    names = list(task.evaluator.metrics(per_image))
    try:
        sample = tasks.bootstrap_metrics(task, per_image, names, seed)
    except UserError:  # a choice of images for which a metric is undefined
        return {}
    estimates = {name: intervals.of_images(sample[number]) for number, name in enumerate(names)}
    return {name: (value.low, value.high) for name, value in estimates.items() if math.isfinite(value.low)}


def _per_class(task: tasks.Task, per_image: PerImage) -> dict[str, dict[str, float | None]]:
    """Metrics of every class by its name; None for a class that no image shows."""
    per_class = task.evaluator.per_class(per_image)
    names = task.val.classes
    if task.val.groups and any(len(values) != len(names) for values in per_class.values()):
        names = tuple(sorted(set(task.val.groups)))
    return {
        metric: {name: value if math.isfinite(value) else None for name, value in zip(names, values, strict=True)}
        for metric, values in per_class.items()
    }


def _show(result: Result, other_metrics: Mapping[str, str]) -> None:
    """Prints the metrics of a task: shares with %, others with what they are."""
    images = result["images"]
    title = f"{images['evaluated']:,} images"
    if "folds" in images:
        title = f"{images['folds']}-fold over {title}"
    elif "trained_on" in images:
        title += f", trained on {images['trained_on']:,}"
    ranges = {name: f"{low:.2f} to {high:.2f}" for name, (low, high) in result["intervals"].items()}
    if ranges:
        title += f"; 95 % intervals over {f'{count:,} groups of ' if (count := images.get('groups')) else ''}images"
    title += "".join(f"; {name}: {value:.2f} %" for name, value in result["chance"].items())
    rows = []
    for name, value in result["metrics"].items():
        unit = "" if name in other_metrics else " %"
        notes = [text for text in (ranges.get(name), other_metrics.get(name)) if text]
        rows.append((name, f"{value:.2f}{unit}", "; ".join(notes)))
    table(f"{result['task']} ({title})", rows)
