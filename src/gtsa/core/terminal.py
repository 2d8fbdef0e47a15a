"""What the user sees while things run."""

from __future__ import annotations

import shlex
import shutil
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from gtsa.core.errors import speaks

console = Console(highlight=False, soft_wrap=True)
if not console.is_terminal:
    console.width = 120  # logs are not cut at the 80 columns of a terminal that is not there


def table(title: str, rows: list[tuple[str, Any, str]]) -> None:
    """Three columns: name, value, reason."""
    grid = Table(title=Text(title), title_justify="left", box=None, pad_edge=False, show_header=False)
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column()
    grid.add_column(style="dim")
    for name, value, why in rows:
        grid.add_row(Text(name), Text(str(value)), Text(why))
    console.print(grid)


def say(text: str) -> None:
    console.print(Text(text))


class Line:
    """A line that is rewritten on a terminal; of several that are open the newest is shown."""

    _open: ClassVar[list[Line]] = []
    _live: ClassVar[Live | None] = None

    def __init__(self) -> None:
        self.text = ""
        Line._open.append(self)
        if speaks() and console.is_terminal and Line._live is None:
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
    """Says what takes a while: on a terminal until it is done; elsewhere as a line that stays, if ``log``."""
    line = Line()
    try:
        line.show(f"{text} ...", at_once=True)
        if log and speaks() and not console.is_terminal:
            say(f"{text} ...")
        yield
    finally:
        line.close()


class Count:
    """How far a count has come, for what takes long: on a terminal in one line, elsewhere a line every half minute.

    Nothing is shown for what is done in a moment.

    Args:
        what: is done, e.g. "listed".
        total: how many there are, where that is known.
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
        """``note``: what else to say."""
        now = time.perf_counter()
        if now - self.began < self.first or now - self.shown < self.every:
            return
        self.shown = now
        text = self.line(count, now - self.began) + (f"  {note}" if note else "")
        self._line.show(text, at_once=True)
        if speaks() and not console.is_terminal:
            say(text)

    def line(self, count: int, seconds: float) -> str:
        if self.total is None:
            return f"{self.what} {count:,}"
        left = seconds * (self.total - count) / max(1, count)
        return f"{self.what} {count:,} of {self.total:,}  ETA {lasting(left)}"

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._line.close()


class Clock:
    """How long the rest of a run takes: its steps, looks and saves, each at what it has cost lately.

    The first step, which is slow, counts only as long as nothing better is known.

    Args:
        steps: of the whole run.
        look_every, save_every: steps; the last look and save are at the end.
        step, look: seconds that are expected, before anything is known.
    """

    def __init__(self, steps: int, look_every: int, save_every: int, step: float | None = None, look: float = 0.0):
        self.steps, self.every = steps, {"look": look_every, "save": save_every}
        self.seconds = {"look": look, "save": 0.0}
        self.expected, self.recent, self.first = step, deque[float](maxlen=100), True

    def step(self, seconds: float) -> None:
        if not self.first:
            self.recent.append(seconds)
        elif self.expected is None:
            self.expected = seconds
        self.first = False

    def left(self, step: int) -> float:
        """Seconds from the end of ``step`` to the end of the run."""
        each = sum(self.recent) / len(self.recent) if self.recent else self.expected or 0.0
        others = sum(seconds * times(step, self.steps, self.every[name]) for name, seconds in self.seconds.items())
        return each * (self.steps - step) + others


def times(step: int, steps: int, every: int) -> int:
    """How often something happens after ``step`` that is done at every ``every``-th step, and at the end."""
    return max(0, (steps - 1) // every - step // every) + 1


class Progress:
    """One line that is kept up to date on a terminal, and printed every half minute elsewhere.

    Args:
        steps: of the whole run; start: done before.
        images: a step.
        clock: of the run; None: one of steps alone.
    """

    def __init__(self, steps: int, start: int, images: int, every: float = 30.0, clock: Clock | None = None) -> None:
        self.steps, self.start, self.images, self.every = steps, start, images, every
        self.clock = clock or Clock(steps, steps, steps)
        self.shown = self.printed = time.perf_counter()
        self.last, self.text = Line(), ""

    @property
    def due(self) -> bool:
        """Whether it is time for another line: steps can take minutes."""
        now = time.perf_counter()
        return now - self.shown > 1 if console.is_terminal else now - self.printed > self.every

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """``values``: seconds (mean per step), waited (share), and figures to print."""
        self.shown = time.perf_counter()
        self.text = self.line(step, values)
        self.last.show(self.text)
        if not console.is_terminal and (self.due or step in (self.steps, self.start + 10)):
            self.printed = self.shown
            say(self.text)

    def line(self, step: int, values: Mapping[str, float]) -> str:
        metrics = "  ".join(
            f"{name.replace('_accuracy', '')} {100 * value:.0f} %"
            if name.endswith("accuracy")
            else f"{name} {value:.3f}"
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
    """2 h 05 min, 2 min 03 s or 3 s: not to be read as a time of day."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours:,} h {m:02d} min" if hours else f"{m} min {s:02d} s" if m else f"{s} s"


def command() -> str:
    """What to type for gtsa, quoted: its path where it is not on PATH, as long as its environment is not activated."""
    if shutil.which("gtsa"):
        return "gtsa"
    called = Path(sys.argv[0])
    return shlex.join([str(called)] if called.name == "gtsa" else [sys.executable, "-m", "gtsa"])


def gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
