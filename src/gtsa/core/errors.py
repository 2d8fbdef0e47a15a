"""Errors that a user can correct, exit codes of the command line, and the process that reports errors."""

from __future__ import annotations

import os


class UserError(ValueError):
    """An error that the user can correct. The message says what is wrong, where, and what to do.

    ``code`` is the exit code of the command line (see EXIT_CODES).
    """

    def __init__(self, message: str, code: int = 2) -> None:
        super().__init__(message)
        self.code = code


def from_worker(error: UserError) -> UserError:
    """An error about data, without the traceback that the DataLoader puts before the message if a worker raised it."""
    return UserError(str(error).rsplit("UserError: ", 1)[-1].strip(), 3)


class ProcessLost(UserError):
    """Another process of the run ended. All others report it: the first process may be the lost one."""


EXIT_CODES = {
    0: "done",
    2: "bad command or configuration",
    3: "bad data",
    4: "bad checkpoint or weights",
    5: "training diverged",
    6: "lack of a resource (memory, disk, worker)",
    7: "done, except for failed parts, which are listed",
    8: "refused for safety",
    75: "stopped on request, with a checkpoint if there was a step to save: continue with --resume",
}


def escaped(name: str) -> str:
    """A file name for terminal and reports: control characters and invalid encodings are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in name)


def is_first_process() -> bool:
    """Whether this process prints messages: the first one on its machine."""
    return os.environ.get("LOCAL_RANK", "0") == "0"
