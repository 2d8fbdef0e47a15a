"""The plan: every ``auto`` is resolved, with a reason, before training starts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gtsa.core import compilation
from gtsa.core.errors import UserError
from gtsa.core.settings import Plan, is_auto
from gtsa.core.terminal import lasting, times
from gtsa.data.images.pixels import Range
from gtsa.models.backbone import patch_of
from gtsa.models.transform import FULL_RANGE
from gtsa.pretraining.cost import Cost
from gtsa.pretraining.settings import METHODS, Pretrain
from gtsa.pretraining.verdict import usual_images
from gtsa.training import checkpoint
from gtsa.training.devices import cores, resolve_workers

FEWEST_STEPS = 1_000  # of a run whose length is auto
SPARE = 1.25  # workers' speed over that of the step
EVALUATION_SHARE = 0.1  # of the training steps' time, for all evaluations of a run
EVALUATION_SECONDS = 10.0  # that an evaluation may take in any case
FEWEST_EVALUATED = 8  # images: fewer give no interval worth its name
SMALLEST_BATCH = 8  # of a run whose batch size is auto
MODEL = "vit_small_patch16_224"
GENTLE = {"freeze_encoder": 0.1, "encoder_lr_scale": 0.1, "layer_decay": 0.75, "gram_weight": 1.0}  # for --init: LOG.md
FROM_SCRATCH = {"freeze_encoder": 0.0, "encoder_lr_scale": 1.0, "layer_decay": 1.0, "gram_weight": 0.0}
PUBLISHED = {"epochs": 100, "batch": 512, "global": 224, "local": 96}


def resolve_initial(plan: Plan[Pretrain], loaded: str | None, range16: Range = FULL_RANGE, patch: int = 0) -> None:
    """Resolves the model, the range of 16-bit images, and the settings of training from initial weights.

    Args:
        loaded: the model of the initial weights; None without --init.
        range16: of the images that the initial weights were trained on.
        patch: side of the initial weights' patches, px; 0: the model's own.

    Raises:
        UserError: the given patch size is not that of the initial weights (2).
    """
    settings = plan.settings
    if loaded:
        _resolve_patch(plan, patch or patch_of(loaded))
    if is_auto(settings.range16):
        reason = f"as in the training of {settings.init}" if range16 != FULL_RANGE else "all values of 16 bits"
        plan.settle({"range16": reason}, range16=range16)
    if settings.model == "auto":
        plan.settle({}, model=loaded or MODEL)
    preset = GENTLE if loaded else FROM_SCRATCH
    chosen = {name: value for name, value in preset.items() if is_auto(getattr(settings, name))}
    reason = "preset for initial weights"
    if len(chosen) < len(preset):
        reason += f": {', '.join(name.replace('_', ' ') for name in chosen)}"
    plan.settle({"adaptation": reason} if chosen else {}, **chosen)
    if loaded and settings.eval and not settings.keep_best:
        plan.settle({}, keep_best=settings.eval[0])


def _resolve_patch(plan: Plan[Pretrain], patch: int) -> None:
    given = plan.settings.patch_size
    if not is_auto(given) and given != patch:
        raise UserError(f"--patch-size {given}: the weights of --init have patches of {patch} px; leave it out")
    plan.settle({}, patch_size=patch)


def check_batch(settings: Pretrain) -> None:
    """Raises UserError (2) where a given batch does not divide over the processes and micro-batches of a step."""
    unit = _unit_of(settings)
    if is_auto(settings.batch_size) or settings.batch_size % unit == 0:
        return
    ranks = settings.devices * settings.nodes
    parts, below = unit // ranks, settings.batch_size // unit * unit
    over = [f"{ranks} processes"] * (ranks > 1) + [f"{parts} micro-batches"] * (parts > 1)
    action = f"give {' or '.join(str(size) for size in (below, below + unit) if size)}"
    if steps_done(settings) is not None:  # the batch of a run stays
        action = f"resume with another number of {' or '.join(word.split()[1] for word in over)}"
    raise UserError(f"--batch-size {settings.batch_size} does not divide over {' x '.join(over)}; {action}")


def _unit_of(settings: Pretrain) -> int:
    """A batch is a multiple of this number of images: one for each process and each given micro-batch."""
    parts = 1 if is_auto(settings.accumulate) else settings.accumulate
    return settings.devices * settings.nodes * parts


def resolve_sizes(plan: Plan[Pretrain]) -> None:
    """Resolves crop sizes to multiples of the patch size. Raises UserError where a given size is not a multiple."""
    if is_auto(plan.settings.patch_size):
        plan.settle({}, patch_size=patch_of(plan.settings.model))
    patch, views = plan.settings.patch_size, plan.settings.views
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
                f"choose {near} or {near + patch}"
            )
    if problems:
        raise UserError("\n".join(problems))
    plan.settle({}, views=views.model_copy(update=chosen))


def resolve_method(plan: Plan[Pretrain], rules: Mapping[str, Callable[[int], Any]], images: int) -> None:
    """Resolves the method's settings that depend on the number of images, with ``Method.auto_settings``."""
    name = plan.settings.method
    section = getattr(plan.settings, name)
    chosen = {key: rule(images) for key, rule in rules.items() if is_auto(getattr(section, key))}
    if chosen:
        values = ", ".join(f"{key.replace('_', ' ')} {_number(value)}" for key, value in chosen.items())
        plan.settle({"method": f"{values}, for {images:,} images"}, **{name: section.model_copy(update=chosen)})


def _number(value: float | tuple[float, ...]) -> str:
    return " to ".join(dict.fromkeys(f"{number:,}" for number in (value if isinstance(value, tuple) else (value,))))


def resolve_hold_out(plan: Plan[Pretrain], images: int) -> None:
    """Resolves the number of images that are held out from training."""
    given = plan.settings.hold_out
    if is_auto(given):
        count = min(64, images // 10) if images >= 20 else 0
        reason = "a tenth, at most 64" if count else "too few to hold out any: the verdict is about training images"
        plan.settle({"hold_out": reason}, hold_out=count)
    elif given >= images:
        raise UserError(f"--hold-out {given} leaves none of {images} images to train on", 2)


def resolve_budget(plan: Plan[Pretrain], images: int, base: float = 5e-4) -> None:
    """Resolves batch, steps, learning rate, intervals and workers for ``images`` training images.

    Args:
        base: the method's published learning rate for a batch of 256.

    Raises:
        UserError: the batch is too large for the images, or too small for the processes or the method (2).
    """
    _resolve_batch(plan, images)
    _resolve_steps(plan, images)
    _resolve_rate(plan, base)
    settings = plan.settings
    if is_auto(settings.checkpoint_every):
        reason, interval = "about twenty, at most 1,000 steps apart", min(1000, max(10, settings.steps // 20))
        plan.settle({"checkpoint_every": reason}, checkpoint_every=interval)
    if is_auto(settings.evaluate_every):
        reason = "ten in the run, at least 50 steps apart"
        plan.settle({"evaluate_every": reason}, evaluate_every=max(50, settings.steps // 10))
    resolve_workers(plan)


def _resolve_batch(plan: Plan[Pretrain], images: int) -> None:
    unit = _unit_of(plan.settings)
    if is_auto(plan.settings.batch_size):
        eighth = min(PUBLISHED["batch"], max(SMALLEST_BATCH, images // 8 // 8 * 8))
        batch = max(min_images_of(plan.settings), eighth // unit) * unit
        plan.settle({"batch_size": f"an eighth of {images:,} images, from 8 to 512"}, batch_size=batch)
    batch = plan.settings.batch_size
    if batch > images:
        _allow_repeats(plan, batch, images, unit)
    check_batch(plan.settings)
    _check_min_images(plan.settings)


def min_images_of(settings: Pretrain) -> int:
    """The fewest images that the method accepts in a micro-batch on a device."""
    constants, options = METHODS[settings.method].constants, settings.options
    fewest: int = constants["min_images"]
    for name, needed in constants["min_images_with"].items():
        if isinstance(needed, Mapping):
            fewest = max(fewest, needed.get(options[name], 0))
        elif options[name] > 0:
            fewest = max(fewest, needed)
    return fewest


def _check_min_images(settings: Pretrain) -> None:
    """Raises UserError where a micro-batch on a device has too few images for the method."""
    fewest, ranks = min_images_of(settings), settings.devices * settings.nodes
    parts = 1 if is_auto(settings.accumulate) else settings.accumulate
    each = settings.batch_size // (ranks * parts)
    if each >= fewest:
        return
    split = f" in {parts} micro-batches" if parts > 1 else ""
    split += f" over {ranks} processes" if ranks > 1 else ""
    raise UserError(
        f"--batch-size {settings.batch_size}{split}: the method {settings.method} needs at least {fewest} images at a "
        f"time on a device, not {each}; give --batch-size {fewest * ranks * parts} or more"
        + (", or a smaller --accumulate" if parts > 1 else "")
    )


def _allow_repeats(plan: Plan[Pretrain], batch: int, images: int, unit: int) -> None:
    """Notes that a step repeats images. Raises UserError where it would repeat each more than twice."""
    largest = max(1, images // unit) * unit
    if batch > max(2 * images, SMALLEST_BATCH) and steps_done(plan.settings) is None:
        raise UserError(
            f"--batch-size {batch}: there are {images:,} images to train on, and every step would repeat each of them "
            f"{batch / images:.1f} times; choose at most {largest}, or leave it out"
        )
    plan.settle({"batch_size": f"more than the {images:,} images: a step repeats some; {largest} would not"})


def _resolve_steps(plan: Plan[Pretrain], images: int) -> None:
    settings = plan.settings
    if not is_auto(settings.steps):
        return
    if is_auto(settings.epochs):
        published = -(-int(PUBLISHED["epochs"]) * images // settings.batch_size)
        reason = "100 epochs, as published" if published >= FEWEST_STEPS else "the smallest useful number"
        plan.settle({"steps": reason}, steps=max(FEWEST_STEPS, published))
    else:
        steps = max(1, round(settings.epochs * images / settings.batch_size))
        plan.settle({"steps": f"{settings.epochs} epochs"}, steps=steps)
    plan.settle({}, epochs="auto")


def resolve_compile(plan: Plan[Pretrain]) -> None:
    """Resolves whether operations of a step are compiled."""
    settings = plan.settings
    on, reason = compilation.resolve(settings.compile, settings.device == "cuda", settings.steps)
    if settings.compile == "auto":
        plan.settle({"compile": reason}, compile="on" if on else "off")


def _resolve_rate(plan: Plan[Pretrain], base: float) -> None:
    if not is_auto(plan.settings.learning_rate):
        return
    share = plan.settings.batch_size / 256
    rate = float(f"{base * (share if share >= 1 else share**0.5):.3g}")
    reason = f"{base:g} x batch / 256, as published"
    if share < 1:
        reason = f"{base:g} x root of batch / 256: in proportion it would be too small"
    plan.settle({"learning_rate": reason}, learning_rate=rate)


def resolve_measured_workers(plan: Plan[Pretrain], cost: Cost) -> None:
    """On a CPU with cores to spare: as many workers as keep up with the step, and a quarter of the cores at most.

    A GPU is measured with small batches, which it is slow with: there the number stays as it is.
    """
    settings = plan.settings
    if "workers" not in plan.reasons or settings.device != "cpu" or not settings.workers:
        return
    needed = max(1, math.ceil(SPARE * cost.loading / cost.passing))
    reason = f"an image takes {1e3 * cost.loading:.0f} ms to read, {1e3 * cost.passing:.0f} ms to train on"
    plan.settle({"workers": reason}, workers=min(needed, max(2, cores() // 4)))


def resolve_evaluation(plan: Plan[Pretrain], cost: Cost, images: int) -> None:
    """Resolves the images of an evaluation of health, so that the user does not wait for it longer than for training.

    Args:
        images: number of different images that may be evaluated.
    """
    settings = plan.settings
    if not is_auto(settings.evaluate_images):
        return
    usual = usual_images(images)
    count = times(0, settings.steps, settings.evaluate_every) + 1
    allowed = max(EVALUATION_SECONDS, EVALUATION_SHARE * settings.steps * cost.step(settings) / count)
    fitting = max(FEWEST_EVALUATED, int((allowed - cost.pictures) / cost.evaluated))
    if usual <= fitting or steps_done(settings) is not None:  # a run of an earlier version evaluated them all
        each = f", each {usual // images} times" if usual > images else ""
        plan.settle({"evaluate_images": f"all {images} images{each}"}, evaluate_images=usual)
        return
    chosen = fitting if fitting < images else fitting // images * images
    takes, whole = lasting(allowed), lasting(usual * cost.evaluated + cost.pictures)
    reason = f"{usual} would take {whole} each time, {takes} are allowed; the verdict's intervals are wider"
    plan.settle({"evaluate_images": reason}, evaluate_images=chosen)


def steps_done(settings: Pretrain) -> int | None:
    """Steps that a resumed run has done; None for a new run."""
    if not settings.resume:
        return None
    paths = filter(checkpoint.is_ours, checkpoint.listing(Path(settings.out, "checkpoints")))
    newest = next(paths, None)
    return None if newest is None else int(newest.name.removeprefix("step-"))
