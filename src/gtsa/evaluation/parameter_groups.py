"""Groups of parameters for the optimiser: with weight decay, and without."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn


def split_by_decay(named: Iterable[tuple[str, nn.Parameter]], exempt: Callable[[str], bool]) -> list[dict[str, Any]]:
    """The trained parameters in two groups: those with weight decay, then those without.

    Norms, biases and the parameters whose names are ``exempt`` (positions, CLS) have none.
    """
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in named:
        if parameter.requires_grad:
            groups[parameter.ndim > 1 and not exempt(name)].append(parameter)
    return [{"params": parameters, "decayed": decayed} for decayed, parameters in groups.items()]
