"""The steps since the last line of the log. A checkpoint keeps them: a resumed run then writes the same line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gtsa.core.types import StepResult


def means(recent: list[StepResult]) -> dict[str, float]:
    """Means over some steps: the parts of the loss and the seconds; and the share of the time that data took."""
    parts = {name: [done.parts[name] for done in recent if name in done.parts] for name in recent[-1].parts}
    values = {name: float(sum(each) / len(each)) for name, each in parts.items()}
    seconds = sum(done.seconds for done in recent)
    return values | {"seconds": seconds / len(recent), "waited": sum(done.waited for done in recent) / seconds}


def tensors_of(recent: list[StepResult]) -> dict[str, dict[str, Tensor]]:
    """The parts of the loss, for a checkpoint; nothing where there are none."""
    parts = {f"{n}.{name}": part for n, done in enumerate(recent) for name, part in done.parts.items()}
    return {"recent": parts} if parts else {}


def values_of(recent: list[StepResult]) -> list[tuple[int, float, float]]:
    """Number, seconds and waiting time of each step, for a checkpoint."""
    return [(done.step, done.seconds, done.waited) for done in recent]


def restored(
    tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], device: torch.device
) -> list[StepResult]:
    """The steps that a checkpoint kept."""
    recent = [StepResult(step, {}, seconds, waited) for step, seconds, waited in state.get("recent", ())]
    for key, tensor in tensors.get("recent", {}).items():
        number, name = key.split(".", 1)
        recent[int(number)].parts[name] = tensor.to(device)
    return recent
