"""Faults in labels, collected so that all of them are reported at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from gtsa.core.errors import UserError, escaped

SHOWN = 20  # faults that are listed one by one
LONGEST = 400  # characters of a position or a message


class Fault(NamedTuple):
    """One fault in a file of labels, or the same fault of several files."""

    kind: str
    position: str  # in the file: a line, an id, a file name
    message: str
    places: int = 1


@dataclass
class Problems:
    """The faults of one file or folder of labels."""

    file: str
    faults: list[Fault] = field(default_factory=list)

    def add(self, kind: str, position: object, message: str) -> None:
        self.faults.append(Fault(kind, _shortened(str(position)), _shortened(message)))

    def add_shared(self, kind: str, positions: Sequence[str], message: str) -> None:
        """Adds a fault that several places share: one line with two of them and the number of the others."""
        others = f" and {len(positions) - 2:,} more" if len(positions) > 2 else ""
        position = ", ".join(map(_shortened, positions[:2])) + others
        self.faults.append(Fault(kind, position, _shortened(message), len(positions)))

    def raise_if_any(self) -> None:
        """Raises UserError (3) with a line for each kind of fault and the first faults, some of every kind."""
        if not self.faults:
            return
        counts: Counter[str] = Counter()
        ranked = []  # each fault with the number of those of its kind before it
        for fault in self.faults:
            ranked.append((counts[fault.kind], fault))
            counts[fault.kind] += fault.places
        shown = [fault for _, fault in sorted(ranked, key=lambda pair: pair[0])[:SHOWN]]
        table = "".join(f"\n  {count:6,} x {kind}" for kind, count in counts.most_common())
        lines = "".join(f"\n  {fault.position}: {fault.message}" for fault in shown)
        left = counts.total() - sum(fault.places for fault in shown)
        more = f"\n  and {left:,} more" if left else ""
        raise UserError(f"{escaped(self.file)}: the labels cannot be used:{table}\nin detail:{lines}{more}", 3)


def _shortened(text: str) -> str:
    text = escaped(text[:LONGEST])
    return text if len(text) < LONGEST else f"{text[:LONGEST]} ..."
