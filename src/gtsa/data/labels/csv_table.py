"""A CSV table with a path and a label in each row."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from typing import ClassVar

from gtsa.data.labels import Kind, LabelFormat, Labelled, LabelOptions, Problems
from gtsa.data.labels._classes import label_images, read_class_names
from gtsa.data.labels._files import locate
from gtsa.data.sources.folder import Folder

PATH_COLUMNS = ("path", "file", "filename", "file_name", "image", "image_path", "name")  # the usual name first
LABEL_COLUMNS = ("label", "class", "category", "target", "species")


class Table(LabelFormat):
    """Rows of path and label, separated by a comma; paths start at the images' folder.

    A first row that names the columns ``path`` and ``label`` (or file, filename, image, name; class, category, target)
    is a header. The columns may then be in any order, among others. Without a header there are exactly these two. The
    classes are all labels in the table, sorted, or the list of ``classes``.
    """

    needs: ClassVar[dict[Kind, str]] = {"classes": "a CSV with columns path and label"}

    @staticmethod
    def claims(images: str, labels: str | None, kind: Kind) -> bool:
        return kind == "classes" and (labels or "").lower().endswith(".csv") and os.path.isdir(images)

    @staticmethod
    def read(images: str, labels: str, kind: Kind, options: LabelOptions) -> Labelled:
        problems = Problems(labels)
        rows = list(_read_rows(labels, problems))
        if not rows and not problems.faults:
            problems.add("no rows", labels, "the table is empty: write a path and a label in each row")
        names = locate(images, ((f"line {line}", path) for line, path, _ in rows), problems)
        label_of: dict[str, tuple[int, str]] = {}  # line and label of each image
        for (line, _path, label), name in zip(rows, names, strict=True):
            if name is not None and label:
                first, other = label_of.setdefault(name, (line, label))
                if other != label:
                    problems.add(
                        "two labels for one image", f"line {line}", f"{name}: {label}, but {other} in line {first}"
                    )
        source = Folder(images, files=list(label_of))
        return label_images(
            source, [label for _, label in label_of.values()], read_class_names(options.classes), kind, problems
        )


def _read_rows(file: str, problems: Problems) -> Iterator[tuple[int, str, str]]:
    """Line, path and label of each row; a label with a fault is empty."""
    columns, width = (0, 1), 2
    try:
        with open(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as text:  # paths need not be UTF-8
            reader = csv.reader(text, skipinitialspace=True)
            for number, row in enumerate(reader):
                heads = [cell.strip().lower() for cell in row]
                header = [
                    next((heads.index(n) for n in names if n in heads), None) for names in (PATH_COLUMNS, LABEL_COLUMNS)
                ]
                if number == 0 and header[0] is not None and header[1] is not None:
                    columns, width = (header[0], header[1]), len(row)
                elif row and len(row) != width:
                    problems.add("row of another width", f"line {reader.line_num}", f"{len(row)} cells, not {width}")
                elif row:
                    path, label = (row[column] for column in columns)
                    yield reader.line_num, path, _check_label(label.strip(), f"line {reader.line_num}", path, problems)
    except OSError as error:
        problems.add("file that cannot be read", file, error.strerror or str(error))
    except csv.Error as error:
        problems.add("not CSV", f"line {reader.line_num}", str(error))


def _check_label(label: str, position: str, path: str, problems: Problems) -> str:
    if not label:
        problems.add("empty label", position, f"{path}: give it a label, or remove the row")
    elif not label.isprintable():  # also of bytes that are not UTF-8
        problems.add("label that is no text", position, f"{path}: {label}: save the file as UTF-8")
        return ""
    return label
