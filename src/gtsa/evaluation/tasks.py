"""The tasks of an evaluation: their data, opened and checked before any work, and their results."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from lightning_fabric import Fabric

from gtsa.core.errors import UserError
from gtsa.core.files import IMAGES
from gtsa.core.terminal import say
from gtsa.data import labels
from gtsa.data.labels import Kind, Labelled
from gtsa.data.labels.image_groups import with_groups
from gtsa.data.labels.unlabelled import unlabelled
from gtsa.data.run_images import open_images_of
from gtsa.data.scan import scan
from gtsa.evaluation import evaluators, intervals
from gtsa.evaluation.context import EvalContext
from gtsa.evaluation.evaluator import Evaluator, PerImage
from gtsa.evaluation.folds import folds_of, joined, pairs_of, selected
from gtsa.evaluation.predictions import PredictionWriter
from gtsa.evaluation.settings import Evaluate
from gtsa.evaluation.token_cache import TokenCache
from gtsa.models.backbone import Backbone, Encoder

Opened = dict[tuple[object, ...], Labelled]  # by paths, kind and options
Opener = Callable[[tuple[str, ...], tuple[Kind, ...]], Labelled]  # (paths, accepted kinds) -> labels
KINDS: dict[Kind, str] = {
    "classes": "one class per image",
    "multilabel": "several classes per image",
    "masks": "masks",
    "boxes": "boxes",
    "none": "images without labels",
}


@dataclass(frozen=True)
class Task:
    """An evaluator with its training set and evaluation set; with folds these are the same images.

    ``pairs``: evaluate every pair of folds, so that settings can be chosen for each fold without its images.
    """

    name: str
    settings: Mapping[str, object]
    evaluator: Evaluator
    train: Labelled  # empty if the evaluator uses no training set
    val: Labelled
    folds: int | None
    pairs: bool = False

    def __call__(self, backbone: Backbone, fabric: Fabric, settings: Evaluate) -> PerImage:
        """The results of every image. ``backbone`` is on the fabric's device."""
        _, val = self._read_as(backbone, settings)
        writer = PredictionWriter(settings.predictions, settings.pictures, self.name, val)
        folder = Path(settings.work) / self.name if settings.work else None
        context = EvalContext(
            fabric, settings.tokens, settings.seed, settings.batch_size, settings.workers, folder, writer,
            settings.range16, settings.compile, _open_cache(backbone, settings),
        )  # fmt: skip
        per_image = self.per_image(backbone, context, writer)
        writer.close()
        return per_image

    def per_image(self, backbone: Encoder, context: EvalContext, writer: PredictionWriter | None = None) -> PerImage:
        """The results of every evaluation image; with folds (or pairs of them) in the order of the folds."""
        train_set, val_set = self._read_as(backbone, context)
        if not self.folds:
            return self.evaluator(backbone, train_set, val_set, context)
        parts, work = [], context.folder
        splits = list((pairs_of if self.pairs else folds_of)(len(self.val), self.folds, context.seed, self._groups))
        for number, (train, val) in enumerate(splits):
            say(f"{self.name}: {'pair of folds' if self.pairs else 'fold'} {number + 1} of {len(splits)}")
            if writer:
                writer.indices = val
            context.folder = work / f"fold-{number}" if work else None
            parts.append(self.evaluator(backbone, val_set.take(train), val_set.take(val), context))
        return joined(parts)

    def _read_as(self, backbone: Encoder, given: Evaluate | EvalContext) -> tuple[Labelled, Labelled]:
        """Training and evaluation set, whose 16-bit images are read as given, or else as in the backbone's training."""
        if given.range16 is None:
            return self.train.with_range16(backbone.range16), self.val.with_range16(backbone.range16)
        return self.train.with_range16(given.range16, of_runs=True), self.val.with_range16(given.range16, of_runs=True)

    def metrics_without_each_fold(self, per_image: PerImage, seed: int) -> list[dict[str, float]]:
        """For each fold: metrics on the other images, from models that did not train on that fold.

        Empty for a fold without which the metrics are undefined.
        """
        if not (self.folds and self.pairs):
            return []
        splits = list(pairs_of(len(self.val), self.folds, seed, self._groups))
        images = np.concatenate([val for _, val in splits])
        pair = np.repeat(np.arange(len(splits)), [len(val) for _, val in splits])
        metrics = []
        for _, fold in folds_of(len(self.val), self.folds, seed, self._groups):
            has_fold = np.array([set(fold) <= set(val) for _, val in splits])
            rows = np.flatnonzero(has_fold[pair] & ~np.isin(images, fold))
            try:
                metrics.append(self.evaluator.metrics(selected(per_image, rows)))
            except UserError:
                metrics.append({})
        return metrics

    @property
    def _groups(self) -> list[int]:
        """The number of the group of each evaluation image, from 0; empty without groups."""
        if not self.val.image_groups:
            return []
        number_of: dict[str, int] = {}
        return [number_of.setdefault(self.val.group(i), len(number_of)) for i in range(len(self.val))]

    def groups(self, seed: int) -> list[int] | None:
        """The group of each result, in the order of ``per_image``; None without groups.

        Args:
            seed: of the folds.
        """
        groups = self._groups
        if not groups or not self.folds:
            return groups or None
        return [groups[i] for _, val in folds_of(len(self.val), self.folds, seed, groups) for i in val]

    @property
    def images(self) -> dict[str, int]:
        """Numbers of images, of their groups, and of folds, for the report."""
        evaluated = {"evaluated": len(self.val)} | ({"groups": max(self._groups) + 1} if self._groups else {})
        if self.folds:
            return {**evaluated, "folds": self.folds}
        return evaluated | ({"trained_on": len(self.train)} if len(self.train) else {})

    @property
    def data(self) -> dict[str, str]:
        """Fingerprints of the images with their labels."""
        train = {"train": self.train.fingerprint} if len(self.train) and not self.folds else {}
        return {**train, "val": self.val.fingerprint}


def _open_cache(backbone: Encoder, settings: Evaluate) -> TokenCache | None:
    """The tokens of --cache that are of this network. Raises UserError if the folder cannot be used (6)."""
    if settings.cache is None:
        return None
    try:
        return TokenCache(Path(settings.cache) / f"{backbone.fingerprint}-{settings.precision}")
    except OSError as error:
        raise UserError(f"--cache {settings.cache}: {error.strerror or error}; give another folder", 6) from None


def bootstrap_metrics(task: Task, per_image: PerImage, names: Sequence[str], seed: int = 0) -> intervals.Bootstrap:
    """Metrics by name, of all images and of random choices of them. Raises UserError if one is undefined.

    Args:
        seed: of the folds.
    """

    def metrics(_: int, indices: np.ndarray) -> np.ndarray:
        values = task.evaluator.metrics(selected(per_image, indices))
        return np.array([values.get(name, math.nan) for name in names])

    return intervals.bootstrap(metrics, 1, len(task.val), draws=200, groups=task.groups(seed))


def open_tasks(settings: Evaluate, shared: Opened | None = None) -> list[Task]:
    """The tasks in the settings, with their data checked.

    Args:
        shared: labels that are already open; those opened here are added.

    Raises:
        UserError: data are missing, of the wrong format, or wrong (2, 3).
    """
    tasks = []
    shared = {} if shared is None else shared  # labels are read only once
    for name in settings.task:
        opener = partial(_open_labels, task=name, settings=settings, shared=shared)
        arguments = dict(getattr(settings, name))
        evaluator = evaluators.load_all()[name](**arguments)
        folds = settings.folds if evaluator.uses_train_set else None  # without training, all images at once
        tasks.append(Task(name, arguments, evaluator, *_open_data(evaluator, name, settings, opener), folds))
    sides = {id(data): (flag, data) for task in tasks if task.evaluator.trains_long for flag, data in _sides(task)}
    for flag, data in sides.values():
        _decode_all(flag, data)
    return tasks


def _sides(task: Task) -> list[tuple[str, Labelled]]:
    return [(flag, data) for flag, data in (("--train", task.train), ("--val", task.val)) if len(data)]


def _decode_all(flag: str, data: Labelled) -> None:
    """Raises UserError (3) with all images that cannot be read, before a training of hours that needs them."""
    problems = labels.Problems(flag)
    for name, reason in scan(data.source, decode=True).bad:
        problems.add("image that cannot be read", name, f"{reason}: repair it, or remove it from the labels")
    problems.raise_if_any()


def _open_data(evaluator: Evaluator, name: str, settings: Evaluate, opener: Opener) -> tuple[Labelled, Labelled]:
    """Training set, empty if the evaluator uses none, and evaluation set; with folds they are the same images."""
    kinds = evaluator.label_kinds
    if settings.folds:
        images = _grouped(opener(settings.train, kinds), settings)
        units = len({images.group(i) for i in range(len(images))}) if images.image_groups else len(images)
        if settings.folds > units:
            kind = "groups" if images.image_groups else "images"
            raise UserError(f"--folds {settings.folds}: there are {units} {kind}")
        return (images if evaluator.uses_train_set else images.take(())), images
    if evaluator.uses_train_set and not settings.train:
        paths = "IMAGES, without labels" if "none" in kinds else "IMAGES LABELS"
        raise UserError(f"--task {name} needs training images: give --train {paths}, or --folds N with --train alone")
    val = _grouped(opener(settings.val, kinds) if settings.val else _open_held_out(settings.weights), settings)
    if not evaluator.uses_train_set and settings.train:
        say(f"{name}: --train is not used")
    if not evaluator.uses_train_set:
        return val.take(()), val
    train = opener(settings.train, kinds)
    _check_split(name, train, val)
    return train, val.numbered_as(train)


def _grouped(data: Labelled, settings: Evaluate) -> Labelled:
    return with_groups(data, settings.groups) if settings.groups else data


def _check_split(name: str, train: Labelled, val: Labelled) -> None:
    """Raises UserError (3) if the two sets do not fit together; warns of missing classes and of common images."""
    if train.kind != val.kind:
        kinds = [data.kind.replace("none", "no labels") for data in (train, val)]
        raise UserError(f"--train has {kinds[0]}, --val {kinds[1]}; give the same kind of labels", 3)
    if unknown := sorted(set(val.classes) - set(train.classes)):
        raise UserError(
            f"--val has classes that --train has no example of: {_first_five(unknown)}; change the split, or use the "
            "same names in both",
            3,
        )
    if missing := sorted(set(train.classes) - set(val.classes)):
        say(f"{name}: --val has no example of {_first_five(missing)}")
    train_paths = {train.source.path(index) or index for index in train.indices}
    if common := sum((val.source.path(index) or -1) in train_paths for index in val.indices):
        say(f"{name}: {common:,} of {len(val):,} evaluation images are also training images: the metrics are too high")


def _first_five(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{', '.join(map(str, names[:5]))}{more}"


def _open_labels(
    paths: tuple[str, ...], kinds: tuple[Kind, ...], task: str, settings: Evaluate, shared: Opened
) -> Labelled:
    """The images and labels at ``paths``, of the first of ``kinds`` that fits.

    If labels are optional and none are given, none are searched for: nested folders of images are not classes.
    """
    if len(paths) == 1 and "none" in kinds:
        kinds = ("none",)
    options = settings.ignore, settings.reduce_zero_label, settings.classes
    needed: list[str] = []
    for kind in kinds:
        key = (*paths, kind, *options)
        try:
            if key not in shared:
                shared[key] = labels.open_labelled(paths[0], paths[1] if len(paths) > 1 else None, kind, *options)
            return shared[key]
        except labels.UnknownFormat as error:
            needed.append(f"{KINDS[kind]} ({error.needed})")
            given = error.given
    raise UserError(f"--task {task} needs {', or '.join(needed)}; {given} has none", 3)


def _open_held_out(weights: str) -> Labelled:
    """The held-out images of a run of gtsa, for tasks without labels. Raises UserError if there are none."""
    path = Path(weights)
    candidates = (path, *path.parents[:2]) if path.exists() else ()  # RUN, RUN/best, RUN/exports/timm
    run = next((p for p in candidates if (p / IMAGES).is_file() and (p / "config.yaml").is_file()), None)
    if run is None:
        raise UserError(
            "--val is missing: give --val IMAGES, without labels (a run of gtsa has held-out images, and "
            f"{weights} is not a run)"
        )
    try:
        images = open_images_of(run, say)
    except (UserError, OSError, ValueError) as error:
        raise UserError(
            f"the images of {run} cannot be opened ({error}); give --val IMAGES, without labels", 3
        ) from None
    which = "held-out images" if images.held_out else "TRAINING images (none were held out)"
    say(f"evaluated on {len(images.looked_at):,} {which} of {run}; choose others with --val IMAGES")
    return unlabelled(images.source, images.looked_at)
