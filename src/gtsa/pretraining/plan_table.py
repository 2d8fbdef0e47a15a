"""The plan as the user sees it: every setting with its reason, then time, memory and disk."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from gtsa.core.errors import UserError
from gtsa.core.settings import Plan
from gtsa.core.terminal import gib, lasting, say, table
from gtsa.core.types import Method
from gtsa.data.sources import ALL
from gtsa.models.backbone import patch_of
from gtsa.pretraining.cost import LONG, Cost, cheaper
from gtsa.pretraining.plan import steps_done
from gtsa.pretraining.settings import Pretrain
from gtsa.training import threads


def show(
    plan: Plan[Pretrain], cost: Cost, method: Method, train: int, held_out: int, loaded: str, disk: Path, deep: bool
) -> list[tuple[str, Any, str]]:
    """Prints the plan and returns its rows: name, value, reason.

    Raises UserError where the disk has no room for the checkpoints (6).

    Args:
        train, held_out: numbers of images.
        loaded: how many initial weights were loaded; empty without --init.
        disk: a folder on the disk of the run.
        deep: whether there are images of 16 bits.
    """
    settings = plan.settings
    size = sum(tensor.nbytes for tensor in method.state_dict().values())
    trained = sum(p.nbytes for p in method.parameters() if p.requires_grad)
    needed, free = (settings.keep_checkpoints + 1) * (size + 2 * trained), shutil.disk_usage(disk).free
    if needed > free:
        raise UserError(f"--out {settings.out}: {gib(needed)} are needed for checkpoints, {gib(free)} are free", 6)
    done = steps_done(settings)
    weights = sum(p.numel() for p in method.encoders["student"].parameters())
    seconds = cost.run(settings, done or 0)
    per_device = settings.batch_size // (settings.devices * settings.nodes)
    used = gib(cost.fixed(settings) + cost.bytes_image * per_device // settings.accumulate)
    rows = [
        *_rows(plan, done, train, held_out, weights, loaded, deep),
        ("time", f"about {lasting(seconds)}", _time_remark(settings, cost, done)),
        ("memory", used, "weights and one micro-batch"),
        ("disk", gib(needed), f"{settings.keep_checkpoints} checkpoints and one being written; {gib(free)} free"),
    ]
    table("plan", rows)
    if seconds > LONG and settings.device == "cpu" and done is None:
        say(f"this is long for a CPU. Faster settings, each added to those before it, until at most {LONG // 3600} h:")
        for flags, takes in cheaper(settings, cost, weights):
            say(f"  {flags}: {takes}")
    return rows


def _rows(
    plan: Plan[Pretrain], done: int | None, train: int, held_out: int, weights: int, loaded: str, deep: bool
) -> list[tuple[str, Any, str]]:
    """Rows of settings: (name, value, reason)."""
    settings, views = plan.settings, plan.settings.views

    def why(name: str, default: str = "") -> str:
        return plan.reasons.get(name, default or ("" if done is None else "as when the run began"))

    held = f"{held_out} more held out for the verdict" if held_out else why("hold_out", "none held out")
    globals_ = f"{views.global_crops_number} x {views.global_crops_size}"
    locals_ = f"{views.local_crops_number} x {views.local_crops_size}"
    epochs = settings.steps * settings.batch_size / train
    device = f"{settings.devices * settings.nodes} x {settings.device}, precision {settings.precision}"
    device += ", sharded" if settings.shard else ""
    evaluations = f"{settings.evaluate_images} images, every {settings.evaluate_every:,} steps"
    weights_from = "weights as above" if loaded else "random weights"
    own = settings.patch_size == patch_of(settings.model)
    patches = "" if own else f"patches of {settings.patch_size} px, "
    return [
        ("images", f"{train:,}", held),
        *(_range16(settings, why("range16")) if deep or settings.range16 != ALL.range16 else []),
        ("model", f"{settings.model}, {patches}{weights / 1e6:.1f} M parameters", weights_from),
        *(_adaptation(settings, why("adaptation")) if loaded else []),
        ("method", settings.method, why("method")),
        ("views", f"{globals_} + {locals_} px", why("views")),
        ("batch size", settings.batch_size, why("batch_size")),
        ("micro-batches", settings.accumulate, why("accumulate")),
        ("steps", f"{settings.steps:,} ({epochs:,.1f} epochs)", why("steps")),
        ("learning rate", f"{settings.learning_rate:g}", why("learning_rate")),
        ("evaluations", evaluations, why("evaluate_images")),
        ("device", device, why("device")),
        ("compile", settings.compile, why("compile")),
        ("threads", torch.get_num_threads(), threads.wait_policy()),
        ("workers", settings.workers, why("workers")),
    ]


def _time_remark(settings: Pretrain, cost: Cost, done: int | None) -> str:
    """What the time includes."""
    remark = f"steps of {brief(cost.step(settings))}, as measured now; includes loading and evaluations"
    remark += f", {done:,} steps are done" if done else ""
    return f"{remark}; --eval is not included" if settings.eval else remark


def brief(seconds: float) -> str:
    """Seconds with two digits, or in words."""
    return f"{seconds:.2g} s" if seconds < 10 else lasting(seconds)


def _range16(settings: Pretrain, reason: str) -> list[tuple[str, str, str]]:
    """Row: how values of 16-bit images are read."""
    black, white = settings.range16
    return [("16-bit values", f"{black:g} to {white:g}, black to white", reason)]


def _adaptation(settings: Pretrain, reason: str) -> list[tuple[str, str, str]]:
    """Rows: how initial weights are trained, and what is exported."""
    frozen = f"frozen for {round(settings.freeze_encoder * settings.steps):,} steps"
    exported = f"the best network by {settings.keep_best}" if settings.keep_best else "the last network"
    return [
        ("encoder", f"{frozen}, then rate x {settings.encoder_lr_scale:g}", reason),
        ("layer decay", f"{settings.layer_decay:g} per block below", ""),
        ("Gram weight", f"{settings.gram_weight:g}", ""),
        ("export", exported, ""),
    ]
