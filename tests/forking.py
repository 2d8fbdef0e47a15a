"""Processes forked from one that has imported everything: real ones, to be killed, without seconds of imports each."""

import multiprocessing
import os
import sys
import tempfile
from contextlib import suppress
from pathlib import Path


def use_small_samples():
    """Fewer views of an evaluation, and fewer draws of an interval, than a user has: most of a small run's time."""
    from gtsa.evaluation import intervals
    from gtsa.pretraining import verdict

    verdict.VIEWS, intervals.DRAWS = 12, 40


WARM = multiprocessing.get_context("forkserver")
WARM.set_forkserver_preload(
    [
        "gtsa.cli.main",
        "gtsa.pretraining.pretrain",
        "gtsa.evaluation.evaluate",
        "gtsa.evaluation.explore.server",
        "gtsa.comparison.compare",
        "gtsa.models.export",
        "torch.utils.tensorboard",
    ]
)


class Forked:
    """``work(*arguments)`` in a process of its own; what it returns is the exit code. It has what a Popen has of ours.

    Args:
        environment: variables on top of those of this process.
    """

    def __init__(self, work, *arguments, environment=None):
        self._output = Path(tempfile.mkdtemp())
        self._process = WARM.Process(
            target=_child, args=(self._output, multiprocessing.get_start_method(), environment or {}, work, arguments)
        )
        self._process.start()
        self.pid = self._process.pid

    def poll(self):
        return self._process.exitcode

    @property
    def returncode(self):
        return self._process.exitcode

    def send_signal(self, number):
        if self.poll() is None:
            with suppress(ProcessLookupError):  # it ended this moment, as for subprocess
                os.kill(self.pid, number)

    def printed(self):
        """Its standard output so far."""
        out = self._output / "out"
        return out.read_text() if out.exists() else ""

    def communicate(self, timeout=120):
        """(standard output, standard error), once it has ended."""
        self._process.join(timeout)
        assert self.poll() is not None, f"still running after {timeout} s"
        return tuple((self._output / name).read_text() for name in ("out", "err"))


def _child(output, method, environment, work, arguments):
    multiprocessing.set_start_method(
        method, force=True
    )  # a data worker is started as everywhere, not from a cold server
    os.setsid()  # a group of its own, with all that it starts
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(output / name, os.O_WRONLY | os.O_CREAT), number)
    os.environ.update(environment)
    use_small_samples()
    sys.exit(work(*arguments))


def command_line(arguments):
    """``gtsa arguments``, as ``python -m gtsa`` runs it."""
    from gtsa.cli import main

    sys.argv = [str(Path(main.__file__).parents[1] / "__main__.py"), *arguments]
    return main.run(arguments)


def fork(*arguments, environment=None):
    """The command line in a forked process."""
    return Forked(command_line, [str(a) for a in arguments], environment=environment)
