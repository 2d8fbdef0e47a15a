"""Tuning: the same number of trials for every method, and the choice of the best settings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypedDict

import numpy as np

from gtsa.comparison.jobs import Job, merge_task_settings
from gtsa.comparison.results import Result, TaskResult, get_final_verdict, read_successful_result
from gtsa.comparison.rows import Row
from gtsa.comparison.settings import Compare, list_tasks_of
from gtsa.core.errors import UserError
from gtsa.evaluation.tasks import Task
from gtsa.pretraining.settings import METHODS


class Choice(TypedDict):
    """The chosen trial of a method, and the choice of every fold (one number with --val)."""

    row: str
    taken: int
    of_folds: list[int]


def check_tasks(tasks: Iterable[Task], settings: Compare) -> None:
    """Raises UserError if trials cannot be chosen without the images that the metrics are computed on.

    Args:
        tasks: the tasks of a trial.
    """
    splits: dict[str, int | str | None] = {}
    for task in tasks:
        val = merge_task_settings(task.name, settings)["val"]
        splits[task.name] = "--val" if val else task.folds if task.pairs else 0
    if len(set(splits.values())) > 1 or 0 in splits.values():
        words = {"--val": "has --val", 0: "uses no training images, so it has no folds"}
        lines = "; ".join(f"{name} {words.get(split, f'has {split} folds')}" for name, split in splits.items())
        raise UserError(
            "primary: trials are chosen without the evaluated images. So the tasks of the primary metric must use "
            "training images, and all have the same number of folds, or all have --val: "
            f"{lines}. Give another --primary, or --trials 0"
        )
    if 2 in splits.values():
        raise UserError(
            f"{', '.join(splits)}: trials are chosen for each fold by inner folds of the other images, so two folds "
            "are too few; give --folds 3 or more, or --trials 0"
        )


# The trials


def list_trial_jobs(rows: Sequence[Row], settings: Compare) -> Iterator[Job]:
    """The same number of trials for every method."""
    for row in rows:
        if row.source is None and row.name == row.tuned_as:
            for number in range(settings.trials):
                changes = {"steps": count_trial_steps(settings), **sample_settings(row, number, settings)}
                yield Job(row, "trial", number, changes)


def count_trial_steps(settings: Compare) -> int:
    return settings.trial_steps or max(1, settings.steps // 3)


def sample_settings(row: Row, number: int, settings: Compare) -> dict[str, object]:
    """Settings of a trial: a log-uniform learning rate, and one value for every entry of the method's search space.

    The first trial is the preset of the method with the geometric mean of the rates, because a few random settings may
    all be bad.
    """
    low, high = settings.learning_rates
    if number == 0:
        return {"learning_rate": float(f"{math.sqrt(low * high):.3g}")}
    random = np.random.default_rng([number, *row.name.encode()])
    rate = float(f"{math.exp(random.uniform(math.log(low), math.log(high))):.3g}")
    search_space = METHODS[row.name].constants["search_space"]
    values = {key: choices[int(random.integers(len(choices)))] for key, choices in search_space.items()}
    return {"learning_rate": rate, row.name: values}


# The choice


def choose_settings(row: Row, rows: Sequence[Row], settings: Compare) -> dict[str, object]:
    """Settings of the best trial of the row's method; empty without trials.

    Raises:
        UserError: every trial failed.
    """
    trials = {job.number: job for job in list_trial_jobs(rows, settings) if job.row.name == row.tuned_as}
    if not trials:
        return {}
    results = {number: result for number, job in trials.items() if (result := read_successful_result(job, settings))}
    if not results:
        folder = f"{settings.out}/cells/{row.tuned_as}/"
        raise UserError(f"all {len(trials)} trials of {row.tuned_as} failed; see {folder}", 5)
    best = trials[_select_most_frequent(_choose_per_fold(results, settings))]
    return {key: value for key, value in best.changes.items() if key != "steps"}


def summarise_choices(results: Iterable[tuple[Job, Result]], settings: Compare) -> list[Choice]:
    """The choice of every method with trials. Jobs that are no trials are ignored."""
    trials_of_rows: dict[str, dict[int, Result]] = {}
    for job, result in results:
        if job.stage == "trial" and result["status"] == "done":
            trials_of_rows.setdefault(job.row.name, {})[job.number] = result
    choices = []
    for row, trials in trials_of_rows.items():
        of_folds = _choose_per_fold(trials, settings)
        choices.append(Choice(row=row, taken=_select_most_frequent(of_folds), of_folds=of_folds))
    return choices


def _select_most_frequent(of_folds: Sequence[int]) -> int:
    """The trial chosen by most folds; the first of equals."""
    return max(sorted(set(of_folds)), key=of_folds.count)


def _choose_per_fold(results: Mapping[int, Result], settings: Compare) -> list[int]:
    """The number of the best trial for each fold, by inner folds of its training part; a single number with --val.

    Args:
        results: of successful trials, by number.
    """
    scores = [_score_per_fold(result, settings) for result in results.values()]
    return [_select_best(results, dict(zip(results, of_fold, strict=True))) for of_fold in zip(*scores, strict=True)]


def _score_per_fold(result: Result, settings: Compare) -> list[float]:
    """The primary metric of a trial for the choice of each fold: computed on all other images."""
    entries = [entry for entry in result["results"] if entry["task"] in list_tasks_of(settings.primary)]
    if "without" not in entries[0]:  # with --val: evaluated on a part of the training images
        return [compute_primary(result, settings)]
    scores = []
    for fold in range(len(entries[0]["without"])):
        of_fold: list[TaskResult] = [{**entry, "metrics": entry["without"][fold]} for entry in entries]
        try:
            scores.append(compute_primary({"results": of_fold}, settings))
        except UserError:  # the metric is undefined on the other images
            scores.append(math.nan)
    return scores


def _select_best(results: Mapping[int, Result], scores: Mapping[int, float]) -> int:
    """The number of the best trial; the first of equals.

    A collapsed trial is chosen only if all collapsed. Early in training its metrics may equal those of a network that
    learns.
    """

    def rank(number: int) -> tuple[bool, float, int]:
        score = -math.inf if math.isnan(scores[number]) else scores[number]
        return get_final_verdict(results[number]) != "collapsing", score, -number

    return max(results, key=rank)


def compute_primary(result: Result, settings: Compare) -> float:
    """The primary metric: the mean of its parts."""
    return float(np.mean([_read_metric(result["results"], part) for part in settings.primary.split("+")]))


def _read_metric(results: Iterable[TaskResult], part: str) -> float:
    task, _, metric = part.partition(":")
    for entry in results:
        if entry["task"] == task:
            metrics = entry["metrics"]
            if metric and metric not in metrics:
                raise UserError(f"--primary {part}: {task} has no metric {metric}; available: {', '.join(metrics)}")
            return float(metrics[metric] if metric else next(iter(metrics.values()), math.nan))
    raise UserError(f"--primary {part}: no result of {task}")
