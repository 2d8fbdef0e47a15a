"""Which settings of each method: trials, as many for all, and the choice among them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gtsa.comparison import jobs
from gtsa.comparison.jobs import Job
from gtsa.comparison.results import answered, said
from gtsa.comparison.rows import Row
from gtsa.core.errors import UserError
from gtsa.evaluation import tasks
from gtsa.pretraining.settings import METHODS

Result = Mapping[str, Any]


def checked(questions: Iterable[tasks.Task], s: Any) -> None:
    """Raises UserError where trials cannot be chosen without the images that the figures are of.

    Args:
        questions: of a trial.
    """
    by = {q.name: "--val" if jobs.told_of(q.name, s)["val"] else q.folds if q.pairs else 0 for q in questions}
    if len(set(by.values())) > 1 or 0 in by.values():
        told = {"--val": "has --val", 0: "learns nothing, so it has no folds"}
        lines = "; ".join(f"{name} {told.get(how, f'has {how} folds')}" for name, how in by.items())
        raise UserError(
            "primary: trials are chosen without the images that are judged, so its tasks must all learn from examples, "
            f"with as many folds, or all have --val: {lines}. Give another --primary, or --trials 0"
        )
    if 2 in by.values():
        raise UserError(
            f"{', '.join(by)}: trials are chosen for each fold by folds of the other images, so two folds are too few; "
            "give --folds 3 or more, or --trials 0"
        )


def trials(rows: Sequence[Row], s: Any) -> Iterator[Job]:
    """The same number of settings for every method: its preset, and random ones."""
    for row in rows:
        if row.source is None and row.name == row.tuned_as:
            for number in range(s.trials):
                yield Job(row, "trial", number, {"steps": steps_of(s), **drawn(row, number, s)})


def steps_of(s: Any) -> int:
    """Of a trial."""
    return int(s.trial_steps or max(1, s.steps // 3))


def drawn(row: Row, number: int, s: Any) -> dict[str, Any]:
    """Settings of a trial: learning rate, log-uniform, and one value of each that the method names.

    The first trial is of the method's preset, in the middle of the rates: few draws may all be bad ones.
    """
    if number == 0:
        return {"learning_rate": float(f"{math.sqrt(s.learning_rates[0] * s.learning_rates[1]):.3g}")}
    draw = np.random.default_rng([number, *row.name.encode()])
    low, high = s.learning_rates
    rate = float(f"{math.exp(draw.uniform(math.log(low), math.log(high))):.3g}")
    search = METHODS[row.name].constants["search_space"]
    values = {key: choices[int(draw.integers(len(choices)))] for key, choices in search.items()}
    return {"learning_rate": rate, row.name: values}


def chosen(row: Row, rows: Sequence[Row], s: Any) -> dict[str, Any]:
    """Settings of the best trial of the row's method; none where there were no trials.

    Raises:
        UserError: every trial failed.
    """
    tried = {job.number: job for job in trials(rows, s) if job.row.name == row.tuned_as}
    if not tried:
        return {}
    good = {number: result for number, job in tried.items() if (result := answered(job, s))}
    if not good:
        raise UserError(f"all {len(tried)} trials of {row.tuned_as} failed; see {s.out}/cells/{row.tuned_as}/", 5)
    best = tried[_taken(_choices(good, s))]
    return {key: value for key, value in best.changes.items() if key != "steps"}


def _taken(choices: Sequence[int]) -> int:
    """The trial that most folds choose, the first of equals."""
    return max(sorted(set(choices)), key=choices.count)


def _choices(results: Mapping[int, Result], s: Any) -> list[int]:
    """The number of the best trial for each fold, by inner folds of its training part; of one fold where --val judges.

    Args:
        results: of trials that did not fail, by number.
    """
    metrics = [_inner(result, s) for result in results.values()]
    return [_best(results, dict(zip(results, of_fold, strict=True))) for of_fold in zip(*metrics, strict=True)]


def _inner(result: Result, s: Any) -> list[float]:
    """A trial's primary figure for the choice of each fold: of all the other images."""
    tasks = {part.split(":")[0] for part in s.primary.split("+")}
    entries = [entry for entry in result["results"] if entry["task"] in tasks]
    if "without" not in entries[0]:  # judged within the training images
        return [primary_of(result, s)]
    metrics = []
    for fold in range(len(entries[0]["without"])):
        try:
            of_fold = {"results": [{**entry, "metrics": entry["without"][fold]} for entry in entries]}
            metrics.append(primary_of(of_fold, s))
        except UserError:  # the other images do not show this figure
            metrics.append(math.nan)
    return metrics


def _best(results: Mapping[int, Result], primary: Mapping[int, float]) -> int:
    """The number of the best trial, the first of equals.

    One that collapsed is the best only where all did: early on its figures may be those of a network that learns.
    """

    def good(number: int) -> tuple[bool, float, int]:
        figure = primary[number]
        return said(results[number]) != "collapsing", -math.inf if math.isnan(figure) else figure, -number

    return max(results, key=good)


def primary_of(result: Result, s: Any) -> float:
    """The figure that decides: the mean of its parts."""
    return float(np.mean([_part(result["results"], part) for part in s.primary.split("+")]))


def _part(results: Iterable[Mapping[str, Any]], part: str) -> float:
    task, _, figure = part.partition(":")
    for entry in results:
        if entry["task"] == task:
            metrics = entry["metrics"]
            if figure and figure not in metrics:
                raise UserError(f"--primary {part}: {task} has no such figure; it has {', '.join(metrics)}")
            return float(metrics[figure] if figure else next(iter(metrics.values()), math.nan))
    raise UserError(f"--primary {part}: there is no result of {task}")


def choices(found: Iterable[tuple[Job, Result]], s: Any) -> list[dict[str, Any]]:
    """Of every method that was tuned: the trial that is taken, and the choice of each fold.

    Args:
        found: jobs with their results; those that are no trials count for nothing.

    Returns:
        ``row``, ``taken`` and ``of_folds``, numbers of trials; the latter has one number where --val judges.
    """
    of_rows: dict[str, dict[int, Result]] = {}
    for job, result in found:
        if job.stage == "trial" and result["status"] == "done":
            of_rows.setdefault(job.row.name, {})[job.number] = result
    made = {row: _choices(results, s) for row, results in of_rows.items()}
    return [{"row": row, "taken": _taken(of_folds), "of_folds": of_folds} for row, of_folds in made.items()]
