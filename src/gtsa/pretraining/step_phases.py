"""Where the time of training steps goes: a stopwatch that splits each step into phases without a gap."""

from __future__ import annotations

import functools
import inspect
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.wrappers import _FabricOptimizer
from torch import Tensor, nn

from gtsa.core.types import Draw, Method, Views
from gtsa.data.batches.loader import Readable, StepSampler, ViewSet
from gtsa.data.sources import Detail

DECODE, CUT, WAIT = "decode", "cut", "wait for workers"
COPY, AUGMENT = "copy to device", "augmentation"
TEACHER, INITIAL, STUDENT, LOSSES = "teacher forward", "initial encoder", "student forward", "losses"
BACKWARD, CLIP, OPTIMISER, FOLLOW, OTHER = "backward", "clipping", "optimiser", "teacher update", "other"
PHASES = (
    DECODE, CUT, WAIT, COPY, AUGMENT, TEACHER, INITIAL, STUDENT, LOSSES, BACKWARD, CLIP, OPTIMISER, FOLLOW,
    OTHER,
)  # fmt: skip
LOADING = (DECODE, CUT, WAIT)


class Stopwatch:
    """The seconds of phases. They exclude one another: a phase stops while another one within it runs.

    Args:
        clock: the time, in seconds; on a GPU after the device has finished (``device_clock``).

    Attributes:
        on: whether phases are measured; otherwise they cost nothing.
        seconds, calls: {phase: its time, and how often it began}.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock, self.on = clock, False
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.calls: Counter[str] = Counter()
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if not self.on:
            yield
            return
        self._settle()
        self._open.append(name)
        self.calls[name] += 1
        try:
            yield
        finally:
            self._settle()
            self._open.pop()

    def timed(self, name: str, function: Callable[..., Any], then: str = "") -> Callable[..., Any]:
        """``function`` as a phase. ``then``: what the step does after it, until another phase begins."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                result = function(*args, **kwargs)
            if self._open and then:
                self._open[0] = then
            return result

        return call

    def _settle(self) -> None:
        now = self.clock()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now


def device_clock(device: torch.device) -> Callable[[], float]:
    """Seconds, after the device has finished what was launched."""

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock


def watch_method(watch: Stopwatch, method: Method) -> None:
    """From now on the networks, the losses and the teacher's update of ``method`` are phases."""
    for name, module in method.named_modules():
        is_encoder = name.split(".")[-1] in ("encoder", "initial_encoder")
        if is_encoder or (_is_head(name) and any(True for _ in module.parameters())):
            _watch_module(watch, _network_of(name), module)
    vars(method)["forward"] = watch.timed(LOSSES, method.forward)
    vars(method)["after_step"] = watch.timed(FOLLOW, method.after_step, then=OTHER)


def _is_head(name: str) -> bool:
    """Whether a module is a head of a network: below a branch, or beside the branches."""
    parts = name.removeprefix("method.").split(".")
    if parts[0] in ("student", "teacher"):
        return len(parts) == 2
    return len(parts) == 1 and parts[0] not in ("", "method")


def _network_of(name: str) -> str:
    parts = name.removeprefix("method.").split(".")
    return {"teacher": TEACHER, "initial_encoder": INITIAL}.get(parts[0], STUDENT)


def _watch_module(watch: Stopwatch, phase: str, module: nn.Module) -> None:
    """Makes a phase of a module's ``forward``, and of the other public functions of gtsa's own modules."""
    own = type(module).__module__.startswith("gtsa.")
    for name, value in vars(type(module)).items() if own else ():
        if inspect.isfunction(value) and not name.startswith("_") and name != "forward":
            vars(module)[name] = watch.timed(phase, getattr(module, name))
    vars(module)["forward"] = watch.timed(phase, module.forward)


def watch_engine(watch: Stopwatch, fabric: Fabric, optimizer: _FabricOptimizer) -> None:
    """From now on the backward pass, the clipping of gradients and the optimiser are phases."""
    vars(fabric)["backward"] = watch.timed(BACKWARD, fabric.backward, then=CLIP)
    inner = optimizer.optimizer
    vars(inner)["step"] = watch.timed(OPTIMISER, inner.step, then=OTHER)


def watch_prepare(
    watch: Stopwatch, prepare: Callable[[Views], Views], device: torch.device
) -> Callable[[Views], Views]:
    """``prepare`` in two phases: the copy of the pixels to the device, and the augmentation there."""

    def work(views: Views) -> Views:
        with watch.phase(COPY):
            views = views.each(lambda crops: type(crops)(
                crops.pixels.to(device, non_blocking=True), crops.boxes, crops.rotations, crops.colours
            ))  # fmt: skip
        with watch.phase(AUGMENT):
            return prepare(views)

    return work


class _TimedSource:
    """A source whose reading is a phase."""

    def __init__(self, source: Readable, watch: Stopwatch) -> None:
        self.source, self.watch = source, watch

    def read(self, index: int, detail: Detail | None = None) -> Tensor:
        with self.watch.phase(DECODE):
            return self.source.read(index, detail)


def read_batches(watch: Stopwatch, views: ViewSet, sampler: StepSampler) -> Iterator[Views]:
    """The batches of a loader without workers, in phases."""
    timed = _timed(views, watch)
    for draws in sampler:
        with watch.phase(CUT):
            batch = timed.batch(draws)
        yield batch


def _timed(views: ViewSet, watch: Stopwatch) -> ViewSet:
    """The views as they are cut, of a source whose reading is a phase; the augmentation is a phase of its own."""
    timed = copy(views)
    timed.source, timed.normalisation = _TimedSource(views.source, watch), None
    return timed


def wait_for_batches(watch: Stopwatch, batches: Iterator[Views]) -> Iterator[Views]:
    """The batches of a loader with workers; waiting for them is a phase."""
    while True:
        with watch.phase(WAIT):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


def loading_seconds(views: ViewSet, count: int, seconds: float = 3.0) -> dict[str, float]:
    """Seconds an image of decoding and cutting in one process, over at most ``count`` images."""
    watch = Stopwatch(time.perf_counter)
    watch.on, done, began = True, 0, time.perf_counter()
    timed = _timed(views, watch)
    while done < count and (done < 2 or time.perf_counter() - began < seconds):
        with watch.phase(CUT):
            timed.batch([Draw(0, done % len(views))])
        done += 1
    return {name: watch.seconds[name] / done for name in (DECODE, CUT)}


def watched_steps(
    steps: Iterator[object], watch: Stopwatch, count: int, limit: float = math.inf
) -> tuple[list[float], list[float]]:
    """Takes up to 2 x ``count`` steps, in turn without and with phases, until ``limit`` seconds have passed.

    Returns the seconds of both kinds. The second kind is measured around the step, not as the sum of its phases.
    """
    plain: list[float] = []
    split: list[float] = []
    start = watch.clock()
    while len(split) < count and (not split or watch.clock() - start < limit):
        plain.append(timed_step(steps, watch))
        watch.on = True
        with watch.phase(OTHER):
            began = watch.clock()
            next(steps)
            split.append(watch.clock() - began)
        watch.on = False
    return plain, split


def timed_step(steps: Iterator[object], watch: Stopwatch) -> float:
    """Seconds of a step without phases."""
    began = watch.clock()
    next(steps)
    return watch.clock() - began
