"""Rows of a comparison: methods, ablations, controls, weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gtsa.comparison.settings import ABLATIONS
from gtsa.core.errors import UserError
from gtsa.pretraining.settings import METHODS

LONGEST = 200  # characters of a folder's name


@dataclass(frozen=True)
class Row:
    """A line of the comparison.

    Attributes:
        settings: of gtsa pretrain, for a row that is trained.
        source: weights or control, for a row that is not.
        tuned_as: the method whose trials choose its settings.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    source: str | None = None
    tuned_as: str | None = None

    @property
    def varies(self) -> bool:
        """Whether another seed gives another network."""
        return self.source is None or self.source == "untrained"


def rows_of(s: Any) -> list[Row]:
    """All rows, in the order of the report. Raises UserError where a name is not known or there twice."""
    rows = [Row(name, {"method": name}, tuned_as=name) for name in s.methods]
    for name in s.ablate:
        if name not in ABLATIONS:
            raise UserError(f"--ablate: there is no {name!r}; there is {', '.join(ABLATIONS)}")
        rows.append(Row(name, ABLATIONS[name], tuned_as=str(ABLATIONS[name]["method"])))
    for name, settings in s.rows.items():
        method = settings.get("method", "gtsa")
        if method not in tuple(METHODS):  # of whatever type
            raise UserError(f"rows: {name}.method: there is no {method!r:.100}; there is {', '.join(METHODS)}")
        if not name or not all(c.isalnum() or c in "-_." for c in name) or name.startswith(".") or len(name) > LONGEST:
            raise UserError(
                f"rows: {name[:100]!r} is to name a folder: letters, digits, - _ and . alone, at most {LONGEST}"
            )
        rows.append(Row(name, {"method": method, **settings}, tuned_as=method))
    rows += [Row(name, source=name) for name in s.controls]
    rows += [Row(_name(source), source=source) for source in s.weights]
    names = [row.name for row in rows]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"two rows are called {twice[0]}; name each once")
    return rows


def _name(source: str) -> str:
    """Of the row of these weights: it names a folder, too."""
    name = "".join(c if c.isalnum() or c in "-_." else "_" for c in source)[-LONGEST:]
    return name if name.strip(".") else "weights"
