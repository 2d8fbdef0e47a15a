"""Self-supervised methods: one file is one idea, in the order of its paper. They are found by walking this folder.

A module ``name.py`` here defines one ``core.Method`` whose constructor takes the encoder and keyword arguments of plain
types; these become the settings ``--name.argument``.
"""

from __future__ import annotations

import importlib
import pkgutil

from gtsa.core import Method


def found() -> dict[str, type[Method]]:
    """{name: class} of every method in this folder."""
    methods = {}
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda m: m.name):
        for value in vars(importlib.import_module(f"{__name__}.{module.name}")).values():
            if isinstance(value, type) and issubclass(value, Method) and value.__module__.endswith(module.name):
                methods[module.name] = value
    return methods
