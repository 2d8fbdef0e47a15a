"""How far each network of a comparison is. Nothing is written."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from gtsa.comparison import tuning
from gtsa.comparison.jobs import Job, make_pretrain_settings
from gtsa.comparison.results import folder_of, read_result
from gtsa.comparison.rows import Row
from gtsa.comparison.settings import Compare
from gtsa.comparison.stages import list_equal_flops_jobs, list_final_jobs, select_jobs
from gtsa.comparison.trained import is_trained
from gtsa.core.terminal import lasting, table


def show(rows: Sequence[Row], settings: Compare) -> None:
    """Prints a line for each network of --cells: done, failed, trained, at which step, or waiting."""
    named = settings.model_copy(update={"only": None})
    jobs = [
        *tuning.list_trial_jobs(rows, settings),
        *list_final_jobs(rows, settings),
        *list_equal_flops_jobs(rows, settings),
    ]
    table("status", [(job.name, *describe(job, settings)) for job in select_jobs(jobs, named)])


def describe(job: Job, settings: Compare) -> tuple[str, str]:
    """State of a network, and what is known of it."""
    result = read_result(job, settings)
    if result is not None and result["status"] != "done":
        return "FAILED", result["reason"]
    if result is not None:
        value = f"primary {tuning.compute_primary(result, settings):.2f}"
        return "done", f"{value}, {result['seconds_in_all']:.0f} s"
    if job.row.source is None and is_trained(job, settings):
        return "trained", "waits for its evaluation"
    return _describe_run(job, settings)


def _describe_run(job: Job, settings: Compare) -> tuple[str, str]:
    """The state of a network without result, by the log of its run."""
    folder = folder_of(job, settings)
    state = "running" if _is_locked(folder / ".lock") else "stopped" if (folder / "job.json").exists() else "waiting"
    entry = _read_last_entry(folder / "run" / "metrics.jsonl")
    if entry is None:
        return state, ""
    steps = make_pretrain_settings(job, settings)["steps"]
    step = int(entry["step"])
    if step >= steps:
        return state, f"all {steps:,} steps are done; its evaluation is not"
    rest = f", about {lasting((steps - step) * entry['seconds'])} of training left"
    return state, f"step {step:,} of {steps:,}{rest}"


def _read_last_entry(file: Path) -> dict[str, float] | None:
    """The last whole line of a log; a process that was killed may have left a part of a line."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return None
    for line in reversed(lines[-2:]):
        with suppress(ValueError):
            entry: dict[str, float] = json.loads(line)
            return entry
    return None


def _is_locked(file: Path) -> bool:
    """Whether the process of a job runs."""
    try:
        with open(file) as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
