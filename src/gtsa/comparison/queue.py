"""Runs jobs in separate processes, one or several at a time on each device."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import Queue

import torch

from gtsa.comparison import tuning
from gtsa.comparison.jobs import Job, job_to_json
from gtsa.comparison.results import Result, commit, folder_of, get_final_verdict, read_result
from gtsa.comparison.settings import Compare
from gtsa.comparison.trained import needs_work
from gtsa.core.errors import UserError
from gtsa.core.files import store
from gtsa.core.settings import is_auto
from gtsa.core.stops import Processes
from gtsa.core.terminal import lasting, say
from gtsa.training.devices import cores, readers

# Exit codes of a process that was stopped on request
STOPPED = (75, 129, 130, 143, -signal.SIGHUP, -signal.SIGINT, -signal.SIGTERM)


def run_jobs(
    title: str, jobs: Sequence[Job], settings: Compare, after_each: Callable[[], object] = lambda: None
) -> None:
    """Runs the jobs that have no result yet, ``settings.jobs`` at a time on each device.

    Args:
        title: name of the jobs in messages.
        after_each: called after every job.
    """
    pending = [job for job in jobs if needs_work(job, settings)]
    if not pending:
        if jobs:
            say(f"{title}: done, {len(jobs)} of {len(jobs)} networks")
        return
    gpus = torch.cuda.device_count() if settings.device != "cpu" and torch.cuda.is_available() else 0
    devices = Devices([str(device) if gpus else "" for device in list(range(max(1, gpus))) * settings.jobs])
    if gpus and is_auto(settings.workers):
        settings = settings.model_copy(update={"workers": readers(devices.maxsize)})
    where = f"{gpus} GPU{'s' * (gpus > 1)}" if gpus else "the CPU"
    say(f"{title}: {len(pending)} of {len(jobs)} networks to do, on {where}, {devices.maxsize} at a time")
    started = time.monotonic()
    pool = ThreadPoolExecutor(devices.maxsize)
    try:
        futures = [pool.submit(run_in_process, job, settings, devices) for job in pending]
        for number, future in enumerate(as_completed(futures), start=1):
            line = future.result()
            left = (time.monotonic() - started) / number * (len(pending) - number)
            say(f"{number}/{len(pending)}  {line}" + (f"; about {lasting(left)} left" if left else ""))
            after_each()
    except BaseException:  # waiting jobs are cancelled below; running jobs save a checkpoint and end
        say("stopping: no more networks are started; those that run save and end first")
        devices.processes.stop()
        raise
    finally:
        try:
            pool.shutdown(cancel_futures=True)
        except KeyboardInterrupt:  # a second request ends the processes at once
            devices.processes.stop(signal.SIGKILL)
            raise


class Devices(Queue[str]):
    """The queue of free devices, and the processes that run on the others."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(len(names))
        self.processes = Processes()
        for name in names:
            self.put(name)


def run_in_process(job: Job, settings: Compare, devices: Devices) -> str:
    """Runs a job in its own process on the next free device. Returns one line about the result."""
    device, folder = devices.get(), folder_of(job, settings)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        store(folder / "job.json", job_to_json(job, settings).encode())
        with open(folder / "log.txt", "a") as log:
            command = [sys.executable, "-m", "gtsa.comparison.run_job", str(folder / "job.json")]
            environment = _make_environment(device, devices.maxsize)
            code = devices.processes.run(command, env=environment, stdout=log, stderr=log)
    finally:  # after any error too: another job may wait for the device
        devices.put(device)
    if needs_work(job, settings) and (code in STOPPED or devices.processes.stopping):
        raise UserError("stopped on request; the same command resumes the comparison", 75)
    if needs_work(job, settings):
        commit(job, settings, _make_failure(code, folder))
    return f"{job.name}: {_describe_result(read_result(job, settings), settings)}"


def _make_environment(device: str, processes: int) -> dict[str, str]:
    """Environment variables of a process on a device ("" is the CPU), one of several ``processes`` at a time."""
    environment = dict(os.environ)
    if device:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        environment["CUDA_VISIBLE_DEVICES"] = visible[int(device)] if visible != [""] else device
    if processes > 1:  # more threads than cores would wait for one another
        threads = cores() // processes // (2 if device else 1)  # with a GPU the other half reads images
        environment.setdefault("OMP_NUM_THREADS", str(max(1, threads)))
    return environment


def _make_failure(code: int, folder: Path) -> Result:
    """The result of a process that ended without one."""
    end = f"signal {-code}" if code < 0 else f"code {code}"
    reason = ", most likely for lack of memory" if code == -signal.SIGKILL else ""
    return {"status": "failed", "reason": f"its process ended with {end}{reason}; see {folder}/log.txt"}


def _describe_result(result: Result | None, settings: Compare) -> str:
    if result is None:
        return "trained; it waits for its evaluation"
    if result["status"] != "done":
        return f"FAILED: {result['reason']}"
    collapsed = ", COLLAPSING by its verdict" if get_final_verdict(result) == "collapsing" else ""
    return f"primary {tuning.compute_primary(result, settings):.2f}, {result['seconds_in_all']:.0f} s{collapsed}"
