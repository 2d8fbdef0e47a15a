"""Evaluations: one file is one question. They are found by walking this folder."""

from __future__ import annotations

import importlib
import pkgutil

from gtsa.core import Evaluator


def found() -> dict[str, type[Evaluator]]:
    """The evaluators of this folder by name, which is the module's."""
    evaluators = {}
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda m: m.name):
        for value in vars(importlib.import_module(f"{__name__}.{module.name}")).values():
            if isinstance(value, type) and issubclass(value, Evaluator) and value.__module__.endswith(module.name):
                evaluators[module.name] = value
    return evaluators
