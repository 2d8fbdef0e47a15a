"""gtsa evaluate: how good are the features? One question or several, asked of anybody's weights."""

from __future__ import annotations

import errno
import glob
import json
import math
import os
import platform
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric

from gtsa.core.errors import UserError
from gtsa.core.files import clear_drafts, store
from gtsa.core.settings import validated
from gtsa.core.terminal import say, table
from gtsa.data.labels import Labelled
from gtsa.evaluation import intervals, predictions, tasks
from gtsa.evaluation.evaluator import PerImage
from gtsa.evaluation.settings import Evaluate
from gtsa.models.weights import load_backbone
from gtsa.training import threads
from gtsa.training.devices import launch_fabric, resolve_device, resolve_workers

VERSIONS = ("gtsa", "torch", "torchvision", "timm", "numpy", "scikit-learn", "torchmetrics", "faster-coco-eval")


@threads.considerate()
def evaluate(weights: str, task: str | Sequence[str] = (), **settings: Any) -> dict[str, Any]:
    """Asks one question or several of a backbone, on labelled images.

    Args:
        weights: a run, an export, ``timm:NAME``, ``random:NAME``, a Hugging Face ViT folder, a .safetensors or .pth
            file.
        task: which questions: see ``gtsa evaluate --help``.
        settings: as listed by ``gtsa evaluate --help``; sections are dictionaries, e.g. ``knn={"k": (10,)}``.

    Returns:
        What --out writes: settings, fingerprints of weights and data, versions, and the figures with sample counts.

    Raises:
        UserError: something is wrong that the user can mend; ``code`` says of which kind (core.errors.EXIT_CODES).
    """
    names = (task,) if isinstance(task, str) else tuple(task)
    ready = resolve_device(validated(Evaluate, {"weights": weights, "task": names, **settings}))
    resolve_workers(ready)
    s = ready.settings
    asked = json.loads(s.model_dump_json(exclude_unset=True))
    if s.out:
        _place(Path(s.out), asked)
    if s.work and Path(s.work).exists() and not Path(s.work).is_dir():
        raise UserError(f"--work {s.work} is a file; give a folder")
    if s.predictions:
        predictions.insist_on_place(s.predictions, asked)
    questions = tasks.open_tasks(s)
    backbone, told = load_backbone(s.weights, s.network, s.model)
    say(told)
    fabric = launch_fabric(s)
    backbone = backbone.to(fabric.device).eval()
    report: dict[str, Any] = {
        "weights": {
            "source": s.weights,
            "model": backbone.model,
            "network": s.network,
            "fingerprint": backbone.fingerprint,
        },
        "asked": asked,
        "tokens": s.tokens,
        "seed": s.seed,
        "device": f"{fabric.device.type}, precision {s.precision}",
        "versions": {"python": platform.python_version(), **_versions()},
        "results": [],
    }
    with predictions.placed(s.predictions, s.task, asked):
        for number, question in enumerate(questions, start=1):
            report["results"].append(result := _asked(question, backbone, fabric, s))
            _show(result)
            left = [later.name for later in questions[number:]]
            if s.out:  # after every task: the next one may fail, or be stopped
                _write(Path(s.out), {**report, **({"unfinished": left} if left else {})})
    if s.out:
        say(f"results: {s.out}")
    return report


def _asked(question: tasks.Task, backbone: Any, fabric: Fabric, s: Any) -> dict[str, Any]:
    """The answer to one question."""
    began = time.perf_counter()
    try:
        per_image = question(backbone, fabric, s)
    except torch.OutOfMemoryError:
        raise UserError(f"--task {question.name}: memory ran out; give a smaller --batch-size", 6) from None
    return {
        "task": question.name,
        "settings": question.settings,
        "images": question.images,
        "classes": len(question.val.classes),
        "data": question.data,
        "metrics": question.evaluator.metrics(per_image),
        "guessing": _guessing(question.val),
        "intervals": _intervals(question, per_image),
        "per_class": _by_class(question, per_image),
        "seconds": time.perf_counter() - began,
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _intervals(question: tasks.Task, per_image: PerImage) -> dict[str, tuple[float, float]]:
    """95 % intervals: other images could have been judged. Other trainings could have come out otherwise too."""
    if not question.evaluator.bootstrap:
        return {}
    names = list(question.evaluator.metrics(per_image))
    try:
        drawn = tasks.drawn(question, per_image, names)
    except UserError:  # a choice of images that shows nothing
        return {}
    found = {name: intervals.of_images(drawn[number]) for number, name in enumerate(names)}
    return {name: (value.low, value.high) for name, value in found.items() if math.isfinite(value.low)}


def _guessing(data: Labelled) -> dict[str, float]:
    """What can be had without looking: of classes the share of the most frequent one, of several its mean share."""
    if data.kind == "classes":
        counts = np.bincount([data.target(i) for i in range(len(data))])
        return {"most frequent class": 100 * float(counts.max() / len(data))}
    if data.kind == "multilabel":
        shares = torch.stack([data.target(i) for i in range(len(data))]).double().mean(0)
        return {"mean share of a class": 100 * float(shares[shares > 0].mean())}
    return {}


def _by_class(question: tasks.Task, per_image: PerImage) -> dict[str, dict[str, float | None]]:
    """Metrics of every class by its name; None where no image says anything of it."""
    found = question.evaluator.per_class(per_image)
    names = question.val.classes
    if question.val.groups and any(len(values) != len(names) for values in found.values()):
        names = tuple(sorted(set(question.val.groups)))
    return {
        metric: {name: value if math.isfinite(value) else None for name, value in zip(names, values, strict=True)}
        for metric, values in found.items()
    }


def _show(result: Mapping[str, Any]) -> None:
    images = result["images"]
    how = f"{images['judged']:,} images"
    if "folds" in images:
        how = f"{images['folds']}-fold over {how}"
    elif "trained_on" in images:
        how += f", learnt from {images['trained_on']:,}"
    between = {name: f"{low:.2f} to {high:.2f}" for name, (low, high) in result["intervals"].items()}
    if between:
        how += "; 95 % intervals over images"
    how += "".join(f"; {name}: {value:.2f} %" for name, value in result["guessing"].items())
    rows = [(name, f"{value:.2f}", between.get(name, "")) for name, value in result["metrics"].items()]
    table(f"{result['task']} ({how})", rows)


def _place(place: Path, asked: Mapping[str, Any]) -> None:
    """Raises UserError where the results could not be written when all is done, or would replace others.

    Those of the same evaluation, stopped between its tasks, are replaced.
    """
    if place.exists() and not _stopped(place, asked):
        raise UserError(f"--out {place} is there already; give another file, or remove it first")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        clear_drafts(place.parent, glob.escape(place.name))
        if not os.access(place.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UserError(f"--out {place} cannot be written: {error.strerror}; give another file", 6) from None


def _stopped(place: Path, asked: Mapping[str, Any]) -> bool:
    try:
        found = json.loads(place.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and "unfinished" in found and found.get("asked") == asked


def _write(place: Path, report: Mapping[str, Any]) -> None:
    try:
        store(place, (json.dumps(report, indent=1) + "\n").encode())
    except OSError as error:
        raise UserError(f"--out {place} cannot be written: {error.strerror}; give another file", 6) from None
