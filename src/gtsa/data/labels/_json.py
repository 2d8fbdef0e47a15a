"""Labels in JSON: objects that have an id of their own and the fields they need, each of its type."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gtsa.data.labels import Problems

ONE = {"images": "image", "annotations": "annotation", "categories": "category"}


def parsed(file: str, problems: Problems, unique: bool = False, kinds: tuple[type, ...] = (dict,)) -> Any:
    """What a JSON file holds. Raises UserError through ``problems`` where it is none.

    Args:
        kinds: what it may hold: an object, unless lists are good as well.
        unique: a key that is written twice is a problem; without, the last one counts.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            seen = set()
            for key, _ in pairs:
                if key in seen:
                    problems.add("key that is written twice", key, "one of the two would be lost: keep one")
                seen.add(key)
        return found

    content: Any = None
    try:
        content = json.loads(Path(file).read_bytes(), object_pairs_hook=once if unique else None)
    except OSError as error:
        problems.add("file that cannot be read", file, error.strerror or str(error))
    except (ValueError, RecursionError) as error:  # ValueError: also text that is not UTF-8, and endless integers
        problems.add("not JSON", file, f"{error}: write it again")
    else:
        if not isinstance(content, kinds):
            problems.add("wrong type", file, f"an object {{...}} is needed, not {told(content)}")
    problems.insist()
    return content


def lists(content: Mapping[str, Any], problems: Problems) -> None:
    """Raises UserError through ``problems`` unless there are lists of images, annotations and categories."""
    for key in ONE:
        if key not in content:
            problems.add("missing key", key, f"the file has no {key!r}")
        elif not isinstance(content[key], list):
            problems.add("wrong type", key, f"a list of objects is needed, not {told(content[key])}")
        elif not content[key]:
            problems.add("empty list", key, "there is nothing in it")
    problems.insist()


def records(
    content: Mapping[str, Any], key: str, fields: Mapping[str, type], problems: Problems
) -> tuple[list[dict[str, Any]], set[int]]:
    """The objects of a list that have an id and all ``fields``; and the ids of all, for nothing is to be told twice.

    Args:
        fields: type of each; ``int`` is a whole number from 0 on, as ids are; ``object`` is anything.
    """
    sound, ids = [], set()
    for place, row in enumerate(content[key]):
        if not isinstance(row, dict):
            problems.add("wrong type", f"{key}[{place}]", f"an object {{...}} is needed, not {told(row)}")
        elif "id" not in row:
            problems.add("missing key", f"{key}[{place}]", "it has no 'id'")
        elif not _is(row["id"], int):
            problems.add("wrong type", f"{key}[{place}]", f"'id' is {told(row['id'])}, not a whole number from 0 on")
        elif row["id"] in ids:
            problems.add("duplicate id", f"{ONE[key]} {row['id']}", f"{key}[{place}] has the id of an earlier one")
        else:
            ids.add(row["id"])
            if _complete(row, f"{ONE[key]} {row['id']}", fields, problems):
                sound.append(row)
    return sound, ids


def _complete(row: Mapping[str, Any], place: str, fields: Mapping[str, type], problems: Problems) -> bool:
    good = True
    for name, kind in fields.items():
        if name not in row:
            problems.add("missing key", place, f"it has no {name!r}")
        elif not _is(row[name], kind):
            needed = {int: "a whole number from 0 on", str: "text", list: "a list"}[kind]
            problems.add("wrong type", place, f"{name!r} is {told(row[name])}, not {needed}")
        else:
            continue
        good = False
    return good


def _is(value: Any, kind: type) -> bool:
    if kind is int:
        return type(value) is int and 0 <= value < 2**63
    return isinstance(value, kind)


def told(value: Any) -> str:
    """A value for a message, short."""
    try:
        text = json.dumps(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits
        text = f"a huge {type(value).__name__}"
    return text if len(text) <= 40 else f"{text[:36]} ..."
