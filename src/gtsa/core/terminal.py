"""Output on the terminal: tables, lines, counts and progress."""

from __future__ import annotations

import shlex
import shutil
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import ClassVar

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from gtsa.core.errors import is_first_process

console = Console(highlight=False, soft_wrap=True)
if not console.is_terminal:
    console.width = 120  # without a terminal rich assumes 80 columns and cuts lines


def table(title: str, rows: Sequence[tuple[str, object, str]]) -> None:
    """Three columns: name, value, reason."""
    grid = Table(title=Text(title), title_justify="left", box=None, pad_edge=False, show_header=False)
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column()
    grid.add_column(style="dim")
    for name, value, reason in rows:
        grid.add_row(Text(name), Text(str(value)), Text(reason))
    console.print(grid)


def say(text: str) -> None:
    """Prints a line."""
    console.print(Text(text))


class Line:
    """A line that is rewritten on a terminal. Of several open lines the newest is shown."""

    _open: ClassVar[list[Line]] = []
    _live: ClassVar[Live | None] = None

    def __init__(self) -> None:
        self.text = ""
        Line._open.append(self)
        if is_first_process() and console.is_terminal and Line._live is None:
            Line._live = Live(console=console, refresh_per_second=4, transient=True)
            Line._live.start()

    def show(self, text: str, at_once: bool = False) -> None:
        self.text = text
        self._update(at_once)

    def close(self) -> None:
        Line._open.remove(self)
        self._update()
        if not Line._open and Line._live:
            Line._live.stop()
            Line._live = None

    def _update(self, at_once: bool = False) -> None:
        if Line._live:
            Line._live.update(Text(Line._open[-1].text if Line._open else ""), refresh=at_once)


@contextmanager
def doing(text: str, log: bool = True) -> Iterator[None]:
    """Shows what is in progress: on a terminal until it is done, elsewhere as a permanent line if ``log``."""
    line = Line()
    try:
        line.show(f"{text} ...", at_once=True)
        if log and is_first_process() and not console.is_terminal:
            say(f"{text} ...")
        yield
    finally:
        line.close()


class Count:
    """The progress of a count: one line on a terminal, elsewhere a line every half minute.

    Nothing is shown for short tasks.

    Args:
        what: the participle of the task, e.g. "listed".
        total: the final count, if known.
    """

    def __init__(self, what: str, total: int | None = None) -> None:
        self.what, self.total = what, total
        self.began = time.perf_counter()
        self.every, self.first = (0.5, 1.0) if console.is_terminal else (30.0, 5.0)
        self.shown = 0.0

    def __enter__(self) -> Count:
        self._line = Line()
        return self

    def __call__(self, count: int, note: str = "") -> None:
        """``note``: text after the count."""
        now = time.perf_counter()
        if now - self.began < self.first or now - self.shown < self.every:
            return
        self.shown = now
        text = self.line(count, now - self.began) + (f"  {note}" if note else "")
        self._line.show(text, at_once=True)
        if is_first_process() and not console.is_terminal:
            say(text)

    def line(self, count: int, seconds: float) -> str:
        if self.total is None:
            return f"{self.what} {count:,}"
        remaining = seconds * (self.total - count) / max(1, count)
        return f"{self.what} {count:,} of {self.total:,}  ETA {lasting(remaining)}"

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._line.close()


class Clock:
    """Estimates the remaining time of a run from the recent cost of steps, evaluations and saves.

    The first step is slow; it counts only until later steps are measured.

    Args:
        steps: of the whole run.
        evaluate_every, save_every: steps; the last evaluation and save are at the end.
        step, evaluation: expected seconds, until they are measured.
    """

    def __init__(
        self, steps: int, evaluate_every: int, save_every: int, step: float | None = None, evaluation: float = 0.0
    ) -> None:
        self.steps, self.every = steps, {"evaluation": evaluate_every, "save": save_every}
        self.seconds = {"evaluation": evaluation, "save": 0.0}
        self.expected, self.recent, self.first = step, deque[float](maxlen=100), True

    def step(self, seconds: float) -> None:
        if not self.first:
            self.recent.append(seconds)
        elif self.expected is None:
            self.expected = seconds
        self.first = False

    def left(self, step: int) -> float:
        """Seconds from the end of ``step`` to the end of the run."""
        seconds_a_step = sum(self.recent) / len(self.recent) if self.recent else self.expected or 0.0
        others = sum(seconds * times(step, self.steps, self.every[name]) for name, seconds in self.seconds.items())
        return seconds_a_step * (self.steps - step) + others


def times(step: int, steps: int, every: int) -> int:
    """The number of multiples of ``every`` after ``step``; the end of the run counts as one, too."""
    return max(0, (steps - 1) // every - step // every) + 1


class Progress:
    """The progress of a training: one line on a terminal, elsewhere a line every half minute.

    Args:
        steps: of the whole run.
        start: steps that were done before.
        images: number a step.
        clock: of the run; None: a clock of steps alone.
    """

    def __init__(self, steps: int, start: int, images: int, every: float = 30.0, clock: Clock | None = None) -> None:
        self.steps, self.start, self.images, self.every = steps, start, images, every
        self.clock = clock or Clock(steps, steps, steps)
        self.shown = self.printed = time.perf_counter()
        self.last, self.text = Line(), ""
        if start < steps:
            self.last.show(f"step {start + 1}/{steps} ...", at_once=True)

    @property
    def due(self) -> bool:
        """Whether it is time for another line. Steps can take minutes."""
        now = time.perf_counter()
        return now - self.shown > 1 if console.is_terminal else now - self.printed > self.every

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """``values``: seconds (mean per step), waited (share of time), and metrics to print."""
        self.shown = time.perf_counter()
        self.text = self.line(step, values)
        self.last.show(self.text)
        if not console.is_terminal and (self.due or step in (self.steps, self.start + 1, self.start + 10)):
            self.printed = self.shown
            say(self.text)

    def line(self, step: int, values: Mapping[str, float]) -> str:
        metrics = "  ".join(
            f"{name.replace('_', ' ')} {100 * value:.0f} %" if name.endswith("accuracy") else f"{name} {value:.3f}"
            for name, value in values.items()
            if name not in ("seconds", "waited", "learning_rate", "gradient")
        )
        return (
            f"step {step}/{self.steps}  ETA {lasting(self.clock.left(step))}  "
            f"{self.images / values['seconds']:.1f} images/s  data {100 * values['waited']:.0f} %  {metrics}"
        )

    def close(self) -> None:
        self.last.close()
        if console.is_terminal and self.text:
            say(self.text)


def lasting(seconds: float) -> str:
    """A duration: 2 h 05 min, 2 min 03 s or 3 s."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours:,} h {m:02d} min" if hours else f"{m} min {s:02d} s" if m else f"{s} s"


def command() -> str:
    """The command for gtsa, quoted: its path if it is not on PATH (its environment is not activated)."""
    if shutil.which("gtsa"):
        return "gtsa"
    program = Path(sys.argv[0])
    return shlex.join([str(program)] if program.name == "gtsa" else [sys.executable, "-m", "gtsa"])


def gib(size: float) -> str:
    """A size in bytes as GiB or MiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
