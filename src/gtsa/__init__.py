"""gtsa: learn dense visual features from your own scenes.

The verbs of the command line are functions here: ``pretrain``, ``evaluate``, ``compare``, ``check``,
``preview``, ``export``. Each is imported when it is first used.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from gtsa.core.errors import Remedy

if TYPE_CHECKING:
    from gtsa.check import check
    from gtsa.compare import compare
    from gtsa.evaluate import evaluate
    from gtsa.models.export import export
    from gtsa.pretrain import pretrain
    from gtsa.preview import preview

    __version__: str

PLACES = {"export": "gtsa.models.export"}
__all__ = ["Remedy", "check", "compare", "evaluate", "export", "pretrain", "preview"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module(PLACES.get(name, f"gtsa.{name}")), name)
    if name == "__version__":
        from importlib.metadata import version

        return version("gtsa")
    raise AttributeError(f"module 'gtsa' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})


class _Package(ModuleType):
    """Every verb lies in a module of its own name; ``gtsa.pretrain`` is the function, whoever imports the module."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in __all__ and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
