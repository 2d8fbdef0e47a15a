"""Which settings of each method: trials, as many for all, the choice among them, and what it depends on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from gtsa import cells, config, judging
from gtsa.cells import SEED, Cell, Row
from gtsa.core import Remedy

Result = Mapping[str, Any]


def trials(rows: Sequence[Row], s: Any) -> Iterator[Cell]:
    """The same number of settings for every method: its preset, and random ones."""
    steps = s.tune_steps or max(1, s.steps // 3)
    for row in rows:
        if row.source is None and row.name == row.tuned_as:
            for number in range(s.tune):
                yield Cell(row, "trial", number, {"steps": steps, **drawn(row, number, s)})


def drawn(row: Row, number: int, s: Any) -> dict[str, Any]:
    """Settings of a trial: learning rate, log-uniform, and one value of each that the method names.

    The first trial is of the method's preset, in the middle of the rates: few draws may all be bad ones.
    """
    if number == 0:
        return {"learning_rate": float(f"{math.sqrt(s.rates[0] * s.rates[1]):.3g}")}
    draw = np.random.default_rng([number, *row.name.encode()])
    low, high = s.rates
    rate = float(f"{math.exp(draw.uniform(math.log(low), math.log(high))):.3g}")
    search = config.METHODS[row.name].search
    values = {key: choices[int(draw.integers(len(choices)))] for key, choices in search.items()}
    return {"learning_rate": rate, row.name: values}


def chosen(row: Row, rows: Sequence[Row], s: Any) -> dict[str, Any]:
    """Settings of the best trial of the row's method; none where there were no trials.

    Raises:
        Remedy: every trial failed.
    """
    tried = {cell.number: cell for cell in trials(rows, s) if cell.row.name == row.tuned_as}
    if not tried:
        return {}
    good = {number: result for number, cell in tried.items() if (result := cells.answered(cell, s))}
    if not good:
        raise Remedy(f"all {len(tried)} trials of {row.tuned_as} failed; see {s.out}/cells/{row.tuned_as}/", 5)
    best = tried[_best(good, {number: primary_of(result, s) for number, result in good.items()})]
    return {key: value for key, value in best.changes.items() if key != "steps"}


def _best(results: Mapping[int, Result], primary: Mapping[int, float]) -> int:
    """The number of the best trial, the first of equals.

    One that collapsed is the best only where all did: early on its figures may be those of a network that learns.
    """
    return max(results, key=lambda number: (cells.said(results[number]) != "collapsing", primary[number], -number))


def primary_of(result: Result, s: Any) -> float:
    """The figure that decides: the mean of its parts."""
    return float(np.mean([_part(result["results"], part) for part in s.primary.split("+")]))


def _part(results: Iterable[Mapping[str, Any]], part: str) -> float:
    task, _, figure = part.partition(":")
    for entry in results:
        if entry["task"] == task:
            figures = entry["figures"]
            if figure and figure not in figures:
                raise Remedy(f"--primary {part}: {task} has no such figure; it has {', '.join(figures)}")
            return float(figures[figure] if figure else next(iter(figures.values())))
    raise Remedy(f"--primary {part}: there is no result of {task}")


# With folds, trials are judged by the images that the figures are of. Does the choice depend on them?


def choices(found: Iterable[tuple[Cell, Result]], s: Any) -> list[dict[str, Any]]:
    """Of every method that was tuned: the trial that is taken, and which one the other folds' images would choose.

    Args:
        found: cells with their results; those that are no trials count for nothing.

    Returns:
        ``row``, ``taken``, and ``without`` with a number for each fold that is left out; None where trials were judged
        within training images, as they are with --val, their evidence was not kept, or there are too few labels.
    """
    of_rows: dict[str, dict[int, tuple[Cell, Result]]] = {}
    for cell, result in found:
        if cell.stage == "trial" and result["status"] == "done":
            of_rows.setdefault(cell.row.name, {})[cell.number] = cell, result
    told = []
    for row, tried in of_rows.items():
        results = {number: result for number, (_, result) in tried.items()}
        taken = _best(results, {number: primary_of(result, s) for number, result in results.items()})
        left_out = {number: _left_out(cell, s) for number, (cell, _) in tried.items()}
        without = None
        if all(left_out.values()):
            folds = zip(*left_out.values(), strict=True)
            without = [_best(results, dict(zip(left_out, values, strict=True))) for values in folds]
        told.append({"row": row, "taken": taken, "without": without})
    return told


def _left_out(cell: Cell, s: Any) -> list[float]:
    """A trial's primary figure without the images of each fold; empty where there is no such thing.

    It is of what was kept: the others' probes have learnt from the fold's labels, as cross-fitting has it.
    """
    parts = s.primary.split("+")
    asked = {task: cells.told_of(task, s) for task in (part.split(":")[0] for part in parts)}
    folds = {0 if told["val"] else told["folds"] or 0 for told in asked.values()}
    if len(folds) > 1 or 0 in folds:
        return []
    try:
        kept = cells.evidence_of(cell, s)
    except FileNotFoundError:
        return []
    evidence = {task: found for (task, _), found in reversed(kept.items())}  # of several features the first decides
    figures: list[list[dict[str, Any]]] = [[] for _ in range(folds.pop())]
    for task in asked:
        images = len(next(iter(evidence[task].values())))
        sizes = [len(judged) for _, judged in judging.folds_of(images, len(figures), SEED)]
        for number, (first, last) in enumerate(pairwise([0, *accumulate(sizes)])):
            others = np.setdiff1d(np.arange(images), np.arange(first, last))
            try:
                values = cells.evaluator_of(task, s).figures(judging.some(evidence[task], others))
            except Remedy:  # these images show nothing
                return []
            figures[number].append({"task": task, "figures": values})
    return [float(np.mean([_part(entries, part) for part in parts])) for entries in figures]
