"""Threads that wait for one another, beside neighbours that want the cores.

A thread of OpenMP that waits for another one spins before it sleeps. Alone that is the fastest; beside two busy
processes it takes the cores from the very threads that are waited for, and a step of the demo took five times as long.

GNU's OpenMP, which torch's wheels for Linux carry, spins for 300,000 rounds, and for 100 while there are more of its
threads than cores (GOMP_SPINCOUNT in its manual). So while our threads have to wait for cores, a second team of threads
is held, which does nothing. What is computed does not change: the same threads do the same work in the same order.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

USERS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")  # how threads wait, where the user has set it
EVERY = 0.5  # seconds between two looks
CROWDED = 0.1  # share of its running time for which a process waits for cores, from which they are taken to be busy
CALM = 4  # looks without waiting after which they are taken to be free
MOST = 64  # cores; the team that is held has more threads, and of more than this a system may refuse some
IDLE = 0.1  # seconds of running in a look, below which it says nothing

_WATCHED = threading.Lock()  # held where a watch is kept

Times = dict[str, tuple[int, int]]  # of each thread: nanoseconds that it ran, and waited for a core


@contextmanager
def considerate() -> Iterator[None]:
    """A with-block whose OpenMP threads spin while cores are free, and sleep while others want them.

    Does nothing where the user has said how threads wait, where the system does not tell or has another OpenMP, and
    within another such block.
    """
    if set_by_user() or not _able() or not _WATCHED.acquire(blocking=False):
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


def described() -> str:
    """How threads wait, for the plan."""
    if found := set_by_user():
        return f"{found}, as set by you"
    return "they spin while they wait, and sleep beside busy neighbours" if _able() else "they wait as OpenMP has it"


def _able() -> bool:
    return bool(times()) and len(os.sched_getaffinity(0)) <= MOST


def set_by_user() -> str:
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
    """Of every thread of this process. Empty where the system does not tell (it is Linux's schedstat)."""
    found: Times = {}
    for file in Path("/proc/self/task").glob("*/schedstat"):
        try:
            ran, waited, _ = map(int, file.read_text().split())
        except (OSError, ValueError):
            continue  # the thread has ended
        found[file.parent.name] = ran, waited
    return found


def waiting(before: Times, now: Times) -> float:
    """The share of its time for which a thread that could run had to wait for a core: 0 alone, 0.5 beside two busy
    processes on two cores."""
    ran = sum(now[thread][0] - before[thread][0] for thread in now.keys() & before.keys())
    waited = sum(now[thread][1] - before[thread][1] for thread in now.keys() & before.keys())
    return waited / (ran + waited) if ran + waited > IDLE * 1e9 else 0.0


def loaded() -> str | None:
    """The file of GNU's OpenMP that torch has loaded in this process."""
    files = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libgomp" in line}
    return next((file for file in sorted(files) if f"{os.sep}torch" in file), None)


class Team:
    """More threads of OpenMP than there are cores, asleep: as long as it is held, waiting threads spin shortly."""

    def __init__(self, openmp: str) -> None:
        self._closing = threading.Event()
        held = threading.Event()
        self._holder = threading.Thread(target=self._hold, args=(openmp, held), name="gtsa-team", daemon=True)
        self._holder.start()
        held.wait()

    def _hold(self, openmp: str, held: threading.Event) -> None:
        """A team lasts as long as the thread that made it."""
        nothing = ctypes.CDLL(None).getppid
        count = len(os.sched_getaffinity(0)) + 1
        ctypes.CDLL(openmp).GOMP_parallel(nothing, None, ctypes.c_uint(count), ctypes.c_uint(0))
        held.set()
        self._closing.wait()

    def close(self) -> None:
        self._closing.set()
        self._holder.join()
