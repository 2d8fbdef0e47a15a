"""Self-supervised methods: one file per method, in the order of its paper. Methods are found by walking this folder.

A module ``name.py`` here defines one ``core.types.Method``. Its constructor takes the encoder and keyword arguments of
plain types; these become the settings ``--name.argument``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from gtsa.core import plugins

if TYPE_CHECKING:
    from gtsa.core.types import Method


def declared() -> dict[str, plugins.Declared]:
    """{name: declaration in its source} of every method in this folder; imports none of them."""
    here = Path(__file__).parent
    return plugins.all_declared(here, "Method", here.parent / "core" / "types.py")


def load_all() -> dict[str, type[Method]]:
    """{name: class} of every method in this folder; imports all of them."""
    from gtsa.core.types import Method

    return plugins.classes(sys.modules[__name__], Method)  # type: ignore[type-abstract]
