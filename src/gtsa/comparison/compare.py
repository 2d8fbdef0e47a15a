"""gtsa compare: which method is best on my images?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Unpack

from gtsa.comparison import beforehand, jobs, plan, status, tuning
from gtsa.comparison.arguments import CompareArguments
from gtsa.comparison.conclusions import describe_power
from gtsa.comparison.jobs import Job
from gtsa.comparison.queue import run_jobs
from gtsa.comparison.report import ReportWriter
from gtsa.comparison.results import read_result
from gtsa.comparison.rows import Row, make_rows
from gtsa.comparison.settings import Compare
from gtsa.comparison.stages import (
    choose_settings_or_error,
    list_equal_flops_jobs,
    list_final_jobs,
    list_jobs_without_training,
    list_reported_jobs,
    select_jobs,
)
from gtsa.core.errors import UserError
from gtsa.core.files import read_json
from gtsa.core.settings import validated, with_keywords
from gtsa.core.stops import handle_signals
from gtsa.core.terminal import say
from gtsa.data.sources import open_source
from gtsa.pretraining.verdict import LONG


@with_keywords(Compare)
def compare(methods: Sequence[str] = ("gtsa", "dino"), **options: Unpack[CompareArguments]) -> Path:
    """Trains every method with every seed, evaluates all networks on the same tasks, and reports with intervals.

    Finished networks are kept, so the same call resumes the comparison after any interruption. A run that fails is
    reported with its reason and does not stop the others.

    Args:
        methods: the first is the reference: all others are compared with it.
        options: the settings in ``gtsa compare --help`` and in ``gtsa.comparison.settings.Compare``.

    Returns:
        The report ``OUT/report.html``. ``results.csv`` and ``results.json`` beside it have the metrics. With ``plan``
        nothing is written.

    Raises:
        UserError: the user can correct something, the comparison was stopped (75), or some networks failed, or the
            report (7).
    """
    # Settings
    settings = validated(Compare, {"methods": tuple(methods), **options})

    # Rows: methods, variants, further rows, controls, given weights
    rows = make_rows(settings)

    # The status alone
    if settings.status:
        beforehand.check_cells(rows, settings)
        status.show(rows, settings)
        return Path(settings.out) / "report.html"

    with handle_signals():
        # Check everything beforehand: images, settings, weights and labels
        resolved = beforehand.check(rows, settings)
        _check_out(Path(settings.out))

        # The plan alone
        if settings.plan:
            plan.show(rows, settings, resolved)
            return Path(settings.out) / "report.html"

        # Folder
        _make_folder(Path(settings.out))

        report = ReportWriter(rows, settings)
        with _stops_with_report(report, settings):
            _announce(settings)

            # Rows that learn nothing (controls, given weights): a wrong task fails here, before hours of training
            run = partial(_run_stage, settings=settings, report=report)
            run("rows without training", list_jobs_without_training(rows))

            # Trials: short runs that choose the settings of every method
            run("trials", tuning.list_trial_jobs(rows, settings))
            _announce_rows_without_settings(rows, settings)

            # All rows and seeds, with the same number of images
            run("all rows and seeds", list_final_jobs(rows, settings))

            # Equal operations: the other methods again, with as many operations as the first
            run("runs of equal operations", list_equal_flops_jobs(rows, settings))

            # Report
            page = report.update()

    if page.exists() and not report.fault:
        _announce_power(page.parent)
        say(f"\nreport: {page}")
    _raise_failures(rows, settings, report.fault)
    return page


def _run_stage(title: str, jobs: Iterable[Job], settings: Compare, report: ReportWriter) -> None:
    run_jobs(title, select_jobs(jobs, settings), settings, report.update)


def _check_out(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; give a folder")


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}; give another folder", 6) from None


@contextmanager
def _stops_with_report(report: ReportWriter, settings: Compare) -> Iterator[None]:
    """Turns a stop and a disk error into a UserError. After a stop the report of the finished networks is written."""
    try:
        yield
    except (KeyboardInterrupt, UserError) as stop:
        if isinstance(stop, UserError) and stop.code != 75:
            raise
        page = report.update_after_stop()
        results = f"; results so far: {page}" if page else ""
        raise UserError(f"stopped on request; the same command resumes the comparison{results}", 75) from None
    except OSError as error:
        path = error.filename or settings.out
        message = f"{path}: {error.strerror or error}; correct it, then the same command resumes the comparison"
        raise UserError(message, 6) from None


def _announce(settings: Compare) -> None:
    say(plan.describe_images(len(open_source(settings.data, jobs.select_images(settings))), settings))
    say(f"primary metric, fixed beforehand: {plan.describe_primary(settings)}")
    say(f"progress of each network: {settings.out}/cells/*/*/log.txt")
    if settings.only != "training":
        say(f"report, after every network: {settings.out}/report.html")
    if settings.trials and (steps := tuning.count_trial_steps(settings)) < LONG:
        say(f"trials of {steps:,} steps hardly distinguish settings; give --trial-steps {LONG:,} or more if you can")


def _announce_rows_without_settings(rows: Sequence[Row], settings: Compare) -> None:
    for row in rows:
        if row.source is None:
            choice = choose_settings_or_error(row, rows, settings)
            if isinstance(choice, UserError):
                say(f"{row.name} is left out: {choice}")


def _announce_power(folder: Path) -> None:
    smallest = (read_json(folder / "results.json") or {}).get("smallest_difference")
    if smallest:
        say(f"\n{describe_power(smallest)}")


def _raise_failures(rows: Sequence[Row], settings: Compare, fault: str) -> None:
    """Raises UserError (7) if networks failed, or the report (``fault``)."""
    failed = []
    for job in list_reported_jobs(rows, settings):
        result = read_result(job, settings)
        if result and result["status"] == "failed":
            failed.append(job.name)
    if fault:
        networks = f"; failed: {', '.join(failed)}" if failed else ""
        raise UserError(
            f"the report could not be written ({fault}){networks}. The results are kept in {settings.out}/cells; with "
            "a corrected version of gtsa the same command writes the report",
            7,
        )
    if failed:
        again = f"To run one again, remove its folder {settings.out}/cells/NAME"
        raise UserError(f"failed: {', '.join(failed)}; the report has the reasons. {again}", 7)
