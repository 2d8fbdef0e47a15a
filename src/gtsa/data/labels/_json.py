"""Labels in JSON: objects with a unique id and the required fields, each of its type."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gtsa.data.labels import Problems

SINGULAR = {"images": "image", "annotations": "annotation", "categories": "category"}


def parse_json(file: str, problems: Problems, unique: bool = False, kinds: tuple[type, ...] = (dict,)) -> Any:
    """The content of a JSON file. Raises UserError through ``problems`` where it is invalid.

    Args:
        unique: a key that is written twice is a fault; otherwise the last one counts.
        kinds: types that the content may have.
    """

    def check_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        unique_keys = dict(pairs)
        if len(unique_keys) < len(pairs):
            seen = set()
            for key, _ in pairs:
                if key in seen:
                    problems.add("key that is written twice", key, "one of the two would be lost; keep one")
                seen.add(key)
        return unique_keys

    content: Any = None
    try:
        content = json.loads(Path(file).read_bytes(), object_pairs_hook=check_keys if unique else None)
    except OSError as error:
        problems.add("file that cannot be read", file, error.strerror or str(error))
    except (ValueError, RecursionError) as error:  # ValueError: also text that is not UTF-8, and endless integers
        problems.add("not JSON", file, f"{error}: write it again")
    else:
        if not isinstance(content, kinds):
            problems.add("wrong type", file, f"an object {{...}} is needed, not {quoted(content)}")
    problems.raise_if_any()
    return content


def check_lists(content: Mapping[str, Any], problems: Problems) -> None:
    """Raises UserError through ``problems`` unless there are lists of images, annotations and categories."""
    for key in SINGULAR:
        if key not in content:
            problems.add("missing key", key, f"the file has no {key!r}")
        elif not isinstance(content[key], list):
            problems.add("wrong type", key, f"a list of objects is needed, not {quoted(content[key])}")
        elif not content[key]:
            problems.add("empty list", key, "it has no entries")
    problems.raise_if_any()


def check_records(
    content: Mapping[str, Any], key: str, fields: Mapping[str, type], problems: Problems
) -> tuple[list[dict[str, Any]], set[int]]:
    """The valid objects of a list, with an id and all ``fields``; and all ids, so that no fault is reported twice.

    Args:
        fields: the type of each; ``int`` is a whole number from 0 on, as ids are; ``object`` is any type.
    """
    valid, ids = [], set()
    for position, row in enumerate(content[key]):
        if not isinstance(row, dict):
            problems.add("wrong type", f"{key}[{position}]", f"an object {{...}} is needed, not {quoted(row)}")
        elif "id" not in row:
            problems.add("missing key", f"{key}[{position}]", "it has no 'id'")
        elif not _is(row["id"], int):
            problems.add(
                "wrong type", f"{key}[{position}]", f"'id' is {quoted(row['id'])}, not a whole number from 0 on"
            )
        elif row["id"] in ids:
            problems.add(
                "duplicate id", f"{SINGULAR[key]} {row['id']}", f"{key}[{position}] has the id of an earlier one"
            )
        else:
            ids.add(row["id"])
            if _check_fields(row, f"{SINGULAR[key]} {row['id']}", fields, problems):
                valid.append(row)
    return valid, ids


def _check_fields(row: Mapping[str, Any], position: str, fields: Mapping[str, type], problems: Problems) -> bool:
    valid = True
    for name, kind in fields.items():
        if name not in row:
            problems.add("missing key", position, f"it has no {name!r}")
        elif not _is(row[name], kind):
            needed = {int: "a whole number from 0 on", str: "text", list: "a list"}[kind]
            problems.add("wrong type", position, f"{name!r} is {quoted(row[name])}, not {needed}")
        else:
            continue
        valid = False
    return valid


def _is(value: object, kind: type) -> bool:
    if kind is int:
        return type(value) is int and 0 <= value < 2**63
    return isinstance(value, kind)


def quoted(value: object) -> str:
    """A value as JSON for a message, shortened."""
    try:
        text = json.dumps(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits
        text = f"a huge {type(value).__name__}"
    return text if len(text) <= 40 else f"{text[:36]} ..."
