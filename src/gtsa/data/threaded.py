"""Work of many threads that can be stopped at any time, with bounded memory."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


class PixelBudget:
    """A number of pixels that threads share. A request for more than the budget gets all of it."""

    def __init__(self, size: int) -> None:
        self.size = self.free = size
        self.changed = threading.Condition()

    def reserve(self, pixels: int) -> _Reservation:
        return _Reservation(self, min(pixels, self.size))


class _Reservation:
    def __init__(self, budget: PixelBudget, pixels: int) -> None:
        self.budget, self.pixels = budget, pixels

    def __enter__(self) -> None:
        with self.budget.changed:
            self.budget.changed.wait_for(lambda: self.budget.free >= self.pixels)
            self.budget.free -= self.pixels

    def __exit__(self, *_: object) -> None:
        with self.budget.changed:
            self.budget.free += self.pixels
            self.budget.changed.notify_all()


def map_in_order(work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """``work`` on every item by threads, results in order. Few items are begun ahead, so that it stops quickly."""
    threads = min(32, (os.cpu_count() or 1) * 2)
    waiting: deque[Future[R]] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) >= 4 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
