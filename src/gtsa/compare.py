"""gtsa compare: which method is best on my images?"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain
from pathlib import Path
from queue import Queue
from typing import Any

import torch

from gtsa import cells, config, experiment, plan, report, strict, tuning
from gtsa.cells import Cell, Row
from gtsa.core import Remedy
from gtsa.evals.health import LONG
from gtsa.export import opened
from gtsa.judging import Opened
from gtsa.sources import open_source
from gtsa.terminal import lasting, say

HANDED = "GTSA_CELL"  # environment of a process that is to do one cell


def compare(methods: Sequence[str] = ("gtsa", "dino"), **settings: Any) -> Path:
    """Trains every method with every seed, asks all networks the same questions, and reports with intervals.

    What is done already is not done again, so the same call goes on after any end. A run that fails is reported with
    its reason and stops no other.

    Args:
        methods: the first one is what the others are compared with.
        settings: as listed by ``gtsa compare --help`` and in ``gtsa.config.Compare``.

    Returns:
        The report: ``OUT/report.html``; the figures lie beside it as ``results.csv`` and ``results.json``.

    Raises:
        Remedy: something is wrong that the user can mend, it was stopped (75), or the report is there but networks
            failed (7).
    """
    s = strict.validated(config.Compare, {"methods": tuple(methods), **settings})
    rows = cells.rows_of(s)
    if HANDED in os.environ:
        _one(os.environ[HANDED], rows, s)
        return Path(s.out)
    _checked(rows, s)
    Path(s.out).mkdir(parents=True, exist_ok=True)
    seen, images = s.steps * s.batch_size, len(open_source(s.data))
    say(f"each run sees {seen:,} images, {seen / images:,.1f} times each of {images:,}")
    say(f"progress of each: {s.out}/cells/*/*/log.txt")
    if s.tune and (steps := tuning.steps_of(s)) < LONG:
        say(f"trials of {steps:,} steps hardly tell settings apart; give --tune-steps {LONG:,} or more if you can")
    for what, stage in (("rows that learn nothing", untaught), ("trials", tuning.trials)):
        _all(list(stage(rows, s)), s, what)
    for row in rows:
        if row.source is None and isinstance(without := _tuned(row, rows, s), Remedy):
            say(f"{row.name} is left out: {without}")
    for what, stage in (("all rows and seeds", finals), ("runs of equal operations", at_equal_flops)):
        _all(list(stage(rows, s)), s, what, lambda: _reported(rows, s))  # whoever waits for days sees what there is
    place = _reported(rows, s)
    say(f"\nreport: {place}")
    if failed := [cell.name for cell in _wanted(rows, s) if (cells.done(cell, s) or {}).get("status") == "failed"]:
        raise Remedy(f"failed: {', '.join(failed)}; the report says why. To try again remove {s.out}/cells/NAME", 7)
    return place


def _reported(rows: Sequence[Row], s: Any) -> Path:
    return report.write(rows, _wanted(rows, s), s)


def _wanted(rows: Sequence[Row], s: Any) -> Iterator[Cell]:
    """All that the report tells of."""
    return chain(finals(rows, s), at_equal_flops(rows, s), tuning.trials(rows, s))


def _checked(rows: Sequence[Row], s: Any) -> None:
    """Opens everything once, so that what is wrong is told before hours of training."""
    if not len(open_source(s.data)):
        raise Remedy(f"--data {s.data}: no images", 3)
    for row in rows:
        cell = Cell(row, "images", 0)
        if row.source is None:
            told = strict.validated(config.Pretrain, cells.training_of(cell, s) | {"out": s.out}, f"row {row.name}")
            ready = plan.Plan(told, {})
            plan.start(ready, _model(told))
            plan.sizes(ready)
            if s.tune and row.tuned_as not in s.methods:
                raise Remedy(
                    f"row {row.name} takes the settings of {row.tuned_as}, which is not tried: add it to --methods"
                )
        elif row.source not in config.CONTROLS:
            opened(row.source)
    labels: Opened = {}
    list(cells.questions_of(Cell(rows[0], "images", 0), s, labels))
    if s.tune:
        tuning.checked((question for *_, question in cells.questions_of(Cell(rows[0], "trial", 0), s, labels)), s)


def _model(told: Any) -> str | None:
    """The model of the weights that a row starts from. Raises Remedy where they are not of the row's own (4)."""
    return opened(told.init, model=None if told.model == "auto" else told.model)[0].model if told.init else None


# Which cells there are. What comes later follows from the results of what came before, and from nothing else.


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
        cell.row.name: r["flops_per_image"]
        for cell in finals(rows, s)
        if (r := cells.answered(cell, s)) and "steps" in r
    }
    if rows[0].name not in costs:
        return
    for cell in finals(rows, s):
        name = cell.row.name
        if name in costs and name != rows[0].name:
            steps = max(1, round(s.steps * costs[rows[0].name] / costs[name]))
            yield replace(cell, stage="flops", changes={**cell.changes, "steps": steps})


# The queue


def _all(wanted: Sequence[Cell], s: Any, what: str, after: Callable[[], Any] = lambda: None) -> None:
    """Does cells that are not done, ``s.jobs`` at a time on each device, each in a process of its own.

    Args:
        what: they are, for the user.
        after: called once a cell is done.
    """
    left = [cell for cell in wanted if cells.done(cell, s) is None]
    if not left:
        if wanted:
            say(f"{what}: done, {len(wanted)} of {len(wanted)} networks")
        return
    gpus = torch.cuda.device_count() if s.device != "cpu" and torch.cuda.is_available() else 0
    free: Queue[str] = Queue(max(1, gpus) * s.jobs)
    for device in list(range(max(1, gpus))) * s.jobs:
        free.put(str(device) if gpus else "")
    if gpus and s.workers == "auto":
        s = s.model_copy(update={"workers": plan.readers(free.maxsize)})
    where = f"{gpus} GPU{'s' * (gpus > 1)}" if gpus else "the CPU"
    say(f"{what}: {len(left)} of {len(wanted)} networks to do, on {where}, {free.maxsize} at a time")
    began = time.monotonic()
    with ThreadPoolExecutor(free.maxsize) as pool:
        try:
            for number, told in enumerate(pool.map(lambda cell: _apart(cell, s, free), left), start=1):
                rest = (time.monotonic() - began) / number * (len(left) - number)
                say(f"{number}/{len(left)}  {told}" + (f"; about {lasting(rest)} for the others" if rest else ""))
                after()
        except BaseException:  # those in the queue are gone with the loop; those at work are waited for
            say("stopping: no more networks are begun, and those at work come to a stop first")
            raise


def _apart(cell: Cell, s: Any, free: Queue[str]) -> str:
    """Does a cell in a process of its own. Returns a line about it."""
    device, place = free.get(), cells.folder_of(cell, s)
    place.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, HANDED: cell.name, "GTSA_COMPARE": s.model_dump_json()}
    if device:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        environment["CUDA_VISIBLE_DEVICES"] = visible[int(device)] if visible != [""] else device
    if free.maxsize > 1:  # threads that wait for one another must not outnumber the cores
        share = plan.cores() // free.maxsize // (2 if device else 1)  # on a GPU the other half reads images
        environment.setdefault("OMP_NUM_THREADS", str(max(1, share)))
    try:
        with open(place / "log.txt", "a") as log:
            command = [sys.executable, "-c", "from gtsa.compare import handed; handed()"]
            ended = subprocess.run(command, env=environment, stdout=log, stderr=log)
    finally:
        free.put(device)
    result = cells.done(cell, s)
    if result is None and ended.returncode in (75, 130, -2, -15):
        raise Remedy("stopped on request; the same command goes on", 75)
    if result is None:
        how = f"signal {-ended.returncode}" if ended.returncode < 0 else f"code {ended.returncode}"
        why = ", most likely for lack of memory" if ended.returncode == -9 else ""
        cells.commit(cell, s, {"status": "failed", "reason": f"its process ended with {how}{why}; see {place}/log.txt"})
        result = cells.done(cell, s) or {}
    if result["status"] != "done":
        return f"{cell.name}: FAILED: {result['reason']}"
    collapsed = ", COLLAPSING by its own verdict" if cells.said(result) == "collapsing" else ""
    return f"{cell.name}: primary {tuning.primary_of(result, s):.2f}, {result['seconds_in_all']:.0f} s{collapsed}"


def _one(name: str, rows: Sequence[Row], s: Any) -> None:
    """The cell that this process was made for."""
    for stage in (finals, tuning.trials, at_equal_flops):
        for cell in stage(rows, s):
            if cell.name == name:
                experiment.run(cell, s)
                return
    raise Remedy(f"there is no cell {name}")


def handed() -> None:
    """What a process does that was made for one cell."""
    try:
        compare(**json.loads(os.environ["GTSA_COMPARE"]))
    except Remedy as remedy:
        print(f"gtsa: {remedy}", file=sys.stderr)
        sys.exit(remedy.code)
