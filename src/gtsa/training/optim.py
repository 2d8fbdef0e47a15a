"""AdamW with scheduled learning rate and weight decay, its groups of parameters, and gradient clipping per tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gtsa.core.shards import own
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
        groups = split_by_decay(module.named_parameters()) if isinstance(module, nn.Module) else module
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

    @property
    def sharded(self) -> bool:
        """Whether this process holds a part of every parameter (--shard)."""
        first: Tensor = self.param_groups[0]["params"][0]
        return own(first) is not first


def split_by_decay(
    named: Iterable[tuple[str, nn.Parameter]], exempt: Callable[[str], bool] = lambda name: False
) -> list[dict[str, Any]]:
    """The trained parameters in two groups: those with weight decay, then those without.

    Parameters of one dimension (norms, biases) and those whose names are ``exempt`` (e.g. positions) have none.
    """
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in named:
        if parameter.requires_grad:
            groups[parameter.ndim > 1 and not exempt(name)].append(parameter)
    return [{"params": parameters, "decayed": decayed} for decayed, parameters in groups.items()]


def schedule_layers(
    layers: Iterable[tuple[float, dict[str, Any]]], rate: Callable[[float], Schedule]
) -> list[dict[str, Any]]:
    """The groups of ``layers`` (as of ``Backbone.layers``), each with the factor ``rate(scale)`` on its rate."""
    return [{**group, "rate": rate(scale)} for scale, group in layers]


@torch.no_grad()
def gradient_norms(gradients: Iterable[Tensor]) -> Tensor:
    """The L2 norm of every gradient tensor, [P]; of sharded ones that of this process's part."""
    return torch.stack(list(torch._foreach_norm([own(each) for each in gradients])))


@torch.no_grad()
def clip_each(gradients: Iterable[Tensor], largest: float, norms: Tensor | None = None) -> Tensor:
    """Scales every gradient tensor down to an L2 norm of at most ``largest`` (0: no clipping), in place.

    Args:
        norms: [P], where they are known already, e.g. over all shards.

    Returns:
        The norms before clipping, [P].
    """
    gradients = [own(each) for each in gradients]
    norms = gradient_norms(gradients) if norms is None else norms
    if largest > 0:
        scales = ((norms + 1e-6).reciprocal() * largest).clamp(max=1.0)
        torch._foreach_mul_(gradients, list(scales.unbind()))
    return norms
