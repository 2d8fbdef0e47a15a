"""gtsa evaluate: how good are the features? One question or several, asked of anybody's weights."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gtsa import config, evals, labels, plan
from gtsa.backbone import Backbone
from gtsa.checkpoint import store
from gtsa.core import Evaluator, Evidence, Remedy
from gtsa.export import opened
from gtsa.features import Lab
from gtsa.labels import Labelled
from gtsa.predictions import Keeper
from gtsa.terminal import say, table

VERSIONS = ("gtsa", "torch", "torchvision", "timm", "numpy", "scikit-learn", "torchmetrics", "faster-coco-eval")


def evaluate(weights: str, task: str | Sequence[str], **settings: Any) -> dict[str, Any]:
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
    asked = config.validated(config.Evaluate, {"weights": weights, "task": tasks, **settings})
    ready = plan.engine(asked)
    plan.workers(ready)
    s = ready.settings
    fabric = plan.fabric_of(s)
    evaluators = {name: evals.found()[name](**dict(getattr(s, name))) for name in s.task}
    data = {name: _data(evaluator, name, s) for name, evaluator in evaluators.items()}  # all of it, before any work
    backbone, told = opened(s.weights, s.network, s.model)
    say(told)
    fingerprint = _fingerprint(backbone)
    backbone = backbone.to(fabric.device).eval()
    results = []
    for name, evaluator in evaluators.items():
        train, val = data[name]
        keeper = Keeper(s.predictions, s.pictures, name, val)
        lab = Lab(fabric, s.tokens, s.seed, s.batch_size, s.workers, _folder(s, name), keeper)
        evidence = _asked(evaluator, backbone, train, val, lab, s.folds, keeper)
        keeper.close()
        figures = evaluator.figures(evidence)
        results.append(_result(name, s, figures, train, val))
        _show(results[-1])
    report = {
        "weights": {"source": s.weights, "model": backbone.model, "network": s.network, "fingerprint": fingerprint},
        "tokens": s.tokens,
        "seed": s.seed,
        "device": f"{fabric.device.type}, precision {s.precision}",
        "versions": {"python": platform.python_version(), **_versions()},
        "results": results,
    }
    if s.out:
        place = Path(s.out)
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            store(place, (json.dumps(report, indent=1) + "\n").encode())
        except OSError as error:
            raise Remedy(f"--out {s.out} cannot be written: {error.strerror}; give another file", 6) from None
        say(f"results: {s.out}")
    return report


def _data(evaluator: Evaluator, name: str, s: Any) -> tuple[Labelled | None, Labelled]:
    """Training and judged images of an evaluation; with folds they are the same."""
    if s.folds:
        both = _open(evaluator, s.train, s)
        if s.folds > len(both):
            raise Remedy(f"--folds {s.folds}: there are {len(both)} images")
        return both, both
    if evaluator.learns and not s.train:
        raise Remedy(f"--task {name} learns from labels: give --train IMAGES LABELS, and --val or --folds")
    val = _open(evaluator, s.val, s)
    if not evaluator.learns:
        return None, val
    train = _open(evaluator, s.train, s)
    if train.kind != val.kind or train.classes != val.classes:
        only = sorted(set(train.classes) ^ set(val.classes))
        raise Remedy(
            f"--train and --val do not have the same classes: {', '.join(map(str, only[:5]))}"
            f"{f' and {len(only) - 5} more' if len(only) > 5 else ''} are in one of them alone; name them alike, or "
            "give the list with --classes",
            3,
        )
    return train, val


def _open(evaluator: Evaluator, places: tuple[str, ...], s: Any) -> Labelled:
    options = {"ignore": s.ignore, "reduce_zero_label": s.reduce_zero_label, "classes": s.classes}
    told: list[str] = []
    for kind in evaluator.labels:
        try:
            return labels.open_labelled(places[0], places[1] if len(places) > 1 else None, kind, **options)  # type: ignore[arg-type]
        except labels.UnknownFormat as remedy:
            told.append(str(remedy))
    raise Remedy("\n".join(told), 3)


def folds_of(images: int, folds: int, seed: int) -> Iterator[tuple[list[int], list[int]]]:
    """(training, judged) places for each fold: a random partition that follows from the seed."""
    order = np.random.default_rng(seed).permutation(images)
    for fold in range(folds):
        judged = np.sort(order[fold::folds])
        yield np.setdiff1d(order, judged).tolist(), judged.tolist()


def _asked(
    evaluator: Evaluator, backbone: Backbone, train: Any, val: Any, lab: Lab, folds: int | None, keeper: Any
) -> Evidence:
    if not folds:
        return evaluator(backbone, train, val, lab)
    parts = []
    for number, (learnt, judged) in enumerate(folds_of(len(val), folds, lab.seed)):
        say(f"fold {number + 1} of {folds}")
        keeper.places = judged
        parts.append(evaluator(backbone, train.take(learnt), val.take(judged), lab))
    return joined(parts)


def joined(parts: Sequence[Evidence]) -> Evidence:
    """Evidence of several sets of images as one; what only some of them have is left out."""
    names = [name for name in parts[0] if all(name in part for part in parts)]
    return {
        name: torch.cat([part[name] for part in parts])
        if isinstance(parts[0][name], torch.Tensor)
        else [entry for part in parts for entry in part[name]]
        for name in names
    }


def _folder(s: Any, name: str) -> Path | None:
    return Path(s.work) / name if s.work else None


def _fingerprint(backbone: Backbone) -> str:
    digest = hashlib.sha256()
    for key, value in sorted(backbone.vit.state_dict().items()):
        digest.update(key.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _versions() -> dict[str, str]:
    found = {}
    for name in VERSIONS:
        try:
            found[name] = version(name)
        except ModuleNotFoundError:
            continue
    return found


def _result(name: str, s: Any, figures: Mapping[str, float], train: Labelled | None, val: Labelled) -> dict[str, Any]:
    counts = {"judged": len(val), "folds": s.folds} if s.folds else {"judged": len(val)}
    if train is not None and not s.folds:
        counts["trained_on"] = len(train)
    data = {"val": val.fingerprint}
    if train is not None and not s.folds:
        data["train"] = train.fingerprint
    return {
        "task": name,
        "settings": dict(getattr(s, name)),
        "images": counts,
        "classes": len(val.classes),
        "data": data,
        "figures": figures,
    }


def _show(result: Mapping[str, Any]) -> None:
    images = result["images"]
    how = (
        f"{images['folds']}-fold over {images['judged']:,} images"
        if "folds" in images
        else (
            f"{images['judged']:,} images"
            + (f", learnt from {images['trained_on']:,}" if "trained_on" in images else "")
        )
    )
    rows = [(name, f"{value:.2f}", "") for name, value in result["figures"].items()]
    table(f"{result['task']} ({how})", rows)
