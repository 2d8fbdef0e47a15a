"""Requests to stop: signals, in every phase of a command, and processes that are told of them.

* Where nothing is waited for (before the first step, after the last) SIGINT, SIGTERM and SIGHUP end the command at
  once, by an exception.
* Between steps they are collected, and the loop acts on them: it saves and stops. A second SIGINT ends it at once.
* A look on the way is broken off: it can take longer than the 30 seconds that torchrun leaves.
* SIGUSR1 asks a training to save and stop, also when it comes before the first step.
* While something is saved, all of them wait.
"""

from __future__ import annotations

import os
import signal
import stat
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from gtsa.core.errors import speaks

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ALL = (*ENDING, signal.SIGUSR1)


class Stopped(KeyboardInterrupt):
    """A signal ended the command where there was nothing to save. Whoever handles Ctrl-C handles this alike.

    ``code`` as shells have it: 128 and the signal's number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number, self.code = number, 128 + number


class Broken(Stopped):
    """A look was broken off by a request to stop: it is taken when the training goes on."""


_early: list[int] = []  # SIGUSR1 that came before there was a training
_late: list[Stopped] = []  # what came during a save
_saves = 0  # that are being written, one in another
_looks = 0  # that can be broken off


@contextmanager
def heard(trains: bool = False) -> Iterator[None]:
    """Signals raise Stopped: SIGTERM, SIGHUP and SIGUSR1 once, so that the way out is not interrupted.

    What others handle, or ignore as nohup does, is left to them. With ``trains``, SIGUSR1 waits for a step.
    """
    asked: list[int] = []

    def act(number: int) -> None:
        if number == signal.SIGUSR1 and trains:
            if not _early:
                tell("SIGUSR1: saving and stopping after the first step")
            _early.append(number)
        elif number == signal.SIGINT or not asked:
            asked.append(number)
            raise Stopped(number)

    usual = (signal.SIG_DFL, signal.default_int_handler)
    numbers = [number for number in ALL if signal.getsignal(number) in usual]
    with _handled(act, numbers):
        try:
            yield
        finally:
            if numbers:
                _early.clear()


@contextmanager
def requests() -> Iterator[list[int]]:
    """Collects signals; the loop acts on them between steps. A second Ctrl-C stops at once."""
    asked = list(_early)
    _early.clear()

    def act(number: int) -> None:
        if number == signal.SIGINT and signal.SIGINT in asked:
            raise Stopped(number)
        asked.append(number)
        if len(asked) == 1:
            tell(f"{signal.Signals(number).name}: stopping after this step, with a checkpoint")
        if _looks:
            raise Broken(number)

    with _handled(act, [number for number in ALL if signal.getsignal(number) is not signal.SIG_IGN]):
        yield asked


@contextmanager
def saving() -> Iterator[None]:
    """What is written within is written to its end; signals are acted on afterwards."""
    global _saves
    _saves += 1
    try:
        yield
    finally:
        _saves -= 1
        if _late and not _saves:
            stopped = _late[0]
            _late.clear()
            raise stopped


@contextmanager
def looking() -> Iterator[None]:
    """What is done within is broken off by a request to stop, as ``Broken``, where requests are collected."""
    global _looks
    _looks += 1
    try:
        yield
    finally:
        _looks -= 1


def tell(text: str) -> None:
    """A line on standard error, from within a signal handler: nothing is buffered or locked. Of several processes one
    tells."""
    if speaks():
        with suppress(OSError):
            os.write(2, f"{chr(10) if os.isatty(2) else ''}gtsa: {text}\n".encode())


@contextmanager
def _handled(act: Callable[[int], None], numbers: Sequence[int]) -> Iterator[None]:
    """Signals go to ``act`` and, afterwards, to whom they went before.

    Outside the main thread the caller's signals stay the caller's.
    """
    owner = os.getpid()

    def handle(number: int, _: Any) -> None:
        if os.getpid() != owner:  # a worker, which has the handlers of its parent
            return
        if number == signal.SIGHUP:
            _leave_terminal()
        try:
            act(number)
        except Stopped as stopped:
            if not _saves:
                raise
            _late.append(stopped)

    try:
        before = {number: signal.signal(number, handle) for number in numbers}
    except ValueError:
        before = {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave_terminal() -> None:
    """Output to a terminal that is gone goes nowhere: writing there fails, and a checkpoint is yet to be saved."""
    for descriptor in (1, 2):
        with suppress(OSError):
            if stat.S_ISCHR(os.fstat(descriptor).st_mode) and not os.isatty(descriptor):
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


class Processes:
    """Processes that work for this one, and come to a stop with it."""

    def __init__(self) -> None:
        self.working: set[subprocess.Popen[bytes]] = set()
        self.stopping = False

    def run(self, command: Sequence[str], **options: Any) -> int:
        """Waits for a process; its exit code, below 0 for the signal that ended it. For threads."""
        process = subprocess.Popen(command, **options)
        self.working.add(process)
        if self.stopping:  # in the moment between
            process.terminate()
        try:
            return process.wait()
        finally:
            self.working.discard(process)

    def stop(self, number: int = signal.SIGTERM) -> None:
        self.stopping = True
        for process in list(self.working):
            process.send_signal(number)
