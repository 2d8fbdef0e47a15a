"""The evaluations. One file is one evaluation; they are found by walking this folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from gtsa.core import plugins

if TYPE_CHECKING:
    from gtsa.evaluation.evaluator import Evaluator


def declared() -> dict[str, plugins.Declared]:
    """{name: declaration in the source} of every evaluator in this folder; imports none of them."""
    here = Path(__file__).parent
    return plugins.all_declared(here, "Evaluator", here.with_name("evaluator.py"))


def load_all() -> dict[str, type[Evaluator]]:
    """{name: class} of every evaluator in this folder; the name is the module's. Imports all of them."""
    from gtsa.evaluation.evaluator import Evaluator

    return plugins.classes(sys.modules[__name__], Evaluator)  # type: ignore[type-abstract]
