"""Schedules: functions of time, where time runs from 0 to 1 over the whole run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol


class Schedule(Protocol):
    def __call__(self, time: float) -> float: ...


@dataclass(frozen=True)
class Constant:
    value: float

    def __call__(self, time: float) -> float:
        return self.value


@dataclass(frozen=True)
class Ramp:
    """``start`` up to time ``since``, then linear to ``end`` at time ``until``, and ``end`` from then on."""

    start: float
    end: float
    until: float
    since: float = 0.0

    def __call__(self, time: float) -> float:
        if time >= self.until:
            return self.end
        return self.start + (self.end - self.start) * max(0.0, time - self.since) / (self.until - self.since)


@dataclass(frozen=True)
class Cosine:
    """Half a cosine from ``start`` at time 0 to ``end`` at time 1."""

    start: float
    end: float

    def __call__(self, time: float) -> float:
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * min(time, 1.0))) / 2


@dataclass(frozen=True)
class Polynomial:
    """``start`` times (1 - time) ** ``power``: 0 at time 1."""

    start: float
    power: float = 1.0

    def __call__(self, time: float) -> float:
        return self.start * math.pow(1 - min(time, 1.0), self.power)


@dataclass(frozen=True)
class Warmup:
    """Linear from 0 to the peak at time ``peak_at``, constant until ``until``, then ``after``, stretched over the rest.

    In a run of S steps with W warm-up steps, peak_at = (W - 1) / S and until = W / S: the last warm-up step is the
    first at the peak, as in the published runs. See ``warmup_then``.
    """

    peak_at: float
    until: float
    after: Schedule

    def __call__(self, time: float) -> float:
        if time < self.until:
            return self.after(0.0) * (min(1.0, time / self.peak_at) if self.peak_at > 0 else 1.0)
        return self.after((time - self.until) / (1 - self.until) if self.until < 1 else 1.0)


@dataclass(frozen=True)
class After:
    """0 before ``start``, ``value`` from then on."""

    start: float
    value: float

    def __call__(self, time: float) -> float:
        return self.value if time >= self.start else 0.0


@dataclass(frozen=True)
class Steps:
    """``start``, multiplied by ``factor`` at each of the times ``at``."""

    start: float
    at: tuple[float, ...]
    factor: float = 0.1

    def __call__(self, time: float) -> float:
        return self.start * self.factor ** sum(time >= moment for moment in self.at)


def warmup_then(after: Schedule, fraction: float, steps: int) -> Schedule:
    """``after``, preceded by a linear warm-up over ``fraction`` of ``steps`` steps; its last step is at the peak."""
    warm = round(fraction * steps)
    return Warmup((warm - 1) / steps, warm / steps, after) if warm > 0 else after
