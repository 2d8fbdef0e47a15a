"""How OpenMP threads wait for one another while other processes use the cores.

An OpenMP thread that waits for another one spins before it sleeps. On idle cores that is fastest. Beside two busy
processes it takes the cores from the threads that it waits for: a step of the demo took five times as long.

GNU's OpenMP, which torch's wheels for Linux contain, spins for 300,000 rounds, and for 100 while it has more threads
than cores (GOMP_SPINCOUNT in its manual). So while our threads have to wait for cores, a second team of idle threads is
held. Results do not change: the same threads do the same work in the same order.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

USERS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")  # environment variables with which the user sets how threads wait
EVERY = 0.5  # seconds between two measurements
CROWDED = 0.1  # share of its running time that a process waits for cores; above it they count as busy
CALM = 4  # measurements without waiting after which the cores count as free
MOST = 64  # cores; the held team has more threads than cores, and a system may refuse more than this
IDLE = 0.1  # seconds of running below which a measurement does not count

_WATCHED = threading.Lock()  # held while a thread measures

Times = dict[str, tuple[int, int]]  # {thread: nanoseconds that it ran, and that it waited for a core}


@contextmanager
def considerate() -> Iterator[None]:
    """A with-block whose OpenMP threads spin while cores are free, and sleep while other processes use them.

    Does nothing if the user has set how threads wait, if the system does not report waiting times or has another
    OpenMP, and within another such block.
    """
    if set_by_user() or not _supported() or not _WATCHED.acquire(blocking=False):
        yield
        return
    done = threading.Event()
    watch = threading.Thread(target=_watch, args=(done,), name="gtsa-neighbours", daemon=True)
    watch.start()
    try:
        yield
    finally:
        done.set()
        watch.join()
        _WATCHED.release()


def wait_policy() -> str:
    """How threads wait, for the plan."""
    if variables := set_by_user():
        return f"{variables}, from the environment"
    return "spin while waiting, sleep while other processes are busy" if _supported() else "OpenMP's own waiting policy"


def _supported() -> bool:
    return bool(times()) and len(os.sched_getaffinity(0)) <= MOST


def set_by_user() -> str:
    """The variables of the environment with which the user has set how threads wait."""
    return ", ".join(f"{name}={os.environ[name]}" for name in USERS if name in os.environ)


def _watch(done: threading.Event) -> None:
    before, calm = times(), 0
    team: Team | None = None
    while not done.wait(EVERY):
        now = times()
        calm = 0 if waiting(before, now) > CROWDED else calm + 1
        before = now
        if calm == 0 and team is None and (openmp := loaded()):
            team = Team(openmp)
        elif calm >= CALM and team is not None:
            team.close()
            team = None
    if team is not None:
        team.close()


def times() -> Times:
    """Times of all threads of this process; empty where the system has no schedstat (Linux has)."""
    measured: Times = {}
    for file in Path("/proc/self/task").glob("*/schedstat"):
        try:
            ran, waited, _ = map(int, file.read_text().split())
        except (OSError, ValueError):
            continue  # the thread has ended
        measured[file.parent.name] = ran, waited
    return measured


def waiting(before: Times, now: Times) -> float:
    """The share of their time that runnable threads wait for a core: 0 alone, 0.5 beside two busy processes on two
    cores."""
    ran = sum(now[thread][0] - before[thread][0] for thread in now.keys() & before.keys())
    waited = sum(now[thread][1] - before[thread][1] for thread in now.keys() & before.keys())
    return waited / (ran + waited) if ran + waited > IDLE * 1e9 else 0.0


def loaded() -> str | None:
    """The file of GNU's OpenMP that torch has loaded in this process."""
    files = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libgomp" in line}
    return next((file for file in sorted(files) if f"{os.sep}torch" in file), None)


class Team:
    """More OpenMP threads than cores, asleep. While the team is held, waiting threads spin only shortly."""

    def __init__(self, openmp: str) -> None:
        self._closing = threading.Event()
        held = threading.Event()
        self._holder = threading.Thread(target=self._hold, args=(openmp, held), name="gtsa-team", daemon=True)
        self._holder.start()
        held.wait()

    def _hold(self, openmp: str, held: threading.Event) -> None:
        """A team exists as long as the thread that made it."""
        nothing = ctypes.CDLL(None).getppid
        count = len(os.sched_getaffinity(0)) + 1
        ctypes.CDLL(openmp).GOMP_parallel(nothing, None, ctypes.c_uint(count), ctypes.c_uint(0))
        held.set()
        self._closing.wait()

    def close(self) -> None:
        self._closing.set()
        self._holder.join()
