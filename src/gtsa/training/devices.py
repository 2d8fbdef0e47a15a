"""Devices, processes, precision and workers of a run, and what the first process does alone."""

from __future__ import annotations

import errno
import logging
import os
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from lightning_fabric import Fabric

from gtsa.core.errors import UserError
from gtsa.core.settings import Plan

PRECISIONS: dict[str, Any] = {"32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


def resolve_device(settings: Any) -> Plan:
    """Resolves device, processes and precision."""
    plan = Plan(settings, {})
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if settings.device == "cuda" and not gpus:
        raise UserError("--device cuda: no GPU is visible to PyTorch; leave it at auto, or mend the driver", 6)
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
    elif settings.devices == "auto":
        plan.settle({"devices": "all GPUs" if gpus else "one process uses all cores"}, devices=max(1, gpus))
    on = plan.settings.device
    if settings.precision == "auto":
        half = on == "cuda" and torch.cuda.is_bf16_supported()
        plan.settle({"precision": "the GPU has it" if half else "exact and safe"}, precision="bf16" if half else "32")
    if on == "cpu" and settings.precision == "fp16":
        raise UserError("--precision fp16 needs a GPU; on CPU take bf16 or 32")
    return plan


def launch_fabric(settings: Any) -> Fabric:
    """The engine that the settings ask for, launched."""
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # it tells what the plan tells
    world = settings.devices * settings.nodes
    if world > 1:
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")  # costs a copy, no accuracy
    fabric = Fabric(
        accelerator="cuda" if settings.device == "cuda" else "cpu",
        devices=settings.devices,
        num_nodes=settings.nodes,
        strategy="ddp" if world > 1 else "auto",
        precision=PRECISIONS[settings.precision],
    )
    if world > 1:
        fabric.launch()
    return fabric


def resolve_workers(plan: Plan) -> None:
    """Resolves the processes that read images."""
    s = plan.settings
    if s.workers == "auto":
        if s.device == "cuda":
            count, why = readers(s.devices), f"{cores()} cores, one left for each device"
        else:
            count, why = (0, "the cores are busy with training") if cores() <= 4 else (2, f"{cores()} cores")
        plan.settle({"workers": why}, workers=count)


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def readers(runs: int) -> int:
    """Processes that read images for each of ``runs`` on GPUs of this machine, at the same time."""
    return max(1, min(16, cores() // runs - 1))


T = TypeVar("T")


def on_rank_zero(fabric: Fabric, work: Callable[[], T]) -> T | None:
    """``work`` done by the first process alone; a UserError there ends all of them, and so does a disk that refuses."""
    done, told = None, None
    if fabric.global_rank == 0:
        try:
            done = work()
        except (UserError, OSError) as error:
            remedy = error if isinstance(error, UserError) else disk_error(error, "the disk")
            told = str(remedy), remedy.code
    told = fabric.broadcast(told)
    if told is not None:
        raise UserError(*told)
    return done


def disk_error(error: OSError, out: str) -> UserError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    way = "make room" if full else "bring it back" if error.errno == errno.ENOENT else "mend it"
    return UserError(f"{error.filename or out}: {error.strerror or error}; {way}, then go on with --resume", 6)
