"""Requests to stop: signals in every phase of a command, and child processes that stop with it.

* Before the first step and after the last, SIGINT, SIGTERM and SIGHUP end the command at once, by an exception.
* Between steps they are collected, and the loop acts on them: it saves and stops. A second SIGINT ends it at once.
* An evaluation during training is interrupted: it can take longer than the 30 seconds that torchrun allows.
* SIGUSR1 requests a training to save and stop, also before the first step.
* While a file is saved, all signals wait.
"""

from __future__ import annotations

import os
import signal
import stat
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from gtsa.core.errors import is_first_process

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ALL = (*ENDING, signal.SIGUSR1)


class Stopped(KeyboardInterrupt):
    """A signal ended the command where there was nothing to save. Handlers of Ctrl-C handle this, too.

    ``code`` as in shells: 128 plus the signal's number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number, self.code = number, 128 + number


class EvaluationStopped(Stopped):
    """A request to stop interrupted an evaluation during training. It is repeated when the training resumes."""


_early: list[int] = []  # SIGUSR1 before the training began
_late: list[Stopped] = []  # signals during a save
_saves = 0  # nested saves in progress
_interruptible = 0  # nested interruptible blocks


@contextmanager
def handle_signals(trains: bool = False) -> Iterator[None]:
    """Signals raise Stopped; SIGTERM, SIGHUP and SIGUSR1 only once, so that cleaning up is not interrupted.

    Signals that others handle, or ignore as nohup does, are left to them. With ``trains``, SIGUSR1 waits for a step.
    """
    received: list[int] = []

    def act(number: int) -> None:
        if number == signal.SIGUSR1 and trains:
            if not _early:
                print_to_stderr("SIGUSR1: saving and stopping after the first step")
            _early.append(number)
        elif number == signal.SIGINT or not received:
            received.append(number)
            raise Stopped(number)

    usual = (signal.SIG_DFL, signal.default_int_handler)
    numbers = [number for number in ALL if signal.getsignal(number) in usual]
    with _handle(act, numbers):
        try:
            yield
        finally:
            if numbers:
                _early.clear()


@contextmanager
def requests() -> Iterator[list[int]]:
    """Collects signals; the loop acts on them between steps. A second Ctrl-C stops at once."""
    received = list(_early)
    _early.clear()

    def act(number: int) -> None:
        if number == signal.SIGINT and signal.SIGINT in received:
            raise Stopped(number)
        received.append(number)
        if len(received) == 1:
            print_to_stderr(f"{signal.Signals(number).name}: stopping after this step, with a checkpoint")
        if _interruptible:
            raise EvaluationStopped(number)

    with _handle(act, [number for number in ALL if signal.getsignal(number) is not signal.SIG_IGN]):
        yield received


@contextmanager
def saving() -> Iterator[None]:
    """Signals wait until the block ends, so that writing is completed."""
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
def interruptible() -> Iterator[None]:
    """A request to stop interrupts the block with ``EvaluationStopped``, where requests are collected."""
    global _interruptible
    _interruptible += 1
    try:
        yield
    finally:
        _interruptible -= 1


def print_to_stderr(text: str) -> None:
    """Prints a line from within a signal handler: no buffers, no locks. Only the first process prints."""
    if is_first_process():
        with suppress(OSError):
            os.write(2, f"{chr(10) if os.isatty(2) else ''}gtsa: {text}\n".encode())


@contextmanager
def _handle(act: Callable[[int], None], numbers: Sequence[int]) -> Iterator[None]:
    """Signals go to ``act`` within the block, and to their former handlers afterwards.

    Outside the main thread nothing changes.
    """
    owner = os.getpid()

    def handle(number: int, _: object) -> None:
        if os.getpid() != owner:  # a worker inherits the handlers of its parent
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
    """Redirects output from a closed terminal to /dev/null: writing to it would fail before the checkpoint is saved."""
    for descriptor in (1, 2):
        with suppress(OSError):
            if stat.S_ISCHR(os.fstat(descriptor).st_mode) and not os.isatty(descriptor):
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


class Processes:
    """Child processes that are stopped together."""

    def __init__(self) -> None:
        self.working: set[subprocess.Popen[bytes]] = set()
        self.stopping = False

    def run(self, command: Sequence[str], **options: Any) -> int:
        """Runs a process and returns its exit code, below 0 for the signal that ended it. Threads may call it."""
        process = subprocess.Popen(command, **options)
        self.working.add(process)
        if self.stopping:  # stop() was called meanwhile
            process.terminate()
        try:
            return process.wait()
        finally:
            self.working.discard(process)

    def stop(self, number: int = signal.SIGTERM) -> None:
        self.stopping = True
        for process in list(self.working):
            process.send_signal(number)
