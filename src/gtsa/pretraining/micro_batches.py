"""Micro-batches: into how many parts a step is split so that it fits in memory. A GPU tries it before training."""

from __future__ import annotations

from collections.abc import Callable

import torch
from lightning_fabric import Fabric

from gtsa.core.settings import Plan, is_auto
from gtsa.core.terminal import gib
from gtsa.core.types import Draw, Method, Views
from gtsa.data.batches import image_memory
from gtsa.data.batches.loader import ViewSet, collate
from gtsa.pretraining.cost import Cost
from gtsa.pretraining.plan import min_images_of
from gtsa.pretraining.settings import Pretrain
from gtsa.training.devices import is_out_of_memory

PLANNED = 0.7  # of free memory: what is kept for the backward pass is not all that a step needs
SURE = 0.5  # of that; a whole step that is planned for less needs no trial
HEADROOM = 0.1  # of free memory, that a trial leaves: for evaluations, and for what lies scattered
MANY = 8  # different images of a trial
TRIED = ("cuda",)  # kinds of devices that say when they lack memory; a process that asks the CPU for more is ended

Fits = Callable[[int], bool]  # whether so many images fit in memory at a time


def free_memory(device: torch.device) -> int:
    """Bytes of memory that a step could take on the device; of a CPU within the limit of a container."""
    if device.type != "cuda":
        return image_memory.free_memory()
    torch.cuda.empty_cache()  # blocks that PyTorch keeps for later are free
    return torch.cuda.mem_get_info(device)[0]


def resolve_accumulate(plan: Plan[Pretrain], cost: Cost, free: int, fits: Fits | None = None) -> None:
    """Resolves the number of micro-batches so that a step fits into ``free`` bytes, as far as the method allows.

    Args:
        fits: tries it; None: the number is planned from ``cost`` alone.
    """
    settings = plan.settings
    if not is_auto(settings.accumulate):
        return
    room = PLANNED * free - cost.fixed(settings)
    fitting = max(1, int(room / max(1, cost.bytes_image)))
    each = settings.batch_size // (settings.devices * settings.nodes)
    fewest = min_images_of(settings)
    allowed = [n for n in range(1, each + 1) if each % n == 0 and each // n >= fewest]
    parts = next((n for n in allowed if each // n <= fitting), allowed[-1])
    reason = f"{gib(free)} of memory free" if parts > 1 else "a step fits in memory"
    if each // parts > fitting and fewest > 1:
        reason = f"{gib(free)} of memory free, and {settings.method} needs {fewest} images at a time"
    if fits and each * cost.bytes_image > SURE * room:
        parts, tried = _try(allowed, parts, lambda n: fits(each // n))
        outcome = "fit" if tried else "do not fit"
        reason = f"{gib(free)} of memory free; as tried, {each // parts} images at a time {outcome}"
    plan.settle({"accumulate": reason}, accumulate=parts)


def _try(allowed: list[int], planned: int, fits: Fits) -> tuple[int, bool]:
    """The fewest parts that fit, tried from ``planned`` on; the most that are allowed, and False, where none do."""
    at = allowed.index(planned)
    if fits(allowed[at]):
        while at and fits(allowed[at - 1]):
            at -= 1
        return allowed[at], True
    return next(((n, True) for n in allowed[at + 1 :] if fits(n)), (allowed[-1], False))


def trial(method: Method, views: ViewSet, prepare: Callable[[Views], Views], fabric: Fabric) -> Fits | None:
    """Returns a function that passes so many images forward and backward, beside the optimiser's moments.

    Nothing is left of it: no gradients, and the method's statistics are as before. None: the device does not allow it.

    Args:
        method: on the device, with whole weights.
        prepare: brings views to the device, augmented.
    """
    if fabric.device.type not in TRIED:
        return None
    drawn: list[Views] = []

    def fits(images: int) -> bool:
        drawn.extend(views[Draw(0, i % len(views))] for i in range(len(drawn), min(images, MANY)))
        before = [buffer.clone() for buffer in method.buffers()]
        try:
            _pass(method.train(), prepare, collate((drawn * -(-images // len(drawn)))[:images]), fabric)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return False
        finally:
            method.zero_grad(set_to_none=True)
            for buffer, value in zip(method.buffers(), before, strict=True):
                buffer.copy_(value)
        return True

    return fits


def _pass(method: Method, prepare: Callable[[Views], Views], views: Views, fabric: Fabric) -> None:
    device = fabric.device
    trained = [p for p in method.parameters() if p.requires_grad]
    moments = [torch.empty_like(p) for p in (*trained, *trained)]
    headroom = torch.empty(int(HEADROOM * free_memory(device)), dtype=torch.uint8, device=device)
    with fabric.autocast():
        loss = method(prepare(views), 1.0)["loss"]
    loss.backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    del moments, headroom  # held until here
