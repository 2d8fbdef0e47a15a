"""What the user sees while things run."""

from __future__ import annotations

import shlex
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

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


class Progress:
    """One line that is kept up to date on a terminal, and printed every half minute elsewhere.

    Args:
        steps: of the whole run; start: done before.
        images: a step.
    """

    def __init__(self, steps: int, start: int, images: int, every: float = 30.0) -> None:
        self.steps, self.start, self.images, self.every = steps, start, images, every
        self.began = self.printed = time.perf_counter()
        self.live = Live(console=console, refresh_per_second=4, transient=False) if console.is_terminal else None
        if self.live:
            self.live.start()

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """``values``: seconds (mean per step), waited (share), and figures to print."""
        now = time.perf_counter()
        line = self.line(step, values)
        if self.live:
            self.live.update(Text(line))
        elif now - self.printed > self.every or step in (self.steps, self.start + 10):
            self.printed = now
            say(line)

    def line(self, step: int, values: Mapping[str, float]) -> str:
        done = max(1, step - self.start)
        each = (time.perf_counter() - self.began) / done  # with the looks between steps: the ETA is the run's
        figures = "  ".join(
            f"{name.replace('_accuracy', '')} {100 * value:.0f} %"
            if name.endswith("accuracy")
            else f"{name} {value:.3f}"
            for name, value in values.items()
            if name not in ("seconds", "waited", "learning_rate", "gradient")
        )
        return (
            f"step {step}/{self.steps}  ETA {lasting(each * (self.steps - step))}  "
            f"{self.images / values['seconds']:.1f} images/s  data {100 * values['waited']:.0f} %  {figures}"
        )

    def close(self) -> None:
        if self.live:
            self.live.stop()


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
