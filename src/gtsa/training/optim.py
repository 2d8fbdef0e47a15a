"""AdamW with scheduled learning rate and weight decay, and gradient clipping per tensor."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gtsa.training.schedules import Constant, Schedule


class ScheduledAdamW(torch.optim.AdamW):
    """AdamW whose learning rate and weight decay are functions of time.

    Weight decay does not apply to biases and one-dimensional parameters. The fused kernel is used because it can skip a
    step by a value on the device (``found_inf``), so that the host does not wait.

    Args:
        module: a module, whose parameters that require a gradient are trained; or groups of parameters: dictionaries
            with ``params``, and optionally ``decayed`` (whether weight decay applies) and ``rate`` (a schedule that
            multiplies the learning rate).
        learning_rate, weight_decay: schedules over the run.
        clip: largest L2 norm of each parameter tensor's gradient; 0: no clipping.
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
        defaults = {"decayed": True, "rate": Constant(1.0), "weight_decay": 0.0}
        groups = [{**defaults, **group} for group in groups if group["params"]]
        self.found_inf: Tensor | None = None  # 1 on the device: skip this step
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
    """The trained parameters in two groups: matrices, with weight decay, and all others, without."""
    trained = [p for p in parameters if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "decayed": True},
        {"params": [p for p in trained if p.ndim <= 1], "decayed": False},
    ]


@torch.no_grad()
def clip_each(gradients: Iterable[Tensor], largest: float) -> Tensor:
    """Scales every gradient tensor down to an L2 norm of at most ``largest`` (0: no clipping), in place.

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
