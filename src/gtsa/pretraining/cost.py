"""What a run costs in time and memory, measured on a few of its own images; and what would cost less."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from gtsa.core.terminal import lasting, times
from gtsa.core.types import Crops, Draw, Method, Views
from gtsa.data.loader import ViewSet, collate
from gtsa.data.multicrop import MultiCrop
from gtsa.models.backbone import patch_of
from gtsa.training.optim import ScheduledAdamW, clip_each
from gtsa.training.schedules import Constant

QUICK = 0.5  # seconds that a measured pass may take
MANY = 16  # images of a measured pass, at most
LARGE = 4_000_000  # parameters whose update is measured; of more it is worked out
LOOK = 0.5  # a look at an image, in passes forward and backward
LONG = 12 * 3600  # seconds from which a run on a CPU is told what would take less
TINY = ("vit_tiny_patch16_224", 5.5e6)  # a smaller model, and its parameters


@dataclass(frozen=True)
class Cost:
    """What was measured."""

    loading: float  # seconds to read an image and cut its views, in one process
    passing: float  # seconds to augment an image's views, and of the passes forward and backward
    updating: float  # seconds of the optimiser and the teacher, for a step
    bytes_image: int  # kept for the backward pass, for one image
    bytes_fixed: int  # weights, gradients, moments

    def step(self, s: Any) -> float:
        """Seconds of a step: workers load while others compute."""
        images: int = s.batch_size // (s.devices * s.nodes)
        computing, loading = self.passing * images + self.updating, self.loading * images
        return max(computing, loading / int(s.workers)) if s.workers else computing + loading

    def look(self, s: Any, images: int) -> float:
        """Seconds of a look at ``images`` images: as many views as there are in health.Health."""
        seen = images * max(1, 64 // max(1, images))
        return seen * (self.loading + LOOK * self.passing)

    def run(self, s: Any, images: int, done: int = 0) -> float:
        """Seconds of all steps after ``done``, and of the looks."""
        steps: int = s.steps - done
        looks = times(done, s.steps, s.evaluate_every) + (done == 0)
        return self.step(s) * steps + looks * self.look(s, images)


def probe(
    method: Method, views: ViewSet, prepare: Callable[[Views], Views], fabric: Fabric, batch: int, free: int
) -> Cost:
    """Measures what an image costs: typical times of several passes, so that a busy moment does not count.

    Args:
        batch: images of a step on this device.
        free: bytes of memory that passes may take.
    """
    method.train()
    before = [buffer.clone() for buffer in method.buffers()]  # what a method gathers of a step
    drawn, loading = _read(views, min(batch, MANY))

    def once(count: int, hooks: Any) -> float:
        cut = collate((drawn * -(-count // len(drawn)))[:count])
        began = time.perf_counter()
        seen = prepare(cut)
        with fabric.autocast(), hooks:
            loss = method(seen, 1.0)["loss"]
        loss.backward()
        _finish(fabric.device)
        return time.perf_counter() - began

    few = min(2, batch)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    once(
        few, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    )  # hooks cost time; it warms up, too
    own = {p.untyped_storage().data_ptr() for p in method.parameters()}
    activations = sum(size for place, size in kept.items() if place not in own) // few
    count = max(few, min(batch, MANY, int(QUICK * few / once(few, nullcontext())), free // 2 // max(1, activations)))
    passing = typical(lambda: once(count, nullcontext())) / count
    method.zero_grad(set_to_none=True)
    for buffer, value in zip(method.buffers(), before, strict=True):
        buffer.copy_(value)
    trained = sum(p.nbytes for p in method.parameters() if p.requires_grad)
    fixed = sum(p.nbytes for p in method.parameters()) + 3 * trained
    return Cost(loading, passing, _updating(method, fabric.device), activations, fixed)


def typical(once: Callable[[], float], seconds: float = 1.0) -> float:
    """The median of three to seven values of ``once``, which are seconds; of three where they are long."""
    found: list[float] = []
    while len(found) < 3 or (len(found) < 7 and sum(found) < seconds):
        found.append(once())
    return statistics.median(found)


def _read(views: ViewSet, count: int) -> tuple[list[Views], float]:
    """The views of some images, and the seconds that an image typically takes."""
    drawn: list[Views] = []
    taken: list[float] = []
    while len(drawn) < min(2, count) or (len(drawn) < count and sum(taken) < 0.5):
        began = time.perf_counter()
        drawn.append(views[Draw(0, len(drawn) % len(views))])
        taken.append(time.perf_counter() - began)
    return drawn, statistics.median(taken)


def _updating(method: Method, device: torch.device) -> float:
    """Seconds of the optimiser and the teacher for a step, by tensors that stand in for the weights."""
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
    n, side = (
        (multicrop.global_crops_number, multicrop.global_crops_size),
        (multicrop.local_crops_number, multicrop.local_crops_size),
    )[size]
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(count, n, 3, side, side, generator=generator).to(device)
    boxes = torch.tensor([0.0, 0, side, side], dtype=torch.float64, device=device).expand(count, n, 4)
    return Crops(pixels, boxes, torch.zeros(count, n, dtype=torch.int64, device=device), torch.empty(0))


# What would cost less


def cheaper(s: Any, cost: Cost, weights: float, images: int) -> list[tuple[str, str]]:
    """Flags, each on top of those before it, and how long the run then takes: until it is no longer long.

    Args:
        s: resolved settings.
        weights: parameters of the encoder.
        images: that are looked at.
    """
    found, done = [], _work(s.views, patch_of(s.model), weights)
    for flags, views, model in _smaller(s, weights):
        part = _work(views, patch_of(s.model), model) / done
        less = replace(cost, passing=cost.passing * part, updating=cost.updating * model / weights)
        seconds = less.run(s, images)
        found.append((flags, f"about {lasting(seconds)}"))
        if seconds <= LONG:
            return found
    last = less if found else cost
    steps = max(1, int((LONG - 2 * last.look(s, images)) / last.step(s)))
    return [*found, (f"--steps {steps}", f"about {lasting(last.run(s.model_copy(update={'steps': steps}), images))}")]


def _smaller(s: Any, weights: float) -> list[tuple[str, Any, float]]:
    """Flags, the views and the parameters that they lead to."""
    patch, views, found = patch_of(s.model), s.views, []
    sizes = {
        f"{kind}_crops_size": max(2, getattr(views, f"{kind}_crops_size") // patch // 2) * patch
        for kind in ("global", "local")
    }
    if sizes != {name: getattr(views, name) for name in sizes}:
        views = views.model_copy(update=sizes)
        flags = " ".join(f"--views.{name.replace('_', '-')} {size}" for name, size in sizes.items())
        found.append((flags, views, weights))
    if views.local_crops_number >= 4:
        views = views.model_copy(update={"local_crops_number": views.local_crops_number // 2})
        found.append((f"--views.local-crops-number {views.local_crops_number}", views, weights))
    if not s.init and weights > 2 * TINY[1] and patch == patch_of(TINY[0]):
        found.append((f"--model {TINY[0]}", views, TINY[1]))
    return found


def _work(views: Any, patch: int, weights: float) -> float:
    """Weights times patches: the teacher passes forward, the student backward, too."""
    large, small = (views.global_crops_size // patch) ** 2, (views.local_crops_size // patch) ** 2
    seen: int = 4 * views.global_crops_number * large + 3 * views.local_crops_number * small
    return weights * seen
