"""The only training loop: time, gradients and the guard against non-finite numbers. It knows no method."""

from __future__ import annotations

import time as clock
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from lightning_fabric import Fabric
from lightning_fabric.wrappers import _FabricModule, _FabricOptimizer
from torch import Tensor

from gtsa.core.compilation import compiling
from gtsa.core.errors import UserError, from_worker
from gtsa.core.types import Examples, Objective, StepResult, Views
from gtsa.training.devices import is_out_of_memory
from gtsa.training.optim import ScheduledAdamW, clip_each, gradient_norms

Batch = Views | Examples
PATIENCE = 3  # skipped steps among the last hundred that end the run


def fit(
    objective: _FabricModule,
    optimizer: _FabricOptimizer,
    batches: Iterable[Batch],
    prepare: Callable[[Any], Any],
    *,
    fabric: Fabric,
    steps: int,
    start: int = 0,
    accumulate: int = 1,
    seed: int = 0,
    skips: deque[int] | None = None,
    compiled: bool = False,
    report: Callable[[str], object] = print,
    stopping: Callable[[], bool] = bool,
) -> Iterator[StepResult]:
    """Trains from step ``start`` to ``steps``, and yields after every step: the caller logs, saves and evaluates there.

    Args:
        objective, optimizer: as set up by ``fabric``; the optimizer is a ScheduledAdamW inside.
        batches: micro-batches, ``accumulate`` per step, from step ``start`` on.
        prepare: brings a batch to the device, ready for the objective.
        seed: stochastic depth of step s depends on (seed, s, rank) alone.
        skips: the steps that were skipped lately, updated in place for the checkpoint.
        compiled: compile the functions that are marked for it; ``report`` is called with a line for each that fails.
        stopping: whether this process has a request to stop; of several processes every result says what all have.

    Raises:
        UserError: three of a hundred steps had non-finite numbers (5), memory ran out or a worker failed (6).
    """
    skips = deque() if skips is None else skips
    pending: tuple[Tensor, list[int]] | None = None
    stream = iter(batches)
    objective.train()
    for step in range(start, steps):
        began = clock.perf_counter()
        views = [_next(stream) for _ in range(accumulate)]
        waited = clock.perf_counter() - began
        torch.manual_seed(int(np.random.SeedSequence([seed, step, fabric.global_rank]).generate_state(1, np.uint64)[0]))
        replaced = [r for v in views for r in v.replaced]
        with compiling(compiled, report):
            parts, _, lost, shared = train_step(
                objective, optimizer, map(prepare, views), accumulate, fabric, step / steps, (step + 1) / steps,
                partial(_flags, stopping, bool(replaced)),
            )  # fmt: skip
        skipped = _check(pending, step - 1, skips)  # one step late, so that the host never waits for the device
        pending = lost, [int(i) for v in views for i in v.images]
        if step == steps - 1:
            skipped += _check(pending, step, skips)
        yield StepResult(step + 1, parts, clock.perf_counter() - began, waited, replaced, skipped, shared)


def train_step(
    objective: _FabricModule,
    optimizer: _FabricOptimizer,
    batches: Iterable[Batch],
    accumulate: int,
    fabric: Fabric,
    time: float,
    next_time: float,
    flags: Callable[[], tuple[bool, ...]] = tuple,
) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor | None]:
    """One optimiser step at ``time``.

    Args:
        flags: what else all processes are to know of one another; called after the backward pass.

    Returns:
        The mean parts, detached; whether the step was accepted; whether it was lost to a non-finite number (0/1, on the
        device); of several processes, how many have each flag. A step is neither accepted nor lost if only the scaler
        of fp16 skipped it, to lower its scale.
    """
    adamw, inner = cast(ScheduledAdamW, optimizer.optimizer), cast(Objective, objective.module)
    adamw.set_time(time)
    total: dict[str, Tensor] = {}
    try:
        for micro, views in enumerate(batches):
            with fabric.no_backward_sync(objective, enabled=micro < accumulate - 1):
                parts = objective(views, time)
                fabric.backward(parts["loss"] / accumulate)
            for name, value in parts.items():
                total[name] = total.get(name, 0) + value.detach() / accumulate
        scaler = getattr(fabric.strategy.precision, "scaler", None)
        if scaler is not None:
            scaler.unscale_(adamw)
        total, norms, shared = _agree(total, gradient_norms(adamw.gradients), flags(), adamw.sharded, fabric)
        clip_each(adamw.gradients, adamw.clip, norms)
        in_gradients, in_loss = (~torch.isfinite(norms).all()).float(), (~torch.isfinite(total["loss"])).float()
        rejected = torch.maximum(in_gradients, in_loss)
        adamw.found_inf = rejected  # where it is 1 the fused kernel changes no parameter and no moment
        if scaler is None:
            optimizer.step()
        else:  # the scaler's own step would overwrite found_inf
            adamw.step()
            scaler.update()
        optimizer.zero_grad()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"the device ran out of memory in a step: {str(error).splitlines()[0]}; halve the memory with "
            f"--accumulate {2 * accumulate} (the same loss; of an evaluation it is --TASK.accumulate), or choose a "
            "smaller batch size or model",
            6,
        ) from None
    inner.after_step(time, next_time, 1 - rejected)
    total["gradient"] = norms.norm()
    return total, 1 - rejected, rejected if scaler is None else in_loss, shared


def _flags(stopping: Callable[[], bool], replaced: bool) -> tuple[bool, ...]:
    return stopping(), replaced


def _agree(
    parts: dict[str, Tensor], norms: Tensor, flags: tuple[bool, ...], sharded: bool, fabric: Fabric
) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
    """What all processes must know alike before the optimiser's step, in one all-reduce.

    Args:
        parts: means over this process's part of the batch.
        norms: [P] of the gradients. They are means over the processes, equal everywhere, unless they are ``sharded``.

    Returns:
        The parts as means over the whole batch; the norms over all shards; of several processes, how many have each
        flag.
    """
    if fabric.world_size == 1:
        return parts, norms, None
    means = torch.stack([part.float() for part in parts.values()]) / fabric.world_size
    squares = norms.double().square() if sharded else norms[:0]  # float64: they must not overflow
    sums = torch.cat([means, *(means.new_full((1,), float(flag)) for flag in flags), squares])
    torch.distributed.all_reduce(sums)
    means, shared, squares = torch.split(sums, [len(means), len(flags), len(squares)])
    return dict(zip(parts, means.float(), strict=True)), squares.sqrt().to(norms.dtype) if sharded else norms, shared


def _next(stream: Iterator[Batch]) -> Batch:
    try:
        return next(stream)
    except UserError as error:
        raise from_worker(error) from None
    except RuntimeError as error:
        if "DataLoader" in str(error):
            raise UserError(
                f"a data worker failed: {str(error).splitlines()[0]}; resume with --resume, and if it happens again "
                "use fewer --workers (each needs memory for a few batches)",
                6,
            ) from None
        raise


def _check(pending: tuple[Tensor, list[int]] | None, step: int, skips: deque[int]) -> list[int]:
    """The images of the step, if it was skipped. Raises UserError at three skipped steps in a hundred."""
    if pending is None or not bool(pending[0] > 0):
        return []
    skips.append(step)
    while skips[0] <= step - 100:
        skips.popleft()
    if len(skips) >= PATIENCE:
        raise UserError(
            f"training diverged: non-finite loss or gradients in steps {', '.join(map(str, skips))}; these steps "
            "did not change the weights. Resume with a lower --learning-rate as a new run (--init), or --precision 32",
            5,
        )
    return pending[1]
