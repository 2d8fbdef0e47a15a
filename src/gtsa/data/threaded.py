"""Work of many threads that can be stopped at any time, with bounded memory."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

BLOCK, TIMED = 1_024, 16  # items of ``map_short``
WAITING = 4  # times the time that is computed: the rest is waiting for storage

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


def map_short(work: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
    """``work`` on every item, in order: by threads where it waits for storage, and otherwise without.

    Threads that take turns at short work take three times as long as one. Of every BLOCK items the first few are timed.
    """
    for start in range(0, len(items), BLOCK):
        first, rest = items[start : start + TIMED], items[start + TIMED : start + BLOCK]
        began, worked = time.perf_counter(), time.thread_time()
        results = [work(item) for item in first]
        waits = time.perf_counter() - began > WAITING * (time.thread_time() - worked)
        yield from results
        yield from map_in_order(work, rest) if waits else map(work, rest)


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
