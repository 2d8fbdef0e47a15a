"""Questions put to a backbone: the data they need, opened and checked before any work, and the answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from lightning_fabric import Fabric

from gtsa.core.errors import UserError
from gtsa.core.files import IMAGES
from gtsa.core.settings import read_yaml
from gtsa.core.terminal import say
from gtsa.data import labels
from gtsa.data.labels import Labelled
from gtsa.data.labels.unlabelled import unlabelled
from gtsa.data.run_images import RunImages
from gtsa.data.scan import scan
from gtsa.evaluation import evaluators, intervals
from gtsa.evaluation.evaluator import Evaluator, PerImage
from gtsa.evaluation.features import EvalContext
from gtsa.evaluation.folds import folds_of, joined, pairs_of, some
from gtsa.evaluation.predictions import PredictionWriter
from gtsa.models.backbone import Backbone

Opened = dict[tuple[Any, ...], Labelled]  # by places, kind and options


@dataclass(frozen=True)
class Task:
    """An evaluation, with what it learns from and what it is judged by; with folds these are the same images.

    ``pairs``: settings are to be chosen by it, for every fold without the images of that fold (see pairs_of).
    """

    name: str
    settings: Mapping[str, Any]
    evaluator: Evaluator
    train: Labelled  # empty where the evaluator uses no training set
    val: Labelled
    folds: int | None
    pairs: bool = False

    def __call__(self, backbone: Backbone, fabric: Fabric, s: Any) -> PerImage:
        """The per_image of ``backbone``, which lies on the fabric's device; ``s`` as in config.Evaluate."""
        keeper = PredictionWriter(s.predictions, s.pictures, self.name, self.val)
        lab = EvalContext(fabric, s.tokens, s.seed, s.batch_size, s.workers, None, keeper)
        if s.work:
            lab.folder = Path(s.work) / self.name
        per_image = self.per_image(backbone, lab, keeper)
        keeper.close()
        return per_image

    def per_image(self, backbone: Any, lab: EvalContext, keeper: PredictionWriter | None = None) -> PerImage:
        """What the figures follow from, of every judged image; with folds (or pairs of them) in their order."""
        if not self.folds:
            return self.evaluator(backbone, self.train, self.val, lab)
        parts, work = [], lab.folder
        splits = list((pairs_of if self.pairs else folds_of)(len(self.val), self.folds, lab.seed))
        for number, (learnt, judged) in enumerate(splits):
            say(f"{self.name}: {'pair of folds' if self.pairs else 'fold'} {number + 1} of {len(splits)}")
            if keeper:
                keeper.places = judged
            lab.folder = work / f"fold-{number}" if work else None
            parts.append(self.evaluator(backbone, self.val.take(learnt), self.val.take(judged), lab))
        return joined(parts)

    def without(self, per_image: PerImage, seed: int) -> list[dict[str, float]]:
        """Of per_image of pairs, for every fold: the figures of all other images, of which nothing has seen the fold.

        None of a fold without which the images show nothing.
        """
        if not (self.folds and self.pairs):
            return []
        parts = list(folds_of(len(self.val), self.folds, seed))
        splits = list(pairs_of(len(self.val), self.folds, seed))
        images = np.concatenate([judged for _, judged in splits])
        pair = np.repeat(np.arange(len(splits)), [len(judged) for _, judged in splits])
        told = []
        for _, fold in parts:
            has = np.array([set(fold) <= set(judged) for _, judged in splits])
            places = np.flatnonzero(has[pair] & ~np.isin(images, fold))
            try:
                told.append(self.evaluator.metrics(some(per_image, places)))
            except UserError:
                told.append({})
        return told

    @property
    def images(self) -> dict[str, int]:
        """How many images the figures are about."""
        if self.folds:
            return {"judged": len(self.val), "folds": self.folds}
        return {"judged": len(self.val)} | ({"trained_on": len(self.train)} if len(self.train) else {})

    @property
    def data(self) -> dict[str, str]:
        """Fingerprints of the images with their labels."""
        train = {"train": self.train.fingerprint} if len(self.train) and not self.folds else {}
        return {**train, "val": self.val.fingerprint}


def drawn(task: Task, per_image: PerImage, names: Sequence[str]) -> intervals.Drawn:
    """Figures by name, of all images and of random choices of them. Raises UserError where a choice shows nothing."""

    def metrics(_: int, places: np.ndarray) -> np.ndarray:
        found = task.evaluator.metrics(some(per_image, places))
        return np.array([found.get(name, math.nan) for name in names])

    return intervals.draw(metrics, 1, len(task.val), draws=200)


def open_tasks(s: Any, shared: Opened | None = None) -> list[Task]:
    """The tasks that the settings name, with their data checked.

    Args:
        shared: labels that were opened for other settings; what is opened here joins them.

    Raises:
        UserError: data are missing, of the wrong format, or wrong (2, 3).
    """
    asked = []
    opened = partial(_open, s=s, shared={} if shared is None else shared)  # several tasks, one look at the labels
    for name in s.task:
        settings = dict(getattr(s, name))
        evaluator = evaluators.found()[name](**settings)
        folds = s.folds if evaluator.uses_train_set else None  # what does not learn is asked about all images at once
        asked.append(Task(name, settings, evaluator, *_data(evaluator, name, s, opened), folds))
    for where, data in {id(d): (w, d) for q in asked if q.evaluator.trains_long for w, d in _sides(q)}.values():
        _decoded(where, data)
    return asked


def _sides(task: Task) -> list[tuple[str, Labelled]]:
    return [(w, d) for w, d in (("--train", task.train), ("--val", task.val)) if len(d)]


def _decoded(where: str, data: Labelled) -> None:
    """Raises UserError (3) with all images that cannot be read, before hours go into a training that needs them."""
    problems = labels.Problems(where)
    for name, reason in scan(data.source, decode=True).bad:
        problems.add("image that cannot be read", name, f"{reason}: mend it, or take it out of the labels")
    problems.insist()


def _data(evaluator: Evaluator, name: str, s: Any, opened: Any) -> tuple[Labelled, Labelled]:
    if s.folds:
        both = opened(s.train, evaluator.label_kinds)
        if s.folds > len(both):
            raise UserError(f"--folds {s.folds}: there are {len(both)} images")
        return (both if evaluator.uses_train_set else both.take(())), both
    if evaluator.uses_train_set and not s.train:
        what = "IMAGES, without labels" if "none" in evaluator.label_kinds else "IMAGES LABELS"
        raise UserError(f"--task {name} learns from examples: give --train {what}, or --folds N with --train alone")
    val = opened(s.val, evaluator.label_kinds) if s.val else _held_out(s.weights)
    if not evaluator.uses_train_set:
        return val.take(()), val
    train = opened(s.train, evaluator.label_kinds)
    if train.kind != val.kind:
        kinds = [data.kind.replace("none", "no labels") for data in (train, val)]
        raise UserError(f"--train has {kinds[0]}, --val {kinds[1]}; give the same kind of labels", 3)
    if unknown := sorted(set(val.classes) - set(train.classes)):
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        raise UserError(
            f"--val has classes that --train has no example of: {', '.join(map(str, unknown[:5]))}{more}; split them "
            "otherwise, or name them alike",
            3,
        )
    if missing := sorted(set(train.classes) - set(val.classes)):
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        say(f"{name}: --val has no example of {', '.join(map(str, missing[:5]))}{more}")
    seen = {train.source.path(place) or place for place in train.places}
    if common := sum((val.source.path(place) or -1) in seen for place in val.places):
        say(f"{name}: {common:,} of {len(val):,} images to judge by are among those to learn from: no fair judgement")
    return train, val.numbered_as(train)


def _open(places: tuple[str, ...], kinds: tuple[str, ...], s: Any, shared: Opened) -> Labelled:
    """The images and labels at ``places``, of the first of ``kinds`` that they can be.

    Where labels are not needed and none are given, none are looked for: nested folders of images are no classes.
    """
    if len(places) == 1 and "none" in kinds:
        kinds = ("none",)
    options = {"ignore": s.ignore, "reduce_zero_label": s.reduce_zero_label, "classes": s.classes}
    told: list[str] = []
    for kind in kinds:
        key = (*places, kind, *options.values())
        try:
            if key not in shared:
                shared[key] = labels.open_labelled(places[0], places[1] if len(places) > 1 else None, kind, **options)  # type: ignore[arg-type]
            return shared[key]
        except labels.UnknownFormat as remedy:
            told.append(str(remedy))
    raise UserError("\n".join(told), 3)


def _held_out(weights: str) -> Labelled:
    """The images that a run of ours was judged by, for what needs no others. Raises UserError where there are none."""
    place = Path(weights)
    around = (place, *place.parents[:2]) if place.exists() else ()  # RUN, RUN/best, RUN/exports/timm
    run = next((p for p in around if (p / IMAGES).is_file() and (p / "config.yaml").is_file()), None)
    if run is None:
        raise UserError(
            "--val is missing: give --val IMAGES, without labels (a run of gtsa has images of its own to be judged by, "
            f"and {weights} is none)"
        )
    settings = SimpleNamespace(**{**read_yaml(run / "config.yaml", schema=1), "out": str(run)})
    try:
        pool = RunImages(settings.data, settings, say)
    except (UserError, OSError, ValueError, AttributeError) as error:
        raise UserError(
            f"the images of {run} cannot be opened ({error}); give --val IMAGES, without labels", 3
        ) from None
    which = "held-out images" if pool.held_out else "TRAINING images (none were held out)"
    say(f"judged by {len(pool.looked_at):,} {which} of {run}; --val IMAGES takes others")
    return unlabelled(pool.source, pool.looked_at)
