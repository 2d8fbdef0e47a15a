"""How far a count has come, for what takes long: listing files, looking at them."""

from __future__ import annotations

import time
from types import TracebackType

from gtsa.terminal import console, lasting, say


class Count:
    """A line that is rewritten on a terminal, and one every half minute elsewhere; none for what is done in a moment.

    Args:
        what: is done, e.g. "listed".
        total: how many there are, where that is known.
    """

    def __init__(self, what: str, total: int | None = None) -> None:
        self.what, self.total = what, total
        self.began = time.perf_counter()
        self.every, self.first = (0.5, 1.0) if console.is_terminal else (30.0, 5.0)
        self.shown, self.open = 0.0, False

    def __enter__(self) -> Count:
        return self

    def __call__(self, count: int, note: str = "") -> None:
        """``note``: what else to say."""
        now = time.perf_counter()
        if now - self.began < self.first or now - self.shown < self.every or getattr(console, "_live_stack", None):
            return  # a live display of rich has the terminal for itself
        self.shown = now
        line = self.line(count, now - self.began) + (f"  {note}" if note else "")
        if console.is_terminal:
            self.open = True
            console.file.write(f"\r{line[: console.width - 1]}\x1b[K")
            console.file.flush()
        else:
            say(line)

    def line(self, count: int, seconds: float) -> str:
        if self.total is None:
            return f"{self.what} {count:,}"
        left = seconds * (self.total - count) / max(1, count)
        return f"{self.what} {count:,} of {self.total:,}  ETA {lasting(left)}"

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.open:
            console.file.write("\r\x1b[K")
            console.file.flush()
