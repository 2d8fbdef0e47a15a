"""Names of classes, and images that have one class each."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gtsa.data.labels import Kind, Labelled, Problems
from gtsa.data.sources import Source


def listed(file: str | None) -> tuple[str, ...] | None:
    """The class names in a text file, one a line. Raises UserError (3) where they are no such list."""
    if file is None:
        return None
    problems, names = Problems(file), []
    try:
        names = Path(file).read_text(encoding="utf-8-sig").rstrip().splitlines()
    except OSError as error:
        problems.add("file that cannot be read", file, error.strerror or str(error))
    except UnicodeDecodeError as error:
        problems.add("not UTF-8", file, f"{error}: save it as UTF-8")
    names = [name.strip() for name in names]
    unique("class", ((f"line {line}", name) for line, name in enumerate(names, 1)), problems)
    if not names and not problems.found:
        problems.add("no classes", file, "write one name a line")
    problems.insist()
    return tuple(names)


def unique(what: str, named: Iterable[tuple[str, str]], problems: Problems) -> None:
    """Tells names that are empty or were there before, from pairs of place and name."""
    seen: dict[str, str] = {}
    for place, name in named:
        if not name:
            problems.add(f"{what} without a name", place, "give it a name")
        elif name in seen:
            problems.add(f"{what} named twice", place, f"{name}: as {seen[name]}")
        else:
            seen[name] = place


def one_each(
    source: Source,
    labels: Sequence[str | None],
    classes: tuple[str, ...] | None,
    kind: Kind,
    problems: Problems,
) -> Labelled:
    """Images with the name of one class each. Raises UserError (3) through ``problems``.

    Args:
        labels: of every image in the source; None where a problem has been told.
        classes: all there are, in order; None: those of ``labels``, sorted.
    """
    counts = Counter(label for label in labels if label is not None)
    classes = tuple(sorted(counts)) if classes is None else classes
    numbers = {name: number for number, name in enumerate(classes)}
    for index, label in enumerate(labels):
        if label is not None and label not in numbers:
            problems.add("unknown class", source.name(index), f"{label}: not in the list of {len(classes)} classes")
    if len(numbers) < 2 and not problems.found:
        problems.add("too few classes", problems.where, f"there is {len(numbers)}; at least two are needed")
    problems.insist()
    targets = [numbers[label] for label in labels if label is not None]
    rows = ((source.name(index), target) for index, target in enumerate(targets))
    return Labelled(source, range(len(source)), targets, kind, classes, digest([classes, *rows]))


def digest(rows: Iterable[Any]) -> str:
    """SHA-256 of plain values, written as JSON."""
    sha = hashlib.sha256()
    for row in rows:
        sha.update(json.dumps(row, sort_keys=True, separators=(",", ":")).encode() + b"\n")
    return sha.hexdigest()
