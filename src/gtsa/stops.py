"""Requests to stop: signals that end a command with one line and a code, and processes that are told of them."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any


class Stopped(KeyboardInterrupt):
    """A request to stop that is no Ctrl-C. ``code`` as shells have it: 128 and the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number


@contextmanager
def heard() -> Iterator[None]:
    """SIGTERM and SIGHUP raise Stopped, once; what others handle, or ignore as nohup does, is left to them."""
    asked: list[int] = []

    def stop(number: int, _: Any) -> None:
        if not asked:  # the way out is not to be interrupted by the next one
            asked.append(number)
            raise Stopped(number)

    before: dict[int, Any] = {}
    try:
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is signal.SIG_DFL:
                before[number] = signal.signal(number, stop)
    except ValueError:  # not in the main thread: the caller's signals stay the caller's
        pass
    try:
        yield
    finally:
        for heeded, handler in before.items():
            signal.signal(heeded, handler)


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
