"""Work of many threads that can be stopped at once, and takes no more memory than it is given."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Room:
    """So many pixels at a time; what is more than all of it gets all of it."""

    def __init__(self, size: int) -> None:
        self.size = self.free = size
        self.changed = threading.Condition()

    def of(self, pixels: int) -> _Taken:
        return _Taken(self, min(pixels, self.size))


class _Taken:
    def __init__(self, room: Room, pixels: int) -> None:
        self.room, self.pixels = room, pixels

    def __enter__(self) -> None:
        with self.room.changed:
            self.room.changed.wait_for(lambda: self.room.free >= self.pixels)
            self.room.free -= self.pixels

    def __exit__(self, *_: object) -> None:
        with self.room.changed:
            self.room.free += self.pixels
            self.room.changed.notify_all()


def each(work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """``work`` of every item, in order, by threads; few are begun ahead, so that it can be stopped at once."""
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
