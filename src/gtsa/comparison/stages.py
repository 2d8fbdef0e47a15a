"""Which jobs there are. What comes later follows from the results of what came before, and from nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from gtsa.comparison import tuning
from gtsa.comparison.jobs import Cell
from gtsa.comparison.results import answered
from gtsa.comparison.rows import Row
from gtsa.core.errors import Remedy


def untaught(rows: Sequence[Row], s: Any) -> Iterator[Cell]:
    """Rows that learn nothing, once: what is wrong with a question shows before hours of training."""
    yield from (Cell(row, "images", 0) for row in rows if row.source is not None)


def finals(rows: Sequence[Row], s: Any) -> Iterator[Cell]:
    """Every row with every seed, seed by seed, so that there is something to compare early."""
    settings: dict[str, dict[str, Any] | Remedy] = {}
    for number in range(s.seeds):
        for row in rows:
            if number and not row.varies:
                continue
            if row.source is not None:
                yield Cell(row, "images", number)
                continue
            if row.name not in settings:
                settings[row.name] = _tuned(row, rows, s)
            changes = settings[row.name]
            if not isinstance(changes, Remedy):
                yield Cell(row, "images", number, changes)


def _tuned(row: Row, rows: Sequence[Row], s: Any) -> dict[str, Any] | Remedy:
    try:
        return tuning.chosen(row, rows, s)
    except Remedy as remedy:
        return remedy


def at_equal_flops(rows: Sequence[Row], s: Any) -> Iterator[Cell]:
    """Runs of every method whose operations are those of the first method's."""
    if not s.equal_flops:
        return
    costs = {
        cell.row.name: r["flops_per_image"] for cell in finals(rows, s) if (r := answered(cell, s)) and "steps" in r
    }
    if rows[0].name not in costs:
        return
    for cell in finals(rows, s):
        name = cell.row.name
        if name in costs and name != rows[0].name:
            steps = max(1, round(s.steps * costs[rows[0].name] / costs[name]))
            yield replace(cell, stage="flops", changes={**cell.changes, "steps": steps})
