"""Errors that a user can mend, the exit codes of the command line, and which process tells of them."""

from __future__ import annotations

import os


class UserError(ValueError):
    """A mistake that the user can mend: the message says what is wrong, where, and what to do.

    ``code`` is the exit code of the command line (see EXIT_CODES).
    """

    def __init__(self, message: str, code: int = 2) -> None:
        super().__init__(message)
        self.code = code


def from_worker(error: UserError) -> UserError:
    """An error about data, without the traceback that the DataLoader puts before the message if a worker raised it."""
    return UserError(str(error).rsplit("UserError: ", 1)[-1].strip(), 3)


class Alone(UserError):
    """Another process of the run is gone. Whoever is left says so: the one that speaks for all may be the one gone."""


EXIT_CODES = {
    0: "done",
    2: "bad command or configuration",
    3: "bad data",
    4: "bad checkpoint or weights",
    5: "training diverged",
    6: "lack of a resource (memory, disk, worker)",
    7: "done, but for parts that failed and are named",
    8: "refused for safety",
    75: "stopped on request, with a checkpoint once there was a step to save: run again with --resume to go on",
}


def escaped(name: str) -> str:
    """A file name for the terminal and for reports: control characters and broken encodings are shown, not sent."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in name)


def speaks() -> bool:
    """Whether this process tells the user what happens: of several on a machine it is the first."""
    return os.environ.get("LOCAL_RANK", "0") == "0"
