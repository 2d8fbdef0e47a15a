"""Jobs in processes of their own, one at a time on each device or several."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import Queue
from typing import Any

import torch

from gtsa.comparison import tuning
from gtsa.comparison.jobs import Job, written
from gtsa.comparison.results import commit, folder_of, result_of, said
from gtsa.core.errors import UserError
from gtsa.core.files import store
from gtsa.core.stops import Processes
from gtsa.core.terminal import lasting, say
from gtsa.training.devices import cores, readers

STOPPED = (75, 129, 130, 143, -signal.SIGHUP, -signal.SIGINT, -signal.SIGTERM)  # how a process ends on request


def do_all(wanted: Sequence[Job], s: Any, what: str, after: Callable[[], Any] = lambda: None) -> None:
    """Does jobs that are not done, ``s.jobs`` at a time on each device, each in a process of its own.

    Args:
        what: they are, for the user.
        after: called once a job is done.
    """
    left = [job for job in wanted if result_of(job, s) is None]
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
        for number, told in enumerate(pool.map(lambda job: in_process(job, s, free), left), start=1):
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


def in_process(job: Job, s: Any, free: Devices) -> str:
    """Does a job in a process of its own. Returns a line about it."""
    device, place = free.get(), folder_of(job, s)
    try:  # whatever happens, the device is free again: the next job waits for one
        place.mkdir(parents=True, exist_ok=True)
        environment = dict(os.environ)
        store(place / "job.json", written(job, s).encode())
        if device:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
            environment["CUDA_VISIBLE_DEVICES"] = visible[int(device)] if visible != [""] else device
        if free.maxsize > 1:  # threads that wait for one another must not outnumber the cores
            share = cores() // free.maxsize // (2 if device else 1)  # on a GPU the other half reads images
            environment.setdefault("OMP_NUM_THREADS", str(max(1, share)))
        with open(place / "log.txt", "a") as log:
            command = [sys.executable, "-m", "gtsa.comparison.run_job", str(place / "job.json")]
            code = free.processes.run(command, env=environment, stdout=log, stderr=log)
    finally:
        free.put(device)
    result = result_of(job, s)
    if result is None and (code in STOPPED or free.processes.stopping):
        raise UserError("stopped on request; the same command goes on", 75)
    if result is None:
        how = f"signal {-code}" if code < 0 else f"code {code}"
        why = ", most likely for lack of memory" if code == -signal.SIGKILL else ""
        commit(job, s, {"status": "failed", "reason": f"its process ended with {how}{why}; see {place}/log.txt"})
        result = result_of(job, s) or {}
    if result["status"] != "done":
        return f"{job.name}: FAILED: {result['reason']}"
    collapsed = ", COLLAPSING by its own verdict" if said(result) == "collapsing" else ""
    return f"{job.name}: primary {tuning.primary_of(result, s):.2f}, {result['seconds_in_all']:.0f} s{collapsed}"
