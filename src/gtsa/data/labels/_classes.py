"""Class names, and images with one class each."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from gtsa.data.labels import Kind, Labelled, Problems
from gtsa.data.sources import Source


def read_class_names(file: str | None) -> tuple[str, ...] | None:
    """The class names in a text file, one a line; None without a file. Raises UserError (3) where names are invalid."""
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
    check_unique("class", ((f"line {line}", name) for line, name in enumerate(names, 1)), problems)
    if not names and not problems.faults:
        problems.add("no classes", file, "write one name a line")
    problems.raise_if_any()
    return tuple(names)


def check_unique(what: str, named: Iterable[tuple[str, str]], problems: Problems) -> None:
    """Adds names that are empty or occur twice to the problems, from pairs of position and name."""
    seen: dict[str, str] = {}
    for position, name in named:
        if not name:
            problems.add(f"{what} without a name", position, "give it a name")
        elif name in seen:
            problems.add(f"{what} named twice", position, f"{name}: as {seen[name]}")
        else:
            seen[name] = position


def label_images(
    source: Source,
    labels: Sequence[str | None],
    classes: tuple[str, ...] | None,
    kind: Kind,
    problems: Problems,
) -> Labelled:
    """Labels each image with the name of one class. Raises UserError (3) through ``problems``.

    Args:
        labels: of every image in the source; None where ``problems`` has a fault already.
        classes: all class names, in order; None: those of ``labels``, sorted.
    """
    counts = Counter(label for label in labels if label is not None)
    classes = tuple(sorted(counts)) if classes is None else classes
    index_of = {name: index for index, name in enumerate(classes)}
    for image, label in enumerate(labels):
        if label is not None and label not in index_of:
            problems.add("unknown class", source.name(image), f"{label}: not in the list of {len(classes)} classes")
    if len(index_of) < 2 and not problems.faults:
        problems.add("too few classes", problems.file, f"{len(index_of)}, at least two are needed")
    problems.raise_if_any()
    targets = [index_of[label] for label in labels if label is not None]
    rows = ((source.name(index), target) for index, target in enumerate(targets))
    return Labelled(source, range(len(source)), targets, kind, classes, digest([classes, *rows]))


def digest(rows: Iterable[object]) -> str:
    """SHA-256 of plain values, written as JSON."""
    sha = hashlib.sha256()
    for row in rows:
        sha.update(json.dumps(row, sort_keys=True, separators=(",", ":")).encode() + b"\n")
    return sha.hexdigest()
