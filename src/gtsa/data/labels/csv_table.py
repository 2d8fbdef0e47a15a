"""A CSV table with a path and a label in each row."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from typing import Any

from gtsa.data.labels import Kind, Labelled, Problems
from gtsa.data.labels._classes import listed, one_each
from gtsa.data.labels._files import located
from gtsa.data.sources.folder import Folder

PATHS = ("path", "file", "filename", "file_name", "image", "image_path", "name")  # of columns, the usual one first
LABELS = ("label", "class", "category", "target", "species")


class Table:
    """Rows of path and label, with a comma between; paths start at the images' folder.

    A first row that names the columns ``path`` and ``label`` (or file, filename, image, name; class, category, target)
    is a header: then they may lie in any order among others. Without it there are these two. The classes are all labels
    that occur, sorted, or the list of ``classes``.
    """

    @staticmethod
    def claims(images: str, labels: str | None, kind: Kind) -> bool:
        return kind == "classes" and (labels or "").lower().endswith(".csv") and os.path.isdir(images)

    @staticmethod
    def read(images: str, labels: str, kind: Kind, classes: str | None = None, **_: Any) -> Labelled:
        problems = Problems(labels)
        rows = list(_rows(labels, problems))
        if not rows and not problems.found:
            problems.add("no rows", labels, "there is nothing in it: write a path and a label in each row")
        names = located(images, ((f"line {line}", path) for line, path, _ in rows), problems)
        found: dict[str, tuple[int, str]] = {}  # where an image was labelled, and how
        for (line, _path, label), name in zip(rows, names, strict=True):
            if name is not None and label:
                first, other = found.setdefault(name, (line, label))
                if other != label:
                    problems.add(
                        "two labels for one image", f"line {line}", f"{name}: {label}, but {other} in line {first}"
                    )
        source = Folder(images, files=list(found))
        return one_each(source, [label for _, label in found.values()], listed(classes), kind, problems)


def _rows(file: str, problems: Problems) -> Iterator[tuple[int, str, str]]:
    """Line, path and label of each row; the label is empty where a problem is told of it."""
    columns, width = (0, 1), 2
    try:
        with open(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as text:  # paths may be no UTF-8
            reader = csv.reader(text, skipinitialspace=True)
            for first, row in enumerate(reader):
                heads = [cell.strip().lower() for cell in row]
                named = [next((heads.index(n) for n in names if n in heads), None) for names in (PATHS, LABELS)]
                if first == 0 and named[0] is not None and named[1] is not None:
                    columns, width = (named[0], named[1]), len(row)
                elif row and len(row) != width:
                    problems.add("row of another width", f"line {reader.line_num}", f"{len(row)} cells, not {width}")
                elif row:
                    path, label = (row[column] for column in columns)
                    yield reader.line_num, path, _label(label.strip(), f"line {reader.line_num}", path, problems)
    except OSError as error:
        problems.add("file that cannot be read", file, error.strerror or str(error))
    except csv.Error as error:
        problems.add("not CSV", f"line {reader.line_num}", str(error))


def _label(label: str, place: str, path: str, problems: Problems) -> str:
    if not label:
        problems.add("empty label", place, f"{path}: give it a label, or remove the row")
    elif not label.isprintable():  # nor are bytes that are no UTF-8
        problems.add("label that is no text", place, f"{path}: {label}: save the file as UTF-8")
        return ""
    return label
