"""gtsa compare: which method is best on my images?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from gtsa.comparison import beforehand, summary, tuning
from gtsa.comparison.jobs import Job
from gtsa.comparison.queue import do_all
from gtsa.comparison.results import result_of
from gtsa.comparison.rows import Row, rows_of
from gtsa.comparison.settings import Compare
from gtsa.comparison.stages import at_equal_flops, finals, tuned, untaught
from gtsa.core.errors import UserError
from gtsa.core.settings import validated
from gtsa.core.stops import heard
from gtsa.core.terminal import say
from gtsa.data.sources import open_source
from gtsa.pretraining.verdict import LONG


def compare(methods: Sequence[str] = ("gtsa", "dino"), **settings: Any) -> Path:
    """Trains every method with every seed, asks all networks the same questions, and reports with intervals.

    What is done already is not done again, so the same call goes on after any end. A run that fails is reported with
    its reason and stops no other.

    Args:
        methods: the first one is what the others are compared with.
        settings: as listed by ``gtsa compare --help`` and in ``gtsa.comparison.settings.Compare``.

    Returns:
        The report: ``OUT/report.html``; the figures lie beside it as ``results.csv`` and ``results.json``.

    Raises:
        UserError: something is wrong that the user can mend, it was stopped (75), or the report is there but networks
            failed (7).
    """
    s = validated(Compare, {"methods": tuple(methods), **settings})
    rows = rows_of(s)
    with heard():
        beforehand.check(rows, s)
        _make(Path(s.out))
        reports = Reports(rows, s)
        try:
            _networks(rows, s, reports)
            place = reports()
        except (KeyboardInterrupt, UserError) as stop:
            if isinstance(stop, UserError) and stop.code != 75:
                raise
            page = reports.at_the_end()
            told = f"; what is done by now: {page}" if page else ""
            raise UserError(f"stopped on request; the same command goes on{told}", 75) from None
        except OSError as error:
            where = error.filename or s.out
            raise UserError(f"{where}: {error.strerror or error}; mend it, and the same command goes on", 6) from None
    say(f"\nreport: {place}")
    if failed := [job.name for job in _wanted(rows, s) if (result_of(job, s) or {}).get("status") == "failed"]:
        raise UserError(f"failed: {', '.join(failed)}; the report says why. To try again remove {s.out}/cells/NAME", 7)
    return place


def _make(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; give a folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}; give another folder", 6) from None


def _networks(rows: Sequence[Row], s: Any, reports: Reports) -> None:
    """Does all jobs that are not done. Whoever waits for days sees what there is: every network is reported."""
    seen, images = s.steps * s.batch_size, len(open_source(s.data))
    say(f"each run sees {seen:,} images, {seen / images:,.1f} times each of {images:,}")
    say(f"progress of each: {s.out}/cells/*/*/log.txt")
    say(f"report, from the first network on: {s.out}/report.html")
    if s.trials and (steps := tuning.steps_of(s)) < LONG:
        say(f"trials of {steps:,} steps hardly tell settings apart; give --trial-steps {LONG:,} or more if you can")
    for what, stage in (("rows that learn nothing", untaught), ("trials", tuning.trials)):
        do_all(list(stage(rows, s)), s, what, reports)
    for row in rows:
        if row.source is None and isinstance(without := tuned(row, rows, s), UserError):
            say(f"{row.name} is left out: {without}")
    for what, stage in (("all rows and seeds", finals), ("runs of equal operations", at_equal_flops)):
        do_all(list(stage(rows, s)), s, what, reports)


class Reports:
    """The report, written where networks were done since it was written last."""

    def __init__(self, rows: Sequence[Row], s: Any) -> None:
        self.rows, self.s = rows, s
        self.of: set[str] | None = None  # networks that the last one tells of

    def __call__(self) -> Path:
        done = {job.name for job in _wanted(self.rows, self.s) if result_of(job, self.s) is not None}
        if done != self.of:
            summary.write(self.rows, _wanted(self.rows, self.s), self.s)
            self.of = done
        return Path(self.s.out) / "report.html"

    def at_the_end(self) -> Path | None:
        """Of a comparison that was stopped; None where no network is done, or it cannot be written."""
        try:
            return self() if self.of or any(result_of(job, self.s) for job in _wanted(self.rows, self.s)) else None
        except (KeyboardInterrupt, UserError, OSError):
            return None


def _wanted(rows: Sequence[Row], s: Any) -> Iterator[Job]:
    """All that the report tells of."""
    return chain(finals(rows, s), at_equal_flops(rows, s), tuning.trials(rows, s))
