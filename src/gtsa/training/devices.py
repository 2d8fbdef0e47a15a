"""Devices, processes, precision and workers of a run, and what the first process does alone."""

from __future__ import annotations

import errno
import inspect
import logging
import os
import warnings
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies.ddp import DDPStrategy
from lightning_fabric.strategies.model_parallel import ModelParallelStrategy
from lightning_fabric.strategies.strategy import Strategy
from torch.nn.parallel import DistributedDataParallel

from gtsa.core.errors import UserError
from gtsa.core.processes import alone
from gtsa.core.settings import HasModelCopy, Plan, is_auto

PRECISIONS: dict[str, Any] = {"32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


class DeviceSettings(HasModelCopy, Protocol):
    """The settings of where something runs."""

    @property
    def device(self) -> str: ...
    @property
    def devices(self) -> int: ...
    @property
    def nodes(self) -> int: ...
    @property
    def precision(self) -> str: ...
    @property
    def workers(self) -> int: ...


D = TypeVar("D", bound=DeviceSettings)


def resolve_device(settings: D) -> Plan[D]:
    """Resolves device, processes and precision."""
    plan = Plan(settings, {})
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if settings.device == "cuda" and not gpus:
        raise UserError("--device cuda: no GPU is visible to PyTorch; leave it at auto, or repair the driver", 6)
    if settings.device == "auto":
        plan.settle({"device": f"{gpus} GPU(s) found" if gpus else "no GPU found"}, device="cuda" if gpus else "cpu")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        local, world = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
        plan.settle({"devices": "as torchrun started them"}, devices=local, nodes=world // local)
    elif settings.nodes > 1:
        raise UserError(
            f"--nodes {settings.nodes}: start every machine with torchrun --nnodes={settings.nodes} "
            "--nproc-per-node=GPUS --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 -m gtsa pretrain ..."
        )
    elif is_auto(settings.devices):
        plan.settle({"devices": "all GPUs" if gpus else "one process uses all cores"}, devices=max(1, gpus))
    device = plan.settings.device
    if settings.precision == "auto":
        half = device == "cuda" and torch.cuda.is_bf16_supported()
        plan.settle(
            {"precision": "the GPU supports it" if half else "exact and safe"}, precision="bf16" if half else "32"
        )
    if device == "cpu" and settings.precision == "fp16":
        raise UserError("--precision fp16 needs a GPU; on a CPU choose bf16 or 32")
    return plan


def check_shard(settings: DeviceSettings) -> None:
    """Raises UserError where --shard cannot be used (2)."""
    if settings.devices * settings.nodes == 1:
        raise UserError(
            "--shard spreads the weights over several processes, and this run has one: give --devices N, start it with "
            "torchrun --nproc-per-node=N -m gtsa pretrain ..., or leave --shard out"
        )
    if settings.precision == "fp16":
        raise UserError("--shard: the scaler of fp16 does not see all shards; choose --precision bf16 or 32")


def launch_fabric(settings: DeviceSettings, shard: bool = False) -> Fabric:
    """The engine for these settings, launched. With ``shard`` it expects modules that ``sharding.shard`` has spread."""
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # it would repeat the plan
    world = settings.devices * settings.nodes
    if world > 1:
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")  # costs a copy, no accuracy
    fabric = Fabric(
        accelerator="cuda" if settings.device == "cuda" else "cpu",
        devices=settings.devices,
        num_nodes=settings.nodes,
        strategy=_strategy(world, shard) if world > 1 else "auto",
        precision=PRECISIONS[settings.precision],
    )
    if world > 1:
        fabric.launch()
    return fabric


def _strategy(world: int, shard: bool) -> Strategy:
    """How gradients are averaged over ``world`` processes."""
    if shard:
        return ModelParallelStrategy(lambda module, _: module, data_parallel_size=world, tensor_parallel_size=1)
    # Gradients lie in the buckets that are sent. Buffers are equal already: methods compute them from what all know.
    known = inspect.signature(DistributedDataParallel).parameters  # PyTorch 2.14 has renamed it
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {"gradient_as_bucket_view": True, buffers: False}
    return DDPStrategy(**options)


def resolve_workers(plan: Plan[D]) -> None:
    """Resolves the processes that read images."""
    settings = plan.settings
    if not is_auto(settings.workers):
        return
    if settings.device == "cuda":
        count, reason = readers(settings.devices), f"{cores()} cores, one left for each device"
    else:
        count, reason = (
            (0, "images are read between steps: all cores train") if cores() <= 4 else (2, f"{cores()} cores")
        )
    plan.settle({"workers": reason}, workers=count)


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def readers(runs: int) -> int:
    """Number of processes that read images, for each of ``runs`` concurrent runs on this machine's GPUs."""
    return max(1, min(16, cores() // runs - 1))


T = TypeVar("T")


def on_rank_zero(fabric: Fabric, work: Callable[[], T]) -> T | None:
    """The result of ``work`` in the first process, None in others. A UserError or disk error there ends them all."""
    result, failure = None, None
    if fabric.global_rank == 0:
        try:
            with alone():
                result = work()
        except (UserError, OSError) as caught:
            error = caught if isinstance(caught, UserError) else disk_error(caught, "the disk")
            failure = str(error), error.code
    failure = fabric.broadcast(failure)
    if failure is not None:
        raise UserError(*failure)
    return result


def disk_error(error: OSError, out: str) -> UserError:
    """The error that tells the user what to do about a file or disk."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    action = "make room" if full else "restore it" if error.errno == errno.ENOENT else "repair it"
    return UserError(f"{error.filename or out}: {error.strerror or error}; {action}, then resume with --resume", 6)
