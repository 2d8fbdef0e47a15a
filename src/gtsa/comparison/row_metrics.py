"""Metrics of the rows of a comparison, each with its bootstrap over images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gtsa.comparison import jobs
from gtsa.comparison.jobs import STAGES, Job
from gtsa.comparison.results import Result, read_per_image
from gtsa.comparison.settings import Compare, list_tasks_of
from gtsa.evaluation import intervals
from gtsa.evaluation.evaluator import PerImage
from gtsa.evaluation.folds import selected
from gtsa.evaluation.intervals import Bootstrap

Key = tuple[str, str]  # row and stage


@dataclass(frozen=True)
class RowMetrics:
    """Metrics of the networks of a row, by name, each with its bootstrap over images; and the seeds of the networks."""

    seeds: tuple[int, ...]
    metrics: Mapping[str, Bootstrap]

    def subtract(self, other: RowMetrics, name: str) -> Bootstrap | None:
        """The difference of a metric, paired by seed; None if the rows have no common seed."""
        common = [seed for seed in self.seeds if seed in other.seeds]
        if not common or name not in self.metrics or name not in other.metrics:
            return None
        own, others = (row.metrics[name].of_seeds([row.seeds.index(seed) for seed in common]) for row in (self, other))
        return own - others


def bootstrap_rows(results: Sequence[tuple[Job, Result]], settings: Compare) -> dict[Key, RowMetrics]:
    per_image: dict[Key, dict[int, dict[tuple[str, str], PerImage]]] = {}
    groups: dict[str, Sequence[int] | None] = {}
    for job, result in results:
        if job.stage in STAGES and result["status"] == "done":
            per_image.setdefault((job.row.name, job.stage), {})[job.number] = read_per_image(job, settings)
            groups |= {entry["task"]: entry.get("groups") for entry in result["results"]}
    varying = {job.row.name for job, _ in results if job.row.varies}
    return {key: _bootstrap_row(of_seeds, key[0] in varying, groups, settings) for key, of_seeds in per_image.items()}


def _bootstrap_row(
    per_image: Mapping[int, Mapping[tuple[str, str], PerImage]],
    varies: bool,
    groups: Mapping[str, Sequence[int] | None],
    settings: Compare,
) -> RowMetrics:
    """
    Args:
        per_image: of the network of each seed.
        varies: whether the seed makes a difference. If not, the only network stands for all seeds.
        groups: of the images of each task, if they have groups.
    """
    seeds, networks = tuple(per_image) if varies else tuple(range(settings.seeds)), list(per_image.values())
    metrics: dict[str, Bootstrap] = {}
    for task, feature in networks[0]:
        names, drawn = _bootstrap_task(task, [network[task, feature] for network in networks], groups[task], settings)
        if not varies:
            drawn = drawn.of_seeds([0] * settings.seeds)
        suffix = "" if feature in ("patches", settings.tokens[0]) else f" ({feature})"
        metrics |= {f"{task}:{name}{suffix}": drawn[index] for index, name in enumerate(names)}
    names = settings.primary.split("+")
    parts = [part for name in names if (part := _find_metric(metrics, name)) is not None]
    if len(parts) == len(names):
        images = {
            jobs.images_of(name.split(":")[0], settings): part.images for name, part in zip(names, parts, strict=True)
        }
        metrics = {"primary": intervals.mean_of(parts, sum(images.values())), **metrics}
    return RowMetrics(seeds, metrics)


def _find_metric(metrics: Mapping[str, Bootstrap], part: str) -> Bootstrap | None:
    """The metric TASK:METRIC, or the first one of TASK."""
    return metrics.get(part) or next((value for name, value in metrics.items() if name.split(":")[0] == part), None)


def _bootstrap_task(
    task: str, networks: Sequence[PerImage], groups: Sequence[int] | None, settings: Compare
) -> tuple[list[str], Bootstrap]:
    """Names of the metrics of a task, and their values for every network.

    Tasks on the same images have the same choices of images; other images of the primary metric have choices of their
    own, as they are independent. Where choices of images are slow or without meaning, and the primary metric does not
    need them, there are none, and no interval.
    """
    evaluator = jobs.make_evaluator(task, settings)
    names = list(evaluator.metrics(networks[0]))

    def compute(network: int, indices: np.ndarray) -> np.ndarray:
        values = evaluator.metrics(selected(networks[network], indices))
        return np.array([values.get(name, math.nan) for name in names])

    images, deciding = len(next(iter(networks[0].values()))), list_tasks_of(settings.primary)
    if not evaluator.bootstrap and task not in deciding:
        values = np.array([compute(network, np.arange(images)) for network in range(len(networks))])
        return names, Bootstrap(values, values[None], images, units=1)
    sets = list(dict.fromkeys(jobs.images_of(name, settings) for name in deciding))
    own = jobs.images_of(task, settings)
    seed = sets.index(own) if own in sets else 0
    return names, intervals.bootstrap(compute, len(networks), images, seed=seed, groups=groups)
