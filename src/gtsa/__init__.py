"""gtsa: learn dense visual features from your own scenes.

The verbs of the command line are functions here: ``pretrain``, ``check``, ``preview``, ``export``.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

__version__ = version("gtsa")
__all__ = ["Remedy", "check", "export", "pretrain", "preview"]

if TYPE_CHECKING:
    from gtsa.check import check
    from gtsa.core import Remedy
    from gtsa.export import export
    from gtsa.pretrain import pretrain
    from gtsa.preview import preview


def __getattr__(name: str) -> Any:
    """Verbs are imported when they are used: PyTorch takes seconds."""
    import importlib

    if name in __all__:
        return getattr(importlib.import_module("gtsa.core" if name == "Remedy" else f"gtsa.{name}"), name)
    raise AttributeError(f"module 'gtsa' has no attribute {name!r}")
