"""gtsa profile: where the time of a training step goes on this machine, what bounds it, and what to change."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import torch
from lightning_fabric import Fabric
from torch.utils.flop_counter import FlopCounterMode

from gtsa.core import files
from gtsa.core.errors import UserError
from gtsa.core.settings import Plan, is_auto, with_keywords
from gtsa.core.terminal import doing, say
from gtsa.core.types import Draw, Method, StepResult, Views
from gtsa.data import run_images
from gtsa.data.batches.loader import StepSampler, ViewSet
from gtsa.data.run_images import ImageSettings, RunImages
from gtsa.pretraining import machine, profile_table, step_phases
from gtsa.pretraining.adaptation import build_method
from gtsa.pretraining.arguments import RunArguments
from gtsa.pretraining.batches import Batches
from gtsa.pretraining.open_run import open_run
from gtsa.pretraining.parts_of_run import begin_plan, continue_plan, optimizer_of, select
from gtsa.pretraining.requested import describe, requested_settings
from gtsa.pretraining.settings import NOT_PROFILED, Pretrain
from gtsa.pretraining.step_phases import LOADING, PHASES, Stopwatch, timed_step
from gtsa.training import threads
from gtsa.training.devices import cores, launch_fabric
from gtsa.training.loop import fit
from gtsa.training.run_folder import RunFolder

SPAN = 1_000_000  # steps of the run that the measured ones are in the middle of: all losses are on
WARM_UP = 2  # steps before those that are measured
LIMIT = 60.0  # seconds of measured steps, and of those of each alternative


@with_keywords(Pretrain, skip=("data", *NOT_PROFILED))
@threads.considerate()
def profile(
    data: object = None, json_file: str | None = None, measured_steps: int = 5, **settings: Unpack[RunArguments]
) -> dict[str, Any]:
    """Measures training steps on images, in one process; nothing is written but the report.

    Args:
        data: as for ``gtsa.pretrain``; None: the sample that comes with gtsa.
        json_file: file to write the report to.
        measured_steps: steps of each kind that are measured: whole ones, and ones split into phases.
        settings: as for ``gtsa.pretrain``; the batch size is that of this one process.

    Returns:
        The report, as in the file: phases in ms a step with their shares, bounds, and measured alternatives.

    Raises:
        UserError: as ``gtsa.pretrain``.
    """
    if measured_steps < 1:
        raise UserError(f"--measured-steps {measured_steps}: at least 1")
    if json_file:
        _refuse_unwritable(Path(json_file))
    if refused := [name for name in NOT_PROFILED if name in settings]:
        raise UserError(f"{', '.join(refused)}: not a setting of gtsa profile")
    given = {**settings, "plan": True, "devices": 1}
    requested = requested_settings(given if data is None else {"data": describe(data), **given})
    requested = requested.model_copy(update={"steps": "auto", "epochs": "auto", "out": None})
    resolved, initial = begin_plan(requested)
    fabric = launch_fabric(resolved.settings)
    if fabric.world_size > 1 or resolved.settings.devices > 1:
        raise UserError("gtsa profile measures one process; start it without torchrun")
    with open_run(resolved, fabric) as run:
        assert run is not None
        images = _list_images(requested.data if data is None else data, resolved, run)
        method, _ = build_method(resolved.settings, initial)
        parts = _Parts(resolved.settings, method.to(fabric.device), images, fabric)
        result = _measure(parts, measured_steps)
    profile_table.show(result)
    if json_file:
        _write(Path(json_file), result)
    return result


def _list_images(data: object, resolved: Plan[Pretrain], run: RunFolder) -> RunImages:
    """The images of the data, in the temporary folder ``run``, and the rest of the plan."""
    settings = resolved.settings
    listed = run_images.scan_images(data, settings.data, settings.selection, settings.max_bad)
    run.begin({files.IMAGES: listed[files.IMAGES], "scan.json": listed["scan.json"]})
    resolved.settle({}, hold_out=0)
    continue_plan(resolved, run_images.count_images(listed, settings.out))
    if is_auto(resolved.settings.accumulate):
        resolved.settle({}, accumulate=1)
    return RunImages(data, select(ImageSettings, resolved.settings), say)


@dataclass
class _Parts:
    """What steps are made of."""

    settings: Pretrain
    method: Method
    images: RunImages
    fabric: Fabric

    @property
    def views(self) -> ViewSet:
        return self.batches(self.settings).views()

    def batches(self, settings: Pretrain) -> Batches:
        return Batches(settings, self.images, self.method, self.fabric.device)

    def steps(self, watch: Stopwatch, halve: bool = False) -> Iterator[StepResult]:
        """Training steps from the middle of a run, in phases. ``halve``: with half of the local crops."""
        settings, fabric = self.settings, self.fabric
        first = SPAN // 2
        whole = self.batches(settings).prepare

        def prepare(views: Views) -> Views:
            return whole(_with_half_of_local_crops(views) if halve else views)

        optimizer = optimizer_of(self.method, settings)
        module, wrapped = fabric.setup(self.method, optimizer)
        step_phases.watch_engine(watch, fabric, wrapped)
        span = settings.model_copy(update={"steps": SPAN})
        if settings.workers:
            batches = step_phases.wait_for_batches(watch, iter(self.batches(span).from_step(first, fabric)))
        else:
            sampler = StepSampler(
                len(self.images.train), settings.batch_size, SPAN, first, accumulate=settings.accumulate
            )
            batches = step_phases.read_batches(watch, self.views, sampler)
        return fit(
            module, wrapped, batches, step_phases.watch_prepare(watch, prepare, fabric.device), fabric=fabric,
            steps=SPAN, start=first, accumulate=settings.accumulate, seed=settings.seed,
            compiled=settings.compile == "on", report=say,
        )  # fmt: skip


def _with_half_of_local_crops(views: Views) -> Views:
    local = views.local_crops
    assert local is not None
    return Views(views.global_crops, local.each(lambda tensor: tensor[:, : local.count // 2]), views.images)


def _measure(parts: _Parts, count: int) -> dict[str, Any]:
    settings, device = parts.settings, parts.fabric.device
    watch = Stopwatch(step_phases.device_clock(device))
    with doing("measuring the loader in one process"):
        loading = step_phases.loading_seconds(parts.views, settings.batch_size)
    with doing(f"measuring the matrix rate in {settings.precision}"):
        rates, flops = [machine.matrix_rate(settings.precision, device)], _flops(parts)
    step_phases.watch_method(watch, parts.method)
    steps = parts.steps(watch)
    with doing(f"measuring {2 * count} steps of {settings.model} on {device}, after {WARM_UP}"):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        for _ in range(WARM_UP):
            next(steps)
        plain, split = step_phases.watched_steps(steps, watch, count, LIMIT)
        count = len(split)
        rates.append(machine.matrix_rate(settings.precision, device))  # neighbours may have come or gone
    rate = statistics.fmean(rates)
    memory = machine.memory(device)
    step = statistics.median(plain)
    total = sum(watch.seconds.values())
    loads = sum(watch.seconds[name] for name in LOADING) / total
    views, batch = settings.views, settings.batch_size
    result: dict[str, Any] = {
        "device": device.type,
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "method": settings.method,
        "model": settings.model,
        "batch_size": batch,
        "accumulate": settings.accumulate,
        "precision": settings.precision,
        "compile": settings.compile,
        "workers": settings.workers,
        "views": [
            views.global_crops_number, views.global_crops_size, views.local_crops_number, views.local_crops_size,
        ],
        "measured_steps": count,
        "step_ms": 1000 * step,
        "split_step_ms": 1000 * statistics.fmean(split),
        "images_per_second": batch / step,
        "phases": [
            {
                "phase": name,
                "ms": 1000 * watch.seconds[name] / count,
                "share": watch.seconds[name] / total,
                "calls": watch.calls[name] / count,
            }
            for name in PHASES
            if watch.seconds[name] > 0
        ],
        "loading_share": loads,
        "loading_ms_per_image": {name: 1000 * seconds for name, seconds in loading.items()},
        "step_tflop": flops / 1e12,
        "matrix_tflops": rate / 1e12,
        "share_of_matrix_rate": flops / (step * (1 - loads)) / rate,
        "memory": memory,
    }  # fmt: skip
    return {**result, "trials": [*_trials(parts, steps, watch, profile_table.workers_needed(result))]}


def _trials(parts: _Parts, steps: Iterator[StepResult], watch: Stopwatch, workers: int) -> Iterator[dict[str, Any]]:
    """Other settings, each measured in turn with the given ones: the median of up to three steps."""
    settings, device = parts.settings, parts.fabric.device
    others: list[tuple[str, str, Pretrain, bool, float]] = []
    if settings.precision == "32" and machine.has_bf16(device):
        others.append(("--precision bf16", "", settings.model_copy(update={"precision": "bf16"}), False, 1.0))
    room = device.type == "cuda" and machine.memory(device)["share"] < 0.45
    if room and 2 * settings.batch_size <= len(parts.images.train):
        double = settings.model_copy(update={"batch_size": 2 * settings.batch_size})
        others.append((f"--batch-size {double.batch_size}", "it changes what is learnt", double, False, 2.0))
    if 0 < workers < cores():
        more = settings.model_copy(update={"workers": workers})
        others.append((f"--workers {workers}", "", more, False, 1.0))
    if settings.views.local_crops_number >= 4:
        half = settings.views.local_crops_number // 2
        others.append((f"--views.local-crops-number {half}", "it changes what is learnt", settings, True, 1.0))
    for flags, remark, changed, halve, images in others:
        with doing(f"measuring {flags}"):
            other = _Parts(changed, parts.method, parts.images, launch_fabric(changed)).steps(watch, halve)
            next(other)
            pairs = [(timed_step(steps, watch), timed_step(other, watch))]
            while len(pairs) < 3 and sum(map(sum, pairs)) < LIMIT / 2:
                pairs.append((timed_step(steps, watch), timed_step(other, watch)))
        given, new = (statistics.median(each) for each in zip(*pairs, strict=True))
        yield {"flags": flags, "ratio": images * given / new, "remark": remark}


def _flops(parts: _Parts) -> float:
    """Floating-point operations of the forward and backward passes of a step, counted on two images."""
    few = max(2, type(parts.method).min_images)
    views = parts.views.batch([Draw(0, index % len(parts.views)) for index in range(few)])
    prepared = parts.batches(parts.settings).prepare(views)
    parts.method.train()
    with FlopCounterMode(display=False) as counter:
        with parts.fabric.autocast():
            loss = parts.method(prepared, 0.5)["loss"]
        loss.backward()
    parts.method.zero_grad(set_to_none=True)
    return float(counter.get_total_flops() * parts.settings.batch_size / few)


def _refuse_unwritable(path: Path) -> None:
    """Raises UserError (6) before anything is measured."""
    try:
        files.check_writable(path)
    except OSError as error:
        raise _cannot_write(path, error) from None


def _write(path: Path, result: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.store(path, (json.dumps(result, indent=1) + "\n").encode())
    except OSError as error:
        raise _cannot_write(path, error) from None


def _cannot_write(path: Path, error: OSError) -> UserError:
    return UserError(f"--json {path} cannot be written: {error.strerror}; give another file", 6)
