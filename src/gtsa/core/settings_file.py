"""Files of settings: plain YAML, from people and from gtsa."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from gtsa.core.errors import UserError
from gtsa.core.migration import SCHEMA, migrated
from gtsa.core.settings import SHORTENED, Strict

MAX_BYTES, MAX_LEVELS, MAX_VALUES = 1_000_000, 20, 100_000  # of a file of settings; values include those of aliases


def read_yaml(path: str | Path, schema: int = SCHEMA) -> dict[str, Any]:
    """The settings in a YAML file: plain values only, no duplicate keys, and no imports.

    Args:
        schema: of a file without a schema (see core.migration).
    """
    try:
        with open(path, "rb") as file:
            text = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL
        raise UserError(f"--config {path}: {getattr(error, 'strerror', None) or error}") from None
    if len(text) > MAX_BYTES:
        raise UserError(f"--config {path} has more than {MAX_BYTES:,} bytes; it is not a file of settings")
    try:
        values = YAML(typ="safe", pure=True).load(text.decode())
        _check_plain(values)
    except RecursionError:
        raise UserError(f"--config {path} is nested too deeply; settings have at most {MAX_LEVELS} levels") from None
    except (YAMLError, ValueError, TypeError) as error:  # ValueError: also bytes that are not UTF-8
        reason = " ".join(str(error).split())
        raise UserError(f"--config {path} is not plain YAML: {reason[:300]}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"--config {path}: settings are lines of 'name: value'")
    return migrated(values, values.pop("schema", schema), f"--config {path}")


def _check_plain(values: object) -> None:
    """Raises ValueError for a value that is not plain, a key that is not text, or too many values; RecursionError for
    too many levels. An alias can stand for far more values than the file has bytes, and for itself.
    """
    remaining, count = [(values, 0)], 0
    while remaining:
        value, depth = remaining.pop()
        count += 1
        if depth > MAX_LEVELS:
            raise RecursionError
        if count > MAX_VALUES:
            raise ValueError(f"it has more than {MAX_VALUES:,} values")
        if isinstance(value, dict):
            if wrong := [key for key in value if not isinstance(key, str)]:
                raise ValueError(f"{SHORTENED.repr(wrong[0])} is not the name of a setting; quote it if it is one")
            remaining += [(inner, depth + 1) for inner in value.values()]
        elif isinstance(value, list):
            remaining += [(inner, depth + 1) for inner in value]
        elif not isinstance(value, str | int | float | None):
            raise ValueError(f"{SHORTENED.repr(value)} is of type {type(value).__name__}; put text in quotes")


def to_yaml(settings: Strict) -> str:
    """Settings as YAML that ``read_yaml`` reads back."""
    return plain_yaml({"schema": SCHEMA, **settings.model_dump()})


def plain_yaml(values: Mapping[str, Any]) -> str:
    """Plain values as YAML."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    out = io.StringIO()
    yaml.dump(_plain(values), out)
    return out.getvalue()


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, tuple | list) else value
