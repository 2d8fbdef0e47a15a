"""The jobs of each stage. The jobs of a stage depend only on the settings and on the results of earlier stages."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from gtsa.comparison import tuning
from gtsa.comparison.jobs import Job
from gtsa.comparison.results import read_successful_result
from gtsa.comparison.rows import Row
from gtsa.comparison.settings import Compare
from gtsa.comparison.trained import is_trained
from gtsa.core.errors import UserError


def list_jobs_without_training(rows: Sequence[Row]) -> Iterator[Job]:
    """One job for every row without training. These run first, so that a wrong task fails before hours of training."""
    yield from (Job(row, "images", 0) for row in rows if row.source is not None)


def list_final_jobs(rows: Sequence[Row], settings: Compare) -> Iterator[Job]:
    """Every row with every seed. The seed is the outer loop, so that rows can be compared early."""
    changes_of_rows: dict[str, dict[str, object] | UserError] = {}
    for seed in range(settings.seeds):
        for row in rows:
            if seed and not row.varies:
                continue
            if row.source is not None:
                yield Job(row, "images", seed)
                continue
            if row.name not in changes_of_rows:
                changes_of_rows[row.name] = choose_settings_or_error(row, rows, settings)
            changes = changes_of_rows[row.name]
            if not isinstance(changes, UserError):
                yield Job(row, "images", seed, changes)


def choose_settings_or_error(row: Row, rows: Sequence[Row], settings: Compare) -> dict[str, object] | UserError:
    """The settings that the trials of a row choose, or the reason why there are none."""
    try:
        return tuning.choose_settings(row, rows, settings)
    except UserError as error:
        return error


def list_equal_flops_jobs(rows: Sequence[Row], settings: Compare) -> Iterator[Job]:
    """Runs of the other methods with as many operations as the runs of the first method."""
    if not settings.equal_flops:
        return
    reference, flops = rows[0].name, {}
    for job in list_final_jobs(rows, settings):
        result = read_successful_result(job, settings)
        if result and "steps" in result:
            flops[job.row.name] = result["flops_per_image"]
    if reference not in flops:
        return
    for job in list_final_jobs(rows, settings):
        if job.row.name in flops and job.row.name != reference:
            steps = max(1, round(settings.steps * flops[reference] / flops[job.row.name]))
            yield replace(job, stage="flops", changes={**job.changes, "steps": steps})


def list_reported_jobs(rows: Sequence[Row], settings: Compare) -> Iterator[Job]:
    """All jobs of the report."""
    yield from list_final_jobs(rows, settings)
    yield from list_equal_flops_jobs(rows, settings)
    yield from tuning.list_trial_jobs(rows, settings)


def select_jobs(jobs: Iterable[Job], settings: Compare) -> list[Job]:
    """The jobs of this call: those that --cells names, and of these the ones that --only can do."""
    return [job for job in jobs if _is_named(job, settings) and _can_be_done(job, settings)]


def _is_named(job: Job, settings: Compare) -> bool:
    return not settings.cells or any(fnmatch.fnmatchcase(job.name, pattern) for pattern in settings.cells)


def _can_be_done(job: Job, settings: Compare) -> bool:
    match settings.only:
        case "training":
            return job.row.source is None
        case "evaluation":
            return job.row.source is not None or is_trained(job, settings)
        case None:
            return True
