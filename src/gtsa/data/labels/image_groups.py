"""Groups of images that are not independent: of one place, flight, slide or patient. A CSV names the group of each."""

from __future__ import annotations

import csv
from dataclasses import replace

from gtsa.data.labels.csv_table import PATH_COLUMNS
from gtsa.data.labels.labelled import Labelled
from gtsa.data.labels.problems import Problems

COLUMN = "group"


def with_groups(data: Labelled, file: str) -> Labelled:
    """The same images with the groups in a CSV of columns ``path`` (or file, image, name ...) and ``group``.

    Paths start at the images' folder. Rows of other images are not used. An image whose group is empty is alone.

    Raises:
        UserError: the file cannot be read, has not these columns, or has no row for an image (3).
    """
    problems = Problems(file)
    group_of = _read(file, problems)
    names = [data.source.name(index) for index in range(len(data.source))]
    missing = [names[index] for index in data.indices if names[index] not in group_of]
    if missing and not problems.faults:
        problems.add_shared("image without a row", missing, "write a row with its path and its group (or none)")
    problems.raise_if_any()
    return replace(data, image_groups=tuple(group_of.get(name, "") for name in names))


def _read(file: str, problems: Problems) -> dict[str, str]:
    """The group of each path."""
    group_of: dict[str, str] = {}
    try:
        with open(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
            reader = csv.reader(text, skipinitialspace=True)
            heads = [cell.strip().lower() for cell in next(reader, [])]
            column = next((heads.index(name) for name in PATH_COLUMNS if name in heads), None)
            if column is None or COLUMN not in heads:
                problems.add("missing column", "line 1", "the first row names the columns: path and group are needed")
                return {}
            for row in filter(None, reader):
                if len(row) != len(heads):
                    width = f"{len(row)} cells, not {len(heads)}"
                    problems.add("row of another width", f"line {reader.line_num}", width)
                    continue
                path, group = row[column], row[heads.index(COLUMN)].strip()
                if group_of.setdefault(path, group) != group:
                    message = f"{path}: {group}, but {group_of[path]} in a line before"
                    problems.add("two groups for one image", f"line {reader.line_num}", message)
    except OSError as error:
        problems.add("file that cannot be read", file, error.strerror or str(error))
    except csv.Error as error:
        problems.add("not CSV", f"line {reader.line_num}", str(error))
    return group_of
