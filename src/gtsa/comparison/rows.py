"""Rows of a comparison: methods, ablations, further settings, controls and given weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from gtsa.comparison.settings import ABLATIONS, Compare
from gtsa.core.errors import UserError
from gtsa.pretraining.settings import METHODS

LONGEST = 200  # characters of a folder name


@dataclass(frozen=True)
class Row:
    """One row of the comparison.

    Attributes:
        settings: settings of gtsa pretrain, if the row is trained.
        source: weights or the name of a control, if the row is not trained.
        tuned_as: the method whose trials choose the settings of the row.
        seed_offset: the first seed of the row. A network is paired with those of the same number, whatever the seed.
    """

    name: str
    settings: Mapping[str, object] = field(default_factory=dict)
    source: str | None = None
    tuned_as: str | None = None
    seed_offset: int = 0

    @property
    def varies(self) -> bool:
        """Whether a different seed gives a different network."""
        return self.source is None or self.source == "untrained"


def make_rows(settings: Compare) -> list[Row]:
    """All rows, in the order of the report. Raises UserError if a name is unknown or occurs twice."""
    rows = [Row(name, {"method": name}, tuned_as=name) for name in settings.methods]
    for name in settings.ablate:
        if name not in ABLATIONS:
            raise UserError(f"--ablate: unknown variant {name!r}; available: {', '.join(ABLATIONS)}")
        rows.append(Row(name, ABLATIONS[name], tuned_as=str(ABLATIONS[name]["method"])))
    rows += [_make_further_row(name, row_settings) for name, row_settings in settings.rows.items()]
    rows += [Row(name, source=name) for name in settings.controls]
    rows += [Row(_make_name(source), source=source) for source in settings.weights]
    names = [row.name for row in rows]
    if duplicates := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"two rows have the name {duplicates[0]}; give each row its own name")
    return rows


def _make_further_row(name: str, row_settings: Mapping[str, object]) -> Row:
    method = row_settings.get("method", "gtsa")
    if method not in tuple(METHODS):  # compared with ==, because the value may be unhashable
        raise UserError(f"rows: {name}.method: unknown method {method!r:.100}; available: {', '.join(METHODS)}")
    if not name or not all(c.isalnum() or c in "-_." for c in name) or name.startswith(".") or len(name) > LONGEST:
        raise UserError(
            f"rows: {name[:100]!r} cannot be a folder name; use only letters, digits, -, _ and . (not first), and at "
            f"most {LONGEST} characters"
        )
    offset = row_settings.get("seed_offset", 0)
    if type(offset) is not int or not 0 <= offset < 2**31:
        raise UserError(f"rows: {name}.seed_offset: give a whole number from 0, not {offset!r:.100}")
    of_pretrain = {key: value for key, value in row_settings.items() if key != "seed_offset"}
    return Row(name, {"method": method, **of_pretrain}, tuned_as=method, seed_offset=offset)


def _make_name(source: str) -> str:
    """The row name of given weights. It is also a folder name."""
    name = "".join(c if c.isalnum() or c in "-_." else "_" for c in source)[-LONGEST:]
    return name if name.strip(".") else "weights"
