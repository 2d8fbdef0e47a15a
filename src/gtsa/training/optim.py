"""AdamW with scheduled learning rate and weight decay, and clipping of each tensor by itself."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gtsa.training.schedules import Constant, Schedule


class ScheduledAdamW(torch.optim.AdamW):
    """AdamW whose learning rate and weight decay are functions of time.

    Biases and one-dimensional parameters are not decayed. The fused kernel is used because it can leave out a step
    on the device's own word (``found_inf``), without the host waiting for it.

    Args:
        module: its parameters that require a gradient; or groups of parameters as dictionaries with ``params``, and if
            need be ``decayed`` (whether weight decay is for them) and ``rate`` (a schedule, times the learning rate).
        learning_rate, weight_decay: schedules over the run.
        clip: largest L2 norm of each parameter tensor's gradient; 0 switches clipping off.
    """

    def __init__(
        self,
        module: nn.Module | Sequence[dict[str, Any]],
        learning_rate: Schedule,
        weight_decay: Schedule,
        clip: float = 3.0,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        groups = by_dimension(module.parameters()) if isinstance(module, nn.Module) else module
        usual = {"decayed": True, "rate": Constant(1.0), "weight_decay": 0.0}
        groups = [{**usual, **group} for group in groups if group["params"]]
        self.found_inf: Tensor | None = None  # 1 on the device: leave this step out
        super().__init__(groups, lr=0.0, betas=betas, fused=True)
        self.learning_rate, self.weight_decay, self.clip = learning_rate, weight_decay, clip

    def set_time(self, time: float) -> None:
        for group in self.param_groups:
            group["lr"] = self.learning_rate(time) * group["rate"](time)
            group["weight_decay"] = self.weight_decay(time) if group["decayed"] else 0.0

    @property
    def gradients(self) -> list[Tensor]:
        return [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]


def by_dimension(parameters: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
    """Those that are trained in two groups: matrices, which are decayed, and the rest, which is not."""
    trained = [p for p in parameters if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "decayed": True},
        {"params": [p for p in trained if p.ndim <= 1], "decayed": False},
    ]


@torch.no_grad()
def clip_each(gradients: Iterable[Tensor], largest: float) -> Tensor:
    """Scales every gradient tensor down to an L2 norm of at most ``largest`` (0: none), in place.

    Returns the norms before clipping, one per tensor.
    """
    gradients = list(gradients)
    norms = torch._foreach_norm(gradients)
    if largest > 0:
        scales = torch._foreach_add(norms, 1e-6)
        torch._foreach_reciprocal_(scales)
        torch._foreach_mul_(scales, largest)
        torch._foreach_clamp_max_(scales, 1.0)
        torch._foreach_mul_(gradients, scales)
    return torch.stack(list(norms))
