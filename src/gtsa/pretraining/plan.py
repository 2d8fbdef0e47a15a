"""The plan: every ``auto`` resolved, with its reason, before anything is trained."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from gtsa.core.errors import UserError
from gtsa.core.settings import Plan, is_auto
from gtsa.core.terminal import gib, lasting, say, table
from gtsa.core.types import Method
from gtsa.models.backbone import patch_of
from gtsa.pretraining.cost import LONG, Cost, cheaper
from gtsa.pretraining.settings import Pretrain
from gtsa.training import checkpoint, threads
from gtsa.training.devices import resolve_workers

FEWEST_STEPS = 1_000
SMALLEST_BATCH = 8  # that we choose
MODEL = "vit_small_patch16_224"
GENTLE = {"freeze_encoder": 0.1, "encoder_lr_scale": 0.1, "layer_decay": 0.75, "gram_weight": 1.0}  # see LOG.md
FROM_SCRATCH = {"freeze_encoder": 0.0, "encoder_lr_scale": 1.0, "layer_decay": 1.0, "gram_weight": 0.0}
PUBLISHED = {"epochs": 100, "batch": 512, "global": 224, "local": 96}


def start(plan: Plan[Pretrain], loaded: str | None) -> None:
    """Resolves the model, and how gently it goes on from weights.

    Args:
        loaded: the model that --init is of; None: it starts untrained.
    """
    s = plan.settings
    if s.model == "auto":
        plan.settle({}, model=loaded or MODEL)
    usual = GENTLE if loaded else FROM_SCRATCH
    left = {name: value for name, value in usual.items() if is_auto(getattr(s, name))}
    told = f"{', '.join(name.replace('_', ' ') for name in left)}: the preset for weights to start from"
    plan.settle({"adaptation": told} if left else {}, **left)
    if loaded and s.eval and not s.keep_best:
        plan.settle({}, keep_best=s.eval[0])


def sizes(plan: Plan[Pretrain]) -> None:
    """Resolves crop sizes to multiples of the model's patch. Raises UserError where a given one is none."""
    patch, views = patch_of(plan.settings.model), plan.settings.views
    chosen, problems = {}, []
    for name in ("global", "local"):
        given = getattr(views, f"{name}_crops_size")
        if is_auto(given):
            chosen[f"{name}_crops_size"] = max(1, round(PUBLISHED[name] / patch)) * patch
            plan.reasons["views"] = f"as published, in whole patches of {patch} px"
        elif given % patch or given < 2 * patch:
            near = max(2, given // patch) * patch
            problems.append(
                f"--views.{name}-crops-size {given} does not suit {plan.settings.model}, whose patch is {patch} px: "
                f"take {near} or {near + patch}"
            )
    if problems:
        raise UserError("\n".join(problems))
    plan.settle({}, views=views.model_copy(update=chosen))


def method(plan: Plan[Pretrain], sized: Mapping[str, Callable[[int], Any]], images: int) -> None:
    """Resolves the settings of the method that follow from the number of images."""
    name = plan.settings.method
    section = getattr(plan.settings, name)
    found = {key: rule(images) for key, rule in sized.items() if is_auto(getattr(section, key))}
    if found:
        told = ", ".join(f"{key.replace('_', ' ')} {_number(value)}" for key, value in found.items())
        plan.settle({"method": f"{told} suit {images:,} images"}, **{name: section.model_copy(update=found)})


def _number(value: Any) -> str:
    return " to ".join(dict.fromkeys(f"{number:,}" for number in (value if isinstance(value, tuple) else (value,))))


def hold_out(plan: Plan[Pretrain], images: int) -> None:
    """Resolves how many images are left out of training."""
    given = plan.settings.hold_out
    if is_auto(given):
        count = min(64, images // 10) if images >= 20 else 0
        why = "a tenth, at most 64" if count else "too few to spare any: the verdict is about training images"
        plan.settle({"hold_out": why}, hold_out=count)
    elif given >= images:
        raise UserError(f"--hold-out {given} leaves nothing of {images} images to train on", 2)


def budget(plan: Plan[Pretrain], images: int, base: float = 5e-4) -> None:
    """Resolves batch, steps, learning rate and intervals for ``images`` training images.

    Args:
        base: the method's published learning rate for a batch of 256.
    """
    s = plan.settings
    ranks = s.devices * s.nodes
    if is_auto(s.batch_size):
        eighth = min(PUBLISHED["batch"], max(SMALLEST_BATCH, images // 8 // 8 * 8))
        batch = max(1, eighth // ranks) * ranks
        plan.settle({"batch_size": f"an eighth of {images:,} images, from 8 to 512"}, batch_size=batch)
    batch = plan.settings.batch_size
    if batch > images:
        _repeated(plan, batch, images, ranks)
    if batch < ranks:
        raise UserError(f"--batch-size {batch} is too small for {ranks} processes; give at least {ranks}")
    if is_auto(s.steps):
        if is_auto(s.epochs):
            published = -(-int(PUBLISHED["epochs"]) * images // batch)
            why = "100 epochs, as published" if published >= FEWEST_STEPS else "the fewest that teach anything"
            plan.settle({"steps": why}, steps=max(FEWEST_STEPS, published))
        else:
            plan.settle({"steps": f"{s.epochs} epochs"}, steps=max(1, round(s.epochs * images / batch)))
        plan.settle({}, epochs="auto")
    if is_auto(s.learning_rate):
        share = batch / 256
        rate = float(f"{base * (share if share >= 1 else share**0.5):.3g}")
        why = f"{base:g} x batch / 256, as published"
        if share < 1:
            why = f"{base:g} x root of batch / 256: small batches need more"
        plan.settle({"learning_rate": why}, learning_rate=rate)
    steps = plan.settings.steps
    if is_auto(s.checkpoint_every):
        plan.settle(
            {"checkpoint_every": "about twenty, at most 1,000 steps apart"},
            checkpoint_every=min(1000, max(10, steps // 20)),
        )
    if is_auto(s.evaluate_every):
        told = "ten in the run, at least 50 steps apart"
        plan.settle({"evaluate_every": told}, evaluate_every=max(50, steps // 10))
    resolve_workers(plan)


def _repeated(plan: Plan[Pretrain], batch: int, images: int, ranks: int) -> None:
    """Says that a step sees images more than once. Raises UserError where it would see them more than twice."""
    largest = max(1, images // ranks) * ranks
    if batch > max(2 * images, SMALLEST_BATCH) and _done(plan.settings) is None:
        raise UserError(
            f"--batch-size {batch}: there are {images:,} images to train on, and every step would repeat each of them "
            f"{batch / images:.1f} times; take at most {largest}, or leave it to us"
        )
    plan.settle({"batch_size": f"more than the {images:,} images: a step repeats some; {largest} would not"})


def memory(plan: Plan[Pretrain], cost: Cost, free: int) -> None:
    """Resolves the number of micro-batches so that a step fits into ``free`` bytes."""
    s = plan.settings
    ranks = s.devices * s.nodes
    if is_auto(s.accumulate):
        fitting = max(1, int((0.7 * free - cost.bytes_fixed) / max(1, cost.bytes_image)))
        each = s.batch_size // ranks
        parts = next(n for n in range(1, each + 1) if each % n == 0 and (each // n <= fitting or n == each))
        plan.settle({"accumulate": f"{gib(free)} of memory free" if parts > 1 else "a step fits"}, accumulate=parts)


def show(plan: Plan[Pretrain], cost: Cost, method: Method, train: int, held_out: int, loaded: str, disk: Path) -> None:
    """Prints the plan. Raises UserError where the disk has no room for its checkpoints (6).

    Args:
        disk: a folder on the disk of the run.
    """
    s = plan.settings
    done = _done(s)

    def why(name: str, otherwise: str = "") -> str:
        return plan.reasons.get(name, otherwise or ("" if done is None else "as the run began"))

    encoder = method.encoders["student"]
    size = sum(p.nbytes for p in method.parameters())
    needed = (s.keep_checkpoints + 1) * (size + 2 * sum(p.nbytes for p in method.parameters() if p.requires_grad))
    free = shutil.disk_usage(disk).free
    if needed > free:
        raise UserError(f"--out {s.out}: {gib(needed)} are needed for checkpoints, {gib(free)} are free", 6)
    each = s.batch_size // (s.devices * s.nodes)
    v, held = s.views, f"{held_out} more held out to judge by" if held_out else why("hold_out", "none held out")
    weights = sum(p.numel() for p in encoder.parameters())
    views = f"{v.global_crops_number} x {v.global_crops_size} + {v.local_crops_number} x {v.local_crops_size} px"
    seconds = cost.run(s, held_out or min(64, train), done or 0)
    rows = [
        ("images", f"{train:,}", held),
        ("model", f"{s.model}, {weights / 1e6:.1f} M parameters", "weights as above" if loaded else "untrained"),
        *([("adaptation", _gently(s), why("adaptation"))] if loaded else []),
        ("method", s.method, why("method")),
        ("views", views, why("views")),
        ("batch size", s.batch_size, why("batch_size")),
        ("micro-batches", s.accumulate, why("accumulate")),
        ("steps", f"{s.steps:,} ({s.steps * s.batch_size / train:,.1f} epochs)", why("steps")),
        ("learning rate", f"{s.learning_rate:g}", why("learning_rate")),
        ("device", f"{s.devices * s.nodes} x {s.device}, precision {s.precision}", why("device")),
        ("threads", torch.get_num_threads(), threads.described()),
        ("workers", s.workers, why("workers")),
        ("time", f"about {lasting(seconds)}", _of_time(s, cost, done)),
        ("memory", gib(cost.bytes_fixed + cost.bytes_image * each // s.accumulate), "weights and one micro-batch"),
        ("disk", gib(needed), f"{s.keep_checkpoints} checkpoints and one being written; {gib(free)} free"),
    ]
    table("plan", rows)
    if seconds > LONG and s.device == "cpu" and done is None:
        say(f"this is long for a CPU; what takes less, each on top of the one before (at most {LONG // 3600} h):")
        for flags, takes in cheaper(s, cost, weights, held_out or min(64, train)):
            say(f"  {flags}: {takes}")


def _done(s: Pretrain) -> int | None:
    """Steps that a run has done which goes on; None: it begins."""
    places = filter(checkpoint.is_ours, checkpoint.listing(Path(s.out, "checkpoints"))) if s.resume else iter(())
    newest = next(places, None)
    return None if newest is None else int(newest.name.removeprefix("step-"))


def _of_time(s: Pretrain, cost: Cost, done: int | None) -> str:
    """What the time is of."""
    told = f"steps of {brief(cost.step(s))}, as measured now; with loading and looks"
    told += f", {done:,} steps are done" if done else ""
    return f"{told}; --eval comes on top" if s.eval else told


def brief(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 10 else lasting(seconds)


def _gently(s: Pretrain) -> str:
    """How weights to start from are gone on with."""
    frozen = f"encoder frozen for {round(s.freeze_encoder * s.steps):,} steps, then {s.encoder_lr_scale:g} of the rate"
    gram = f"Gram weight {s.gram_weight:g}; best by {s.keep_best or 'nothing'}"
    return f"{frozen}, {s.layer_decay:g} of that a block below; {gram}"
