"""The cost of a run in time and memory, measured on a few of its images; and faster settings."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from gtsa.core.terminal import lasting, times
from gtsa.core.types import Crops, Draw, Method, Views
from gtsa.data.batches.loader import ViewSet, collate
from gtsa.data.views.multicrop import MultiCrop
from gtsa.models.backbone import patch_of
from gtsa.pretraining.settings import Pretrain, ViewSettings
from gtsa.training.optim import ScheduledAdamW, clip_each
from gtsa.training.schedules import Constant

QUICK = 0.5  # seconds that a measured pass may take
MANY = 16  # images of a measured pass, at most
LARGE = 4_000_000  # parameters whose update is measured; for more it is extrapolated
SLOW = 0.5  # seconds of a pass that is not repeated
EVALUATION = 0.5  # cost of evaluating an image, as a share of its passes forward and backward
PICTURES = 4.0  # cost of the feature maps of an evaluation, in passes of an image
LONG = 12 * 3600  # seconds; for a longer run on a CPU the plan shows faster settings
TINY = ("vit_tiny_patch16_224", 5.5e6)  # a smaller model, and its parameters


@dataclass(frozen=True)
class Cost:
    """Measured times and sizes."""

    loading: float  # seconds to read an image and cut its views, in one process
    passing: float  # seconds to augment an image's views, and of the passes forward and backward
    updating: float  # seconds of the optimiser and the teacher, for a step
    bytes_image: int  # kept for the backward pass, for one image
    bytes_fixed: int  # weights, gradients, moments of the whole networks

    def step(self, settings: Pretrain) -> float:
        """Seconds of a step: workers load while others compute."""
        images: int = settings.batch_size // (settings.devices * settings.nodes)
        computing, loading = self.passing * images + self.updating, self.loading * images
        return max(computing, loading / int(settings.workers)) if settings.workers else computing + loading

    def fixed(self, settings: Pretrain) -> int:
        """Bytes of weights, gradients and moments on a device."""
        return self.bytes_fixed // (settings.devices * settings.nodes if settings.shard else 1)

    @property
    def evaluated(self) -> float:
        """Seconds to evaluate an image."""
        return self.loading + EVALUATION * self.passing

    @property
    def pictures(self) -> float:
        """Seconds of an evaluation's feature maps."""
        return PICTURES * self.passing

    def evaluation(self, settings: Pretrain) -> float:
        """Seconds of an evaluation of health and its feature maps."""
        return settings.evaluate_images * self.evaluated + self.pictures

    def run(self, settings: Pretrain, done: int = 0) -> float:
        """Seconds of all steps after ``done``, and of the evaluations."""
        steps: int = settings.steps - done
        evaluations = times(done, settings.steps, settings.evaluate_every) + (done == 0)
        return self.step(settings) * steps + evaluations * self.evaluation(settings)


def probe(
    method: Method,
    views: ViewSet,
    prepare: Callable[[Views], Views],
    fabric: Fabric,
    batch: int,
    free: int,
    fewest: int = 1,
) -> Cost:
    """Measures the cost of an image: the median of several passes, so that a busy moment does not count.

    A pass that takes more than ``SLOW`` seconds is not repeated: the user waits for the first step.

    Args:
        batch: images per step on this device.
        free: bytes of free memory.
        fewest: images that the method needs at a time.
    """
    method.train()
    before = [buffer.clone() for buffer in method.buffers()]  # statistics that a method accumulates
    drawn, loading = _read(views, min(batch, MANY))

    def once(count: int, hooks: AbstractContextManager[object]) -> float:
        cut = collate((drawn * -(-count // len(drawn)))[:count])
        began = time.perf_counter()
        prepared = prepare(cut)
        with fabric.autocast(), hooks:
            loss = method(prepared, 1.0)["loss"]
        loss.backward()
        _finish(fabric.device)
        return time.perf_counter() - began

    few, least = min(max(2, fewest), batch), min(fewest, batch)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    counting = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    once(least, counting)  # not timed: hooks cost time; it also warms up
    own = {p.untyped_storage().data_ptr() for p in method.parameters()}
    activations = sum(size for address, size in kept.items() if address not in own) // least
    taken = once(few, nullcontext())
    count = max(few, min(batch, MANY, int(QUICK * few / taken), free // 2 // max(1, activations)))
    passing = taken / few if taken > SLOW else typical(lambda: once(count, nullcontext())) / count
    method.zero_grad(set_to_none=True)
    for buffer, value in zip(method.buffers(), before, strict=True):
        buffer.copy_(value)
    trained = sum(p.nbytes for p in method.parameters() if p.requires_grad)
    fixed = sum(p.nbytes for p in method.parameters()) + 3 * trained
    return Cost(loading, passing, _updating(method, fabric.device), activations, fixed)


def typical(once: Callable[[], float], seconds: float = 1.0) -> float:
    """The median of three to seven calls of ``once``, each of which returns seconds; three where they are long."""
    taken: list[float] = []
    while len(taken) < 3 or (len(taken) < 7 and sum(taken) < seconds):
        taken.append(once())
    return statistics.median(taken)


def _read(views: ViewSet, count: int) -> tuple[list[Views], float]:
    """The views of some images, and the median seconds of an image."""
    drawn: list[Views] = []
    taken: list[float] = []
    while len(drawn) < min(2, count) or (len(drawn) < count and sum(taken) < 0.5):
        began = time.perf_counter()
        drawn.append(views[Draw(0, len(drawn) % len(views))])
        taken.append(time.perf_counter() - began)
    return drawn, statistics.median(taken)


def _updating(method: Method, device: torch.device) -> float:
    """Seconds of the optimiser and the teacher in a step, measured on tensors of the weights' shapes."""
    trained = [p for p in method.parameters() if p.requires_grad]
    some, size = [], 0
    for parameter in trained:
        if size < LARGE:
            some.append(nn.Parameter(torch.zeros_like(parameter)))
            size += parameter.numel()
    for parameter in some:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = ScheduledAdamW(nn.ParameterList(some), Constant(0.0), Constant(0.0))
    teacher = [torch.zeros_like(parameter) for parameter in some]

    def once() -> float:
        began = time.perf_counter()
        clip_each(optimizer.gradients, 3.0)
        optimizer.step()
        torch._foreach_lerp_(teacher, [p.detach() for p in some], 0.01)
        _finish(device)
        return time.perf_counter() - began

    once()
    return typical(once, 0.2) * sum(p.numel() for p in trained) / max(1, size)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def noise(multicrop: MultiCrop, size: int, count: int, device: torch.device) -> Crops:
    """Random pixels of the size of global (0) or local (1) crops."""
    n, side = (
        (multicrop.global_crops_number, multicrop.global_crops_size),
        (multicrop.local_crops_number, multicrop.local_crops_size),
    )[size]
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(count, n, 3, side, side, generator=generator).to(device)
    boxes = torch.tensor([0.0, 0, side, side], dtype=torch.float64, device=device).expand(count, n, 4)
    return Crops(pixels, boxes, torch.zeros(count, n, dtype=torch.int64, device=device), torch.empty(0))


# Faster settings


def cheaper(settings: Pretrain, cost: Cost, weights: float) -> list[tuple[str, str]]:
    """Flags, each added to those before it, and the time of the run with them, until it is short enough.

    Args:
        settings: resolved settings.
        weights: number of the encoder's parameters.
    """
    faster, work = [], _work(settings.views, settings.patch_size, weights)
    for flags, views, model in _smaller(settings, weights):
        part = _work(views, settings.patch_size, model) / work
        less = replace(cost, passing=cost.passing * part, updating=cost.updating * model / weights)
        seconds = less.run(settings)
        faster.append((flags, f"about {lasting(seconds)}"))
        if seconds <= LONG:
            return faster
    last = less if faster else cost
    steps = max(1, int((LONG - 2 * last.evaluation(settings)) / last.step(settings)))
    seconds = last.run(settings.model_copy(update={"steps": steps}))
    return [*faster, (f"--steps {steps}", f"about {lasting(seconds)}")]


def _smaller(settings: Pretrain, weights: float) -> list[tuple[str, ViewSettings, float]]:
    """Flags, and the views and the number of parameters with them."""
    patch, views, smaller = settings.patch_size, settings.views, []
    sizes = {
        f"{kind}_crops_size": max(2, getattr(views, f"{kind}_crops_size") // patch // 2) * patch
        for kind in ("global", "local")
    }
    if sizes != {name: getattr(views, name) for name in sizes}:
        views = views.model_copy(update=sizes)
        flags = " ".join(f"--views.{name.replace('_', '-')} {size}" for name, size in sizes.items())
        smaller.append((flags, views, weights))
    if views.local_crops_number >= 4:
        views = views.model_copy(update={"local_crops_number": views.local_crops_number // 2})
        smaller.append((f"--views.local-crops-number {views.local_crops_number}", views, weights))
    if not settings.init and weights > 2 * TINY[1] and patch == patch_of(TINY[0]):
        smaller.append((f"--model {TINY[0]}", views, TINY[1]))
    return smaller


def _work(views: ViewSettings, patch: int, weights: float) -> float:
    """Parameters times patches: forward in the teacher, forward and backward in the student."""
    large, small = (views.global_crops_size // patch) ** 2, (views.local_crops_size // patch) ** 2
    patches: int = 4 * views.global_crops_number * large + 3 * views.local_crops_number * small
    return weights * patches
