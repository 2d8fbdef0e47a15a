"""Statistics of a comparison: metrics with intervals, differences between rows, trials and costs, as plain values."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations, permutations
from typing import TypedDict

import numpy as np

from gtsa.comparison import jobs, tuning
from gtsa.comparison.jobs import STAGES, Job
from gtsa.comparison.results import Result, get_final_verdict
from gtsa.comparison.row_metrics import Key, RowMetrics, bootstrap_rows
from gtsa.comparison.rows import Row
from gtsa.comparison.settings import Compare
from gtsa.evaluation import intervals
from gtsa.evaluation.intervals import Bootstrap

UNTRAINED: Key = ("untrained", "images")  # every metric is compared with this row


class Interval(TypedDict):
    """A mean over seeds with its 95 % interval; without ends if there is only one seed or one image."""

    mean: float
    low: float | None
    high: float | None
    seeds: int
    images: int


class Difference(Interval):
    """The primary metric of a row minus that of another row."""

    row: str
    stage: str
    less_row: str
    less_stage: str


class SmallestDifference(TypedDict):
    """The difference of the primary metric that the comparison sees with a probability of 80 %, at a level of 5 %.

    It follows from the variance over seeds and images, as a mean over all pairs of trained rows.
    """

    value: float
    seeds: int
    pairs: int


class Costs(TypedDict, total=False):
    """Costs of the runs of a row; empty if the row is not trained."""

    steps: int
    images_seen: int
    gflops_per_image: float
    petaflops: float
    minutes: float
    peak_gib: float
    device: str
    verdicts: dict[str, int]


class _RowSummary(TypedDict):
    row: str
    stage: str
    seeds: list[int]
    failed: dict[int, str]
    metrics: dict[str, Interval]
    settings: dict[str, object]
    costs: Costs


class RowSummary(_RowSummary, total=False):
    """One row in one stage. ``less_reference`` and ``less_untrained``: every metric minus that of the other row."""

    less_reference: dict[str, Interval]
    less_untrained: dict[str, Interval]


class TrialSummary(TypedDict):
    row: str
    number: int
    settings: dict[str, object]
    status: str
    verdict: str
    metrics: dict[str, float]


class Summary(TypedDict):
    """Content of results.json."""

    reference: str
    primary: str
    seeds: int
    rows: list[RowSummary]
    trials: list[TrialSummary]
    choices: list[tuning.Choice]
    differences: list[Difference]
    smallest_difference: SmallestDifference | None  # None until two trained rows have two seeds


def summarise(rows: Sequence[Row], results: Sequence[tuple[Job, Result]], settings: Compare) -> Summary:
    """All content of the report page except pictures and curves."""
    metrics = bootstrap_rows(results, settings)
    reference = rows[0].name
    summaries = []
    for stage in STAGES:
        for row in rows:
            of_row = [(job, result) for job, result in results if job.row.name == row.name and job.stage == stage]
            if of_row:
                summaries.append(_summarise_row((row.name, stage), of_row, metrics, (reference, "images"), settings))
    return {
        "reference": reference,
        "primary": settings.primary,
        "seeds": settings.seeds,
        "rows": summaries,
        "trials": [_summarise_trial(job, result) for job, result in results if job.stage == "trial"],
        "choices": tuning.summarise_choices(results, settings),
        "differences": _compute_differences(metrics),
        "smallest_difference": _compute_smallest_difference(rows, metrics, settings),
    }


def _summarise_row(
    key: Key,
    results: Sequence[tuple[Job, Result]],
    metrics: Mapping[Key, RowMetrics],
    reference: Key,
    settings: Compare,
) -> RowSummary:
    successful = [(job, result) for job, result in results if result["status"] == "done"]
    empty = RowMetrics((), {})
    of_row = metrics.get(key, empty)
    first = results[0][0]
    summary: RowSummary = {
        "row": key[0],
        "stage": key[1],
        "seeds": sorted(job.number for job, _ in successful),
        "failed": {job.number: result["reason"] for job, result in results if result["status"] != "done"},
        "metrics": {name: _to_interval(value) for name, value in of_row.metrics.items()},
        "settings": {name: jobs.make_pretrain_settings(first, settings)[name] for name in first.changes},
        "costs": _summarise_costs([result for _, result in successful]),
    }
    if key != reference:
        summary["less_reference"] = _subtract_all(of_row, metrics.get(reference, empty))
    if key != UNTRAINED and UNTRAINED in metrics:
        summary["less_untrained"] = _subtract_all(of_row, metrics[UNTRAINED])
    return summary


def _summarise_trial(job: Job, result: Result) -> TrialSummary:
    return {
        "row": job.row.name,
        "number": job.number,
        "settings": dict(job.changes),
        "status": result["status"],
        "verdict": get_final_verdict(result),
        "metrics": {
            f"{entry['task']}:{name}": value
            for entry in result.get("results", ())
            for name, value in entry["metrics"].items()
        },
    }


def _summarise_costs(results: Sequence[Result]) -> Costs:
    trained = [result for result in results if "steps" in result]
    if not trained:
        return {}
    first = trained[0]
    return {
        "steps": first["steps"],
        "images_seen": first["images_seen"],
        "gflops_per_image": first["flops_per_image"] / 1e9,
        "petaflops": first["flops_per_image"] * first["images_seen"] / 1e15,
        "minutes": float(np.median([result["seconds"] for result in trained])) / 60,
        "peak_gib": float(np.median([result["peak_memory"] for result in trained])) / 2**30,
        "device": first["device"],
        "verdicts": dict(Counter(verdict for result in trained if (verdict := get_final_verdict(result)))),
    }


# Differences


def _subtract_all(metrics: RowMetrics, other: RowMetrics) -> dict[str, Interval]:
    """Every common metric minus that of the other row."""
    differences = {name: metrics.subtract(other, name) for name in metrics.metrics}
    return {name: _to_interval(difference) for name, difference in differences.items() if difference is not None}


def _compute_differences(metrics: Mapping[Key, RowMetrics]) -> list[Difference]:
    """The primary metric of every row minus that of every other row."""
    differences: list[Difference] = []
    for one, other in permutations(metrics, 2):
        difference = metrics[one].subtract(metrics[other], "primary")
        if difference is not None:
            differences.append(
                {
                    "row": one[0],
                    "stage": one[1],
                    "less_row": other[0],
                    "less_stage": other[1],
                    **_to_interval(difference),
                }
            )
    return differences


def _compute_smallest_difference(
    rows: Sequence[Row], metrics: Mapping[Key, RowMetrics], settings: Compare
) -> SmallestDifference | None:
    trained = [metrics[row.name, "images"] for row in rows if row.source is None and (row.name, "images") in metrics]
    pairs = [one.subtract(other, "primary") for one, other in combinations(trained, 2)]
    most = max((len(pair.values) for pair in pairs if pair is not None), default=0)
    if most < 2:
        return None
    variances = [intervals.variance_of(pair) for pair in pairs if pair is not None and len(pair.values) == most]
    value = intervals.pooled(variances).with_seeds(settings.seeds).smallest_difference
    return {"value": value, "seeds": settings.seeds, "pairs": len(variances)}


def _to_interval(drawn: Bootstrap) -> Interval:
    estimate = intervals.estimate(drawn)
    finite = math.isfinite(estimate.low)
    return {
        "mean": estimate.mean,
        "low": estimate.low if finite else None,
        "high": estimate.high if finite else None,
        "seeds": estimate.seeds,
        "images": estimate.images,
    }
