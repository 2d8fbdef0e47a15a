"""Writes the report of a comparison: results.csv, results.json and report.html. It depends on stored results alone."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from gtsa.comparison import report_page
from gtsa.comparison.jobs import Job
from gtsa.comparison.results import Result, read_result
from gtsa.comparison.rows import Row
from gtsa.comparison.settings import Compare
from gtsa.comparison.stages import list_reported_jobs
from gtsa.comparison.summary import SmallestDifference, summarise
from gtsa.core.errors import UserError
from gtsa.core.files import store
from gtsa.core.terminal import say


class ReportWriter:
    """Writes the report, and again only if further networks are done.

    Attributes:
        fault: why the last report could not be written, for a fault of gtsa; empty if it was written.
    """

    def __init__(self, rows: Sequence[Row], settings: Compare) -> None:
        self.rows, self.settings, self.fault = rows, settings, ""
        self.reported: set[str] | None = None  # names of the jobs in the last report

    def update(self) -> Path:
        """Brings the report up to date; returns the path of the page. Without any result there is none.

        A fault of gtsa is reported in a line, and does not end the comparison: the networks are worth more.
        """
        done = {job.name for job in self._list_jobs() if read_result(job, self.settings) is not None}
        if done and (done != self.reported or self.fault):
            fault = self._try_writing()
            if fault and fault != self.fault:
                say(f"report: could not be written ({fault}); the comparison continues without it")
            self.fault, self.reported = fault, done
        return Path(self.settings.out) / "report.html"

    def _try_writing(self) -> str:
        """Writes the report; the reason where that fails by a fault of gtsa."""
        try:
            write_report(self.rows, self._list_jobs(), self.settings)
        except (UserError, OSError):  # the user can correct these
            raise
        except Exception as error:
            return f"{type(error).__name__}: {' '.join(str(error).split())}"
        return ""

    def update_after_stop(self) -> Path | None:
        """As ``update``, but returns None if no network is done or the report cannot be written."""
        try:
            done = self.reported or any(read_result(job, self.settings) for job in self._list_jobs())
            page = self.update() if done else None
            return None if self.fault else page
        except (KeyboardInterrupt, UserError, OSError):
            return None

    def _list_jobs(self) -> Iterable[Job]:
        return list_reported_jobs(self.rows, self.settings)


def write_report(rows: Sequence[Row], jobs: Iterable[Job], settings: Compare) -> Path:
    """Writes all three files into the folder of the comparison; returns the path of the page."""
    results = [(job, result) for job in jobs if (result := read_result(job, settings)) is not None]
    folder = Path(settings.out)
    summary = summarise(rows, results, settings)
    store(folder / "results.csv", _make_csv(results, summary["smallest_difference"]).encode())
    store(folder / "results.json", (json.dumps(summary, indent=1) + "\n").encode())
    store(folder / "report.html", report_page.make_page(summary, results, settings).encode())
    return folder / "report.html"


def _make_csv(results: Sequence[tuple[Job, Result]], smallest: SmallestDifference | None) -> str:
    """One line per value (long format), for further statistics."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["method", "stage", "seed", "task", "feature", "block", "metric", "value", "n"])
    for job, result in results:
        for entry in result.get("results", ()):
            first = (job.row.name, job.stage, job.number, entry["task"], entry["feature"], "last")
            for metric, value in entry["metrics"].items():
                table.writerow([*first, metric, repr(value), entry["images"]])
    if smallest:
        name = f"smallest difference, {smallest['seeds']} seeds"
        table.writerow(["", "images", "", "primary", "", "", name, repr(smallest["value"]), smallest["pairs"]])
    return text.getvalue()
