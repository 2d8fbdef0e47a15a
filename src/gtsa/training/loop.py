"""The only training loop: time, gradients and the guard against non-finite numbers. It knows no method."""

from __future__ import annotations

import time as clock
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import numpy as np
import torch
from lightning_fabric import Fabric
from lightning_fabric.wrappers import _FabricModule, _FabricOptimizer
from torch import Tensor

from gtsa.core.errors import UserError, from_worker
from gtsa.core.types import Examples, Objective, StepResult, Views
from gtsa.training.optim import ScheduledAdamW, clip_each

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
) -> Iterator[StepResult]:
    """Trains from step ``start`` to ``steps``, and yields after every step: the caller logs, saves and evaluates there.

    Args:
        objective, optimizer: as set up by ``fabric``; the optimizer is a ScheduledAdamW inside.
        batches: micro-batches, ``accumulate`` per step, from step ``start`` on.
        prepare: brings a batch to the device, ready for the objective.
        seed: stochastic depth of step s depends on (seed, s, rank) alone.
        skips: the steps that were skipped lately, updated in place for the checkpoint.

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
        parts, _, lost = train_step(
            objective, optimizer, map(prepare, views), accumulate, fabric, step / steps, (step + 1) / steps
        )
        skipped = _check(pending, step - 1, skips)  # one step late, so that the host never waits for the device
        pending = lost, [int(i) for v in views for i in v.images]
        if step == steps - 1:
            skipped += _check(pending, step, skips)
        replaced = [r for v in views for r in v.replaced]
        yield StepResult(step + 1, parts, clock.perf_counter() - began, waited, replaced, skipped)


def train_step(
    objective: _FabricModule,
    optimizer: _FabricOptimizer,
    batches: Iterable[Batch],
    accumulate: int,
    fabric: Fabric,
    time: float,
    next_time: float,
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """One optimiser step at ``time``.

    Returns:
        The mean parts, detached; whether the step was accepted; whether it was lost to a non-finite number (0/1, on the
        device). It is neither if only the scaler of fp16 skipped it, to lower its scale.
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
        norms = clip_each(adamw.gradients, adamw.clip)
        wrong = torch.stack([~torch.isfinite(norms).all(), ~torch.isfinite(total["loss"])]).float()
        in_gradients, in_loss = cast(Tensor, fabric.all_reduce(wrong, reduce_op="sum")).clamp(max=1)
        rejected = torch.maximum(in_gradients, in_loss)
        adamw.found_inf = rejected  # where it is 1 the fused kernel changes no parameter and no moment
        if scaler is None:
            optimizer.step()
        else:  # the scaler's own step would overwrite found_inf
            adamw.step()
            scaler.update()
        optimizer.zero_grad()
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        raise UserError(
            f"the device ran out of memory in a step: {str(error).splitlines()[0]}; halve the memory with "
            f"--accumulate {2 * accumulate} (same results; of an evaluation it is --TASK.accumulate), or choose a "
            "smaller batch size or model",
            6,
        ) from None
    inner.after_step(time, next_time, 1 - rejected)
    total["gradient"] = norms.norm()
    return total, 1 - rejected, rejected if scaler is None else in_loss


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
