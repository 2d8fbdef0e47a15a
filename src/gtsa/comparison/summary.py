"""The report of a comparison: a long table, all figures as JSON, and one page that needs nothing else.

It is a function of the committed results alone.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np

from gtsa.comparison import jobs, report_page, tuning
from gtsa.comparison.jobs import STAGES, Job
from gtsa.comparison.results import read_per_image, result_of, said
from gtsa.comparison.rows import Row
from gtsa.core.files import store
from gtsa.evaluation import intervals
from gtsa.evaluation.evaluator import PerImage
from gtsa.evaluation.folds import some
from gtsa.evaluation.intervals import Drawn, Estimate

Key = tuple[str, str]  # row and stage
UNTRAINED: Key = ("untrained", "images")  # what no figure says anything without


def write(rows: Sequence[Row], wanted: Iterable[Job], s: Any) -> Path:
    """Writes results.csv, results.json and report.html into the comparison's folder; returns the last."""
    done = [(job, result_of(job, s)) for job in wanted]
    found = [(job, result) for job, result in done if result is not None]
    place = Path(s.out)
    store(place / "results.csv", _csv(found).encode())
    summary = summarised(rows, found, s)
    store(place / "results.json", (json.dumps(summary, indent=1) + "\n").encode())
    store(place / "report.html", report_page.html(summary, found, s).encode())
    return place / "report.html"


def _csv(found: Sequence[tuple[Job, dict[str, Any]]]) -> str:
    """One line for every value: what a statistician wants to start from."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["method", "stage", "seed", "task", "feature", "block", "metric", "value", "n"])
    for job, result in found:
        for entry in result.get("results", ()):
            for metric, value in entry["metrics"].items():
                where = job.row.name, job.stage, job.number, entry["task"], entry["feature"], "last"
                table.writerow([*where, metric, repr(value), entry["images"]])
    return text.getvalue()


# Figures with intervals


def summarised(rows: Sequence[Row], found: Sequence[tuple[Job, dict[str, Any]]], s: Any) -> dict[str, Any]:
    """All that the page tells, as plain values."""
    reference = rows[0].name
    drawn = _drawn(found, s)
    lines = []
    for stage in STAGES:
        for row in rows:
            mine = [(c, r) for c, r in found if c.row.name == row.name and c.stage == stage]
            if not mine:
                continue
            good = [(c, r) for c, r in mine if r["status"] == "done"]
            answers = drawn.get((row.name, stage), Answers((), {}))
            line: dict[str, Any] = {
                "row": row.name,
                "stage": stage,
                "seeds": sorted(c.number for c, _ in good),
                "failed": {c.number: r["reason"] for c, r in mine if r["status"] != "done"},
                "metrics": {name: _told(intervals.estimate(value)) for name, value in answers.metrics.items()},
                "settings": {key: jobs.training_of(mine[0][0], s)[key] for key in mine[0][0].changes},
                "costs": _costs([r for _, r in good]),
            }
            if (row.name, stage) != (reference, "images"):
                line["less_reference"] = _all_less(answers, drawn.get((reference, "images"), Answers((), {})))
            if (row.name, stage) != UNTRAINED and UNTRAINED in drawn:
                line["less_untrained"] = _all_less(answers, drawn[UNTRAINED])
            lines.append(line)
    trials = [
        {
            "row": c.row.name,
            "number": c.number,
            "settings": dict(c.changes),
            "status": r["status"],
            "verdict": said(r),
            "metrics": _plain(r),
        }
        for c, r in found
        if c.stage == "trial"
    ]
    told = {"reference": reference, "primary": s.primary, "seeds": s.seeds, "rows": lines, "trials": trials}
    return told | {"choices": tuning.choices(found, s), "differences": _differences(drawn)}


def _all_less(answers: Answers, other: Answers) -> dict[str, Any]:
    """Every figure less the other row's, of those that both have."""
    return {
        name: _told(intervals.estimate(less))
        for name in answers.metrics
        if (less := answers.less(other, name)) is not None
    }


def _differences(drawn: Mapping[Key, Answers]) -> list[dict[str, Any]]:
    """Of the primary figure, every row less every other."""
    return [
        {"row": one[0], "stage": one[1], "less_row": other[0], "less_stage": other[1]} | _told(intervals.estimate(less))
        for one, other in permutations(drawn, 2)
        if (less := drawn[one].less(drawn[other], "primary")) is not None
    ]


def _plain(result: Mapping[str, Any]) -> dict[str, float]:
    return {f"{e['task']}:{n}": v for e in result.get("results", ()) for n, v in e["metrics"].items()}


@dataclass(frozen=True)
class Answers:
    """Figures of a row's networks, by name, with those of random choices of the images; and the networks' seeds."""

    seeds: tuple[int, ...]
    metrics: Mapping[str, Drawn]

    def less(self, other: Answers, name: str) -> Drawn | None:
        """The difference, seed by seed, of the seeds that both have; None where there are none."""
        both = [seed for seed in self.seeds if seed in other.seeds]
        if not both or name not in self.metrics or name not in other.metrics:
            return None
        mine, its = (each.metrics[name].of_seeds([each.seeds.index(seed) for seed in both]) for each in (self, other))
        return mine - its


def _drawn(found: Sequence[tuple[Job, dict[str, Any]]], s: Any) -> dict[Key, Answers]:
    """What every row answered."""
    per_image: dict[Key, dict[int, dict[tuple[str, str], PerImage]]] = {}
    steady = {job.row.name for job, _ in found if not job.row.varies}
    for job, result in found:
        if job.stage in STAGES and result["status"] == "done":
            per_image.setdefault((job.row.name, job.stage), {})[job.number] = read_per_image(job, s)
    answers: dict[Key, Answers] = {}
    for key, of_seeds in per_image.items():
        seeds, networks, named = tuple(of_seeds), list(of_seeds.values()), {}
        for task, feature in networks[0]:
            names, drawn = _of_task(task, [network[task, feature] for network in networks], s)
            if key[0] in steady:  # another seed would have given the same
                seeds, drawn = tuple(range(s.seeds)), drawn.of_seeds([0] * s.seeds)
            for number, name in enumerate(names):
                named[f"{task}:{name}" if feature in ("patches", s.tokens[0]) else f"{task}:{name} ({feature})"] = (
                    drawn[number]
                )
        parts = [_part(named, part) for part in s.primary.split("+")]
        if all(part is not None for part in parts) and len({part.images for part in parts if part}) == 1:
            named = {"primary": intervals.mean_of([part for part in parts if part]), **named}
        answers[key] = Answers(seeds, named)
    return answers


def _part(named: Mapping[str, Drawn], part: str) -> Drawn | None:
    return named.get(part) or next((value for name, value in named.items() if name.split(":")[0] == part), None)


def _of_task(task: str, networks: Sequence[PerImage], s: Any) -> tuple[list[str], Drawn]:
    evaluator = jobs.evaluator_of(task, s)
    names = list(evaluator.metrics(networks[0]))

    def metrics(network: int, places: np.ndarray) -> np.ndarray:
        values = evaluator.metrics(some(networks[network], places))
        return np.array([values.get(name, math.nan) for name in names])

    images = len(next(iter(networks[0].values())))
    return names, intervals.draw(metrics, len(networks), images)


def _told(value: Estimate) -> dict[str, Any]:
    sure = math.isfinite(value.low)
    ends = {"low": value.low, "high": value.high} if sure else {"low": None, "high": None}
    return {"mean": value.mean, **ends, "seeds": value.seeds, "images": value.images}


def _costs(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    trained = [r for r in results if "steps" in r]
    if not trained:
        return {}
    per_image = trained[0]["flops_per_image"]
    return {
        "steps": trained[0]["steps"],
        "images_seen": trained[0]["images_seen"],
        "gflops_per_image": per_image / 1e9,
        "petaflops": per_image * trained[0]["images_seen"] / 1e15,
        "minutes": float(np.median([r["seconds"] for r in trained])) / 60,
        "peak_gib": float(np.median([r["peak_memory"] for r in trained])) / 2**30,
        "device": trained[0]["device"],
        "verdicts": dict(Counter(word for r in trained if (word := said(r)))),
    }
