"""gtsa: learn dense visual features from your own scenes.

The verbs of the command line are functions here: ``pretrain``, ``evaluate``, ``compare``, ``check``,
``preview``, ``export``.
"""

from importlib.metadata import version

__version__ = version("gtsa")

from gtsa.check import check
from gtsa.compare import compare
from gtsa.core import Remedy
from gtsa.evaluate import evaluate
from gtsa.export import export
from gtsa.pretrain import pretrain
from gtsa.preview import preview

__all__ = ["Remedy", "check", "compare", "evaluate", "export", "pretrain", "preview"]
