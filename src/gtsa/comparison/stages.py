"""Which jobs there are. What comes later follows from the results of what came before, and from nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from gtsa.comparison import tuning
from gtsa.comparison.jobs import Job
from gtsa.comparison.results import answered
from gtsa.comparison.rows import Row
from gtsa.core.errors import UserError


def untaught(rows: Sequence[Row], s: Any) -> Iterator[Job]:
    """Rows that learn nothing, once: what is wrong with a question shows before hours of training."""
    yield from (Job(row, "images", 0) for row in rows if row.source is not None)


def finals(rows: Sequence[Row], s: Any) -> Iterator[Job]:
    """Every row with every seed, seed by seed, so that there is something to compare early."""
    settings: dict[str, dict[str, Any] | UserError] = {}
    for number in range(s.seeds):
        for row in rows:
            if number and not row.varies:
                continue
            if row.source is not None:
                yield Job(row, "images", number)
                continue
            if row.name not in settings:
                settings[row.name] = tuned(row, rows, s)
            changes = settings[row.name]
            if not isinstance(changes, UserError):
                yield Job(row, "images", number, changes)


def tuned(row: Row, rows: Sequence[Row], s: Any) -> dict[str, Any] | UserError:
    """The settings that a row's trials choose, or why there are none."""
    try:
        return tuning.chosen(row, rows, s)
    except UserError as remedy:
        return remedy


def at_equal_flops(rows: Sequence[Row], s: Any) -> Iterator[Job]:
    """Runs of every method whose operations are those of the first method's."""
    if not s.equal_flops:
        return
    costs = {job.row.name: r["flops_per_image"] for job in finals(rows, s) if (r := answered(job, s)) and "steps" in r}
    if rows[0].name not in costs:
        return
    for job in finals(rows, s):
        name = job.row.name
        if name in costs and name != rows[0].name:
            steps = max(1, round(s.steps * costs[rows[0].name] / costs[name]))
            yield replace(job, stage="flops", changes={**job.changes, "steps": steps})
