"""OpenMP's threads give cores away while neighbours want them."""

import os
import resource
import subprocess
import sys
import threading
import time

import pytest
import torch

from gtsa.training import threads

GNU = pytest.mark.skipif(not threads.times(), reason="needs Linux's schedstat")


def test_waiting_is_the_share_of_threads_that_were_there_all_along():
    before = {"1": (0, 0), "2": (10**9, 10**9), "3": (7, 7)}  # 3 ends, 4 begins
    now = {"1": (3 * 10**8, 0), "2": (10**9, 13 * 10**8), "4": (10**10, 0)}
    assert threads.waiting(before, now) == 0.5
    assert threads.waiting(before, before) == 0
    assert threads.waiting({"1": (0, 0)}, {"1": (0, 9 * 10**7)}) == 0  # hardly ran: says nothing


@GNU
def test_threads_sleep_while_a_team_is_held_and_compute_the_same():
    """Of a process that has two threads; on one core they sleep anyway."""
    script = (
        "import resource, sys, torch; from gtsa.training import threads\n"
        "torch.set_num_threads(2); x = torch.arange(70_000.)\n"
        "def sleeps():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw\n"
        "    for _ in range(500): y = x.mul(3).sum()\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw - before, y\n"
        "_, alone = sleeps()\n"
        "team = threads.Team(threads.loaded()); held, beside = sleeps(); team.close()\n"
        "assert torch.equal(alone, beside); print(held, threads.loaded())\n"
    )
    clean = {name: value for name, value in os.environ.items() if name not in (*threads.USERS, "OMP_NUM_THREADS")}
    out = subprocess.run([sys.executable, "-c", script], env=clean, check=True, capture_output=True, text=True).stdout
    held, file = out.split()
    assert "libgomp" in file
    if len(os.sched_getaffinity(0)) > 1:
        assert int(held) >= 500  # two waits an operation at least, less those that were short


class Measured:
    """Stands in for the system and for OpenMP: what was measured, one entry a look, and when a team was held."""

    def __init__(self, monkeypatch, shares):
        self.shares, self.recorded, self.held, self.over = list(shares), [], False, threading.Event()
        monkeypatch.setattr(threads, "EVERY", 0.001)
        monkeypatch.setattr(threads, "times", lambda: {"1": (0, 0)})
        monkeypatch.setattr(threads, "waiting", self.next)
        monkeypatch.setattr(threads, "loaded", lambda: "libgomp")
        monkeypatch.setattr(threads, "Team", lambda file: self)
        for name in threads.USERS:
            monkeypatch.delenv(name, raising=False)
        self.begun = 0

    def next(self, before, now):
        self.recorded.append(self.begun > 0 and self.held)
        if not self.shares:
            self.over.set()
            return 0.0
        share = self.shares.pop(0)
        if share > threads.CROWDED and not self.held:
            self.held, self.begun = True, self.begun + 1
        return share

    def close(self):
        self.held = False


def test_a_team_is_held_from_the_first_crowded_look_to_the_fourth_calm_one(monkeypatch):
    seen = Measured(monkeypatch, [0, 0.3, 0.01, 0.4, 0, 0, 0, 0.02, 0, 0.2])
    with threads.considerate():
        assert seen.over.wait(20)
        assert seen.held
    assert not seen.held  # closed with the block
    assert seen.recorded[:10] == [False, False, True, True, True, True, True, True, False, False]
    assert seen.begun == 2


def test_one_watch_is_enough(monkeypatch):
    Measured(monkeypatch, [])
    with threads.considerate():
        watches = threading.active_count()
        with threads.considerate():
            assert threading.active_count() == watches
    with threads.considerate():  # and the next one is kept again
        assert threading.active_count() == watches


def test_more_cores_than_a_team_may_have_are_left_alone(monkeypatch):
    seen = Measured(monkeypatch, [0.9] * 9)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(threads.MOST + 1)))
    with threads.considerate():
        time.sleep(0.05)
    assert seen.recorded == [] and threads.wait_policy() == "OpenMP's own waiting policy"


@pytest.mark.parametrize("name", threads.USERS)
def test_settings_of_the_user_are_kept(monkeypatch, name):
    seen = Measured(monkeypatch, [0.9] * 9)
    monkeypatch.setenv(name, "7")
    with threads.considerate():
        time.sleep(0.05)
    assert seen.recorded == []
    assert threads.wait_policy() == f"{name}=7, from the environment"


@GNU
def test_busy_neighbours_are_noticed(monkeypatch):
    """Two processes that count, beside one that computes, on one core."""
    for name in threads.USERS:
        monkeypatch.delenv(name, raising=False)
    core = {min(os.sched_getaffinity(0))}
    busy = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"], preexec_fn=lambda: os.sched_setaffinity(0, core))
        for _ in range(2)
    ]
    was = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, core)
        before, began = threads.times(), resource.getrusage(resource.RUSAGE_SELF).ru_utime
        while resource.getrusage(resource.RUSAGE_SELF).ru_utime < began + 0.3:
            torch.ones(1000).sum()
        assert threads.waiting(before, threads.times()) > threads.CROWDED
    finally:
        os.sched_setaffinity(0, was)
        for one in busy:
            one.kill()
            one.wait()
