"""gtsa: learn dense visual features from your own scenes.

The verbs of the command line are functions here: ``pretrain``, ``evaluate``, ``explore``, ``compare``, ``check``,
``preview``, ``profile``, ``report``, ``export``, ``embed``, ``shard``; ``load`` opens a backbone. Each is imported when
it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from gtsa.core.errors import UserError

if TYPE_CHECKING:
    from gtsa.comparison.compare import compare
    from gtsa.data.shard import shard
    from gtsa.evaluation.embed import embed
    from gtsa.evaluation.evaluate import evaluate
    from gtsa.evaluation.explore.explore import explore
    from gtsa.models.export import export
    from gtsa.models.load import load
    from gtsa.pretraining.check import check
    from gtsa.pretraining.pretrain import pretrain
    from gtsa.pretraining.preview import preview
    from gtsa.pretraining.profile import profile
    from gtsa.pretraining.report.report import report

    __version__: str

VERBS = {
    "check": "pretraining",
    "compare": "comparison",
    "embed": "evaluation",
    "evaluate": "evaluation",
    "explore": "evaluation.explore",
    "export": "models",
    "load": "models",
    "pretrain": "pretraining",
    "preview": "pretraining",
    "profile": "pretraining",
    "report": "pretraining.report",
    "shard": "data",
}
__all__ = [
    "UserError",
    "check",
    "compare",
    "embed",
    "evaluate",
    "explore",
    "export",
    "load",
    "pretrain",
    "preview",
    "profile",
    "report",
    "shard",
]


def __getattr__(name: str) -> Any:
    if name in VERBS:
        return getattr(importlib.import_module(f"gtsa.{VERBS[name]}.{name}"), name)
    if name == "__version__":
        from importlib.metadata import version

        return version("gtsa")
    raise AttributeError(f"module 'gtsa' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
