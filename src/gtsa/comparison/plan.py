"""The plan of a comparison: which networks it trains and evaluates, and which are done. Nothing is written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from gtsa.comparison import tuning
from gtsa.comparison.jobs import Job, select_images
from gtsa.comparison.results import read_result
from gtsa.comparison.rows import Row
from gtsa.comparison.settings import Compare
from gtsa.comparison.stages import choose_settings_or_error, list_equal_flops_jobs, list_final_jobs
from gtsa.core.errors import UserError
from gtsa.core.terminal import table
from gtsa.data.sources import open_source
from gtsa.pretraining.settings import Pretrain


@dataclass(frozen=True)
class Part:
    """The networks of one row in one stage.

    Attributes:
        done: networks that have a result; failed ones too, as they are not run again.
        steps: training steps of each network; 0 without training, None if they are not known yet.
        batch_size: images per step.
    """

    name: str
    networks: int
    done: int
    steps: int | None
    batch_size: int

    @property
    def steps_to_do(self) -> int:
        return (self.networks - self.done) * (self.steps or 0)


def show(rows: Sequence[Row], settings: Compare, resolved: Mapping[str, Pretrain]) -> None:
    """Prints the plan.

    Args:
        resolved: settings of pretraining of every row that is trained.
    """
    parts = list(list_parts(rows, settings, resolved))
    images = len(open_source(settings.data, select_images(settings)))
    lines = [
        ("images", f"{images:,}", describe_images(images, settings)),
        ("tasks", ", ".join(settings.task), ""),
        ("primary metric", describe_primary(settings), ""),
        *((part.name, _describe_networks([part]), _describe_steps(part, rows[0])) for part in parts),
    ]
    steps = f"{sum(part.steps_to_do for part in parts):,} training steps to do"
    if any(part.steps is None for part in parts):
        steps += ", and those of equal operations"
    table("plan", [*lines, ("in all", _describe_networks(parts), steps)])


def list_parts(rows: Sequence[Row], settings: Compare, resolved: Mapping[str, Pretrain]) -> Iterator[Part]:
    """The networks of every row: trials, runs, and runs of equal operations."""
    trials = list(tuning.list_trial_jobs(rows, settings))
    final, equal = list(list_final_jobs(rows, settings)), list(list_equal_flops_jobs(rows, settings))
    for row in rows:
        of_trials = [job for job in trials if job.row == row]
        runs = settings.seeds if row.varies else 1
        if row.source is not None:
            yield Part(row.name, runs, _count_done(final, row, settings), 0, 0)
            continue
        batch_size: int = resolved[row.name].batch_size
        if of_trials:
            done, steps = _count_done(trials, row, settings), tuning.count_trial_steps(settings)
            yield Part(f"{row.name}, trials", len(of_trials), done, steps, batch_size)
        if _is_left_out(row, rows, settings):
            continue
        yield Part(row.name, runs, _count_done(final, row, settings), resolved[row.name].steps, batch_size)
        if settings.equal_flops and row != rows[0]:
            known = {job.changes["steps"] for job in equal if job.row == row}
            steps_each = int(str(known.pop())) if known else None
            name = f"{row.name}, equal operations"
            yield Part(name, runs, _count_done(equal, row, settings), steps_each, batch_size)


def _count_done(jobs: Iterable[Job], row: Row, settings: Compare) -> int:
    return sum(job.row == row and read_result(job, settings) is not None for job in jobs)


def _is_left_out(row: Row, rows: Sequence[Row], settings: Compare) -> bool:
    """Whether all trials of the row's method are done, and all failed."""
    trials = [job for job in tuning.list_trial_jobs(rows, settings) if job.row.name == row.tuned_as]
    finished = all(read_result(job, settings) is not None for job in trials)
    return finished and isinstance(choose_settings_or_error(row, rows, settings), UserError)


def describe_images(images: int, settings: Compare) -> str:
    """How many images a run sees, and how often each of the ``images``."""
    seen = settings.steps * settings.batch_size
    return f"each run sees {seen:,} images, {seen / images:,.1f} times each of {images:,}"


def describe_primary(settings: Compare) -> str:
    """The primary metric; where only tasks are given, their first metrics."""
    parts = [part if ":" in part else f"first metric of {part}" for part in settings.primary.split("+")]
    return f"mean of {' and '.join(parts)}" if len(parts) > 1 else parts[0]


def _describe_networks(parts: Sequence[Part]) -> str:
    networks = sum(part.networks for part in parts)
    return f"{networks:,} network{'s' * (networks != 1)}, {sum(part.done for part in parts):,} done"


def _describe_steps(part: Part, reference: Row) -> str:
    if part.steps is None:
        return f"as many operations as {reference.name}; the steps are known after its first run"
    if not part.steps:
        return "without training"
    return f"{part.steps:,} step{'s' * (part.steps != 1)} of {part.batch_size:,} images each"
