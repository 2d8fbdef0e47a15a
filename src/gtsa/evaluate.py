"""gtsa evaluate: how good are the features? One question or several, asked of anybody's weights."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gtsa import config, judging, plan, strict
from gtsa.checkpoint import store
from gtsa.core import Remedy
from gtsa.export import opened
from gtsa.terminal import say, table

VERSIONS = ("gtsa", "torch", "torchvision", "timm", "numpy", "scikit-learn", "torchmetrics", "faster-coco-eval")


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
        Remedy: something is wrong that the user can mend; ``code`` says of which kind (core.EXIT_CODES).
    """
    tasks = (task,) if isinstance(task, str) else tuple(task)
    ready = plan.engine(strict.validated(config.Evaluate, {"weights": weights, "task": tasks, **settings}))
    plan.workers(ready)
    s = ready.settings
    if s.out and Path(s.out).exists():
        raise Remedy(f"--out {s.out} is there already; give another file, or remove it first")
    questions = judging.questions(s)
    backbone, told = opened(s.weights, s.network, s.model)
    say(told)
    fabric = plan.fabric_of(s)
    backbone = backbone.to(fabric.device).eval()
    report: dict[str, Any] = {
        "weights": {
            "source": s.weights,
            "model": backbone.model,
            "network": s.network,
            "fingerprint": backbone.fingerprint,
        },
        "tokens": s.tokens,
        "seed": s.seed,
        "device": f"{fabric.device.type}, precision {s.precision}",
        "versions": {"python": platform.python_version(), **_versions()},
        "results": [],
    }
    for question in questions:
        result = {
            "task": question.name,
            "settings": question.settings,
            "images": question.images,
            "classes": len(question.val.classes),
            "data": question.data,
            "figures": question(backbone, fabric, s),
        }
        _show(result)
        report["results"].append(result)
    if s.out:
        _write(Path(s.out), report)
    return report


def _versions() -> dict[str, str]:
    found = {}
    for name in VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _show(result: Mapping[str, Any]) -> None:
    images = result["images"]
    how = f"{images['judged']:,} images"
    if "folds" in images:
        how = f"{images['folds']}-fold over {how}"
    elif "trained_on" in images:
        how += f", learnt from {images['trained_on']:,}"
    table(f"{result['task']} ({how})", [(name, f"{value:.2f}", "") for name, value in result["figures"].items()])


def _write(place: Path, report: Mapping[str, Any]) -> None:
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        store(place, (json.dumps(report, indent=1) + "\n").encode())
    except OSError as error:
        raise Remedy(f"--out {place} cannot be written: {error.strerror}; give another file", 6) from None
    say(f"results: {place}")
