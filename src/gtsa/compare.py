"""gtsa compare: which method is best on my images?"""

from __future__ import annotations

import json
import os
import signal
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

from gtsa import beforehand, cells, config, experiment, report, tuning
from gtsa.cells import Cell, Row
from gtsa.core.errors import Remedy
from gtsa.core.settings import validated
from gtsa.core.stops import Processes, heard
from gtsa.core.terminal import lasting, say
from gtsa.data.sources import open_source
from gtsa.evals.health import LONG
from gtsa.training.devices import cores, readers

HANDED = "GTSA_CELL"  # environment of a process that is to do one cell
STOPPED = (75, 129, 130, 143, -signal.SIGHUP, -signal.SIGINT, -signal.SIGTERM)  # how a process ends on request


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
    s = validated(config.Compare, {"methods": tuple(methods), **settings})
    rows = cells.rows_of(s)
    if HANDED in os.environ:
        _one(os.environ[HANDED], rows, s)
        return Path(s.out)
    with heard():
        beforehand.check(rows, s)
        _make(Path(s.out))
        reports = Reports(rows, s)
        try:
            _networks(rows, s, reports)
            place = reports()
        except (KeyboardInterrupt, Remedy) as stop:
            if isinstance(stop, Remedy) and stop.code != 75:
                raise
            done = reports.at_the_end()
            told = f"; what is done by now: {done}" if done else ""
            raise Remedy(f"stopped on request; the same command goes on{told}", 75) from None
        except OSError as error:
            where = error.filename or s.out
            raise Remedy(f"{where}: {error.strerror or error}; mend it, and the same command goes on", 6) from None
    say(f"\nreport: {place}")
    if failed := [cell.name for cell in _wanted(rows, s) if (cells.done(cell, s) or {}).get("status") == "failed"]:
        raise Remedy(f"failed: {', '.join(failed)}; the report says why. To try again remove {s.out}/cells/NAME", 7)
    return place


def _make(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise Remedy(f"--out {out} is a file; give a folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Remedy(f"--out {out} cannot be written: {error.strerror}; give another folder", 6) from None


def _networks(rows: Sequence[Row], s: Any, reports: Reports) -> None:
    """Does all cells that are not done. Whoever waits for days sees what there is: every network is reported."""
    seen, images = s.steps * s.batch_size, len(open_source(s.data))
    say(f"each run sees {seen:,} images, {seen / images:,.1f} times each of {images:,}")
    say(f"progress of each: {s.out}/cells/*/*/log.txt")
    say(f"report, from the first network on: {s.out}/report.html")
    if s.tune and (steps := tuning.steps_of(s)) < LONG:
        say(f"trials of {steps:,} steps hardly tell settings apart; give --tune-steps {LONG:,} or more if you can")
    for what, stage in (("rows that learn nothing", untaught), ("trials", tuning.trials)):
        _all(list(stage(rows, s)), s, what, reports)
    for row in rows:
        if row.source is None and isinstance(without := _tuned(row, rows, s), Remedy):
            say(f"{row.name} is left out: {without}")
    for what, stage in (("all rows and seeds", finals), ("runs of equal operations", at_equal_flops)):
        _all(list(stage(rows, s)), s, what, reports)


class Reports:
    """The report, written where networks were done since it was written last."""

    def __init__(self, rows: Sequence[Row], s: Any) -> None:
        self.rows, self.s = rows, s
        self.of: set[str] | None = None  # networks that the last one tells of

    def __call__(self) -> Path:
        done = {cell.name for cell in _wanted(self.rows, self.s) if cells.done(cell, self.s) is not None}
        if done != self.of:
            report.write(self.rows, _wanted(self.rows, self.s), self.s)
            self.of = done
        return Path(self.s.out) / "report.html"

    def at_the_end(self) -> Path | None:
        """Of a comparison that was stopped; None where no network is done, or it cannot be written."""
        try:
            return self() if self.of or any(cells.done(cell, self.s) for cell in _wanted(self.rows, self.s)) else None
        except (KeyboardInterrupt, Remedy, OSError):
            return None


def _wanted(rows: Sequence[Row], s: Any) -> Iterator[Cell]:
    """All that the report tells of."""
    return chain(finals(rows, s), at_equal_flops(rows, s), tuning.trials(rows, s))


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
    free = Devices([str(device) if gpus else "" for device in list(range(max(1, gpus))) * s.jobs])
    if gpus and s.workers == "auto":
        s = s.model_copy(update={"workers": readers(free.maxsize)})
    where = f"{gpus} GPU{'s' * (gpus > 1)}" if gpus else "the CPU"
    say(f"{what}: {len(left)} of {len(wanted)} networks to do, on {where}, {free.maxsize} at a time")
    began = time.monotonic()
    pool = ThreadPoolExecutor(free.maxsize)
    try:
        for number, told in enumerate(pool.map(lambda cell: _apart(cell, s, free), left), start=1):
            rest = (time.monotonic() - began) / number * (len(left) - number)
            say(f"{number}/{len(left)}  {told}" + (f"; about {lasting(rest)} for the others" if rest else ""))
            after()
    except BaseException:  # those in the queue are gone with the loop; those at work are waited for
        say("stopping: no more networks are begun, and those at work come to a stop first")
        free.processes.stop()
        raise
    finally:
        try:
            pool.shutdown(cancel_futures=True)
        except KeyboardInterrupt:  # once more: at once
            free.processes.stop(signal.SIGKILL)
            raise


class Devices(Queue[str]):
    """Devices that are free, and the processes on those that are not."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(len(names))
        self.processes = Processes()
        for name in names:
            self.put(name)


def _apart(cell: Cell, s: Any, free: Devices) -> str:
    """Does a cell in a process of its own. Returns a line about it."""
    device, place = free.get(), cells.folder_of(cell, s)
    try:  # whatever happens, the device is free again: the next cell waits for one
        place.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, HANDED: cell.name, "GTSA_COMPARE": s.model_dump_json()}
        if device:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
            environment["CUDA_VISIBLE_DEVICES"] = visible[int(device)] if visible != [""] else device
        if free.maxsize > 1:  # threads that wait for one another must not outnumber the cores
            share = cores() // free.maxsize // (2 if device else 1)  # on a GPU the other half reads images
            environment.setdefault("OMP_NUM_THREADS", str(max(1, share)))
        with open(place / "log.txt", "a") as log:
            command = [sys.executable, "-c", "from gtsa.compare import handed; handed()"]
            code = free.processes.run(command, env=environment, stdout=log, stderr=log)
    finally:
        free.put(device)
    result = cells.done(cell, s)
    if result is None and (code in STOPPED or free.processes.stopping):
        raise Remedy("stopped on request; the same command goes on", 75)
    if result is None:
        how = f"signal {-code}" if code < 0 else f"code {code}"
        why = ", most likely for lack of memory" if code == -signal.SIGKILL else ""
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
        with heard():
            compare(**json.loads(os.environ["GTSA_COMPARE"]))
    except Remedy as remedy:
        print(f"gtsa: {remedy}", file=sys.stderr)
        sys.exit(remedy.code)
    except KeyboardInterrupt:
        print("gtsa: stopped on request", file=sys.stderr)
        sys.exit(75)
