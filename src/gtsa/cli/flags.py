"""Settings to flags: the command line takes the names, types, defaults and help that settings have."""

from __future__ import annotations

import inspect
from functools import reduce
from operator import or_
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from cyclopts import Group, Parameter

from gtsa.core.settings import merged, read_yaml, to_yaml, validated

CONFIG = Parameter(name="--config", help="YAML file of settings; flags come on top.")
PRINT = Parameter(negative=(), help="Print the settings as YAML and stop.")


def signature(model: Any, *first: inspect.Parameter, skip: tuple[str, ...] = ()) -> inspect.Signature:
    """Of a verb whose keywords are the settings of ``model``, ``--config`` and ``--print-config``."""
    yaml = [
        _keyword("config_file", Annotated[str | None, CONFIG]),
        _keyword("print_config", Annotated[bool, PRINT], False),
    ]
    return inspect.Signature([*first, *_flags(model, Group("Settings", sort_key=1), skip=skip), *yaml])


def settings(flat: dict[str, Any], model: Any, **more: Any) -> dict[str, Any] | None:
    """The settings of a command line: flags on top of --config; None where --print-config has shown them."""
    file, stop = flat.pop("config_file", None), flat.pop("print_config", False)
    given = merged(read_yaml(file) if file else {}, {**_nested(flat), **more})
    if stop:
        print(to_yaml(validated(model, given)), end="")
        return None
    return given


def _flags(model: Any, group: Group, prefix: str = "", skip: tuple[str, ...] = ()) -> list[inspect.Parameter]:
    """A keyword for every setting of a model; sections become dotted flags (--views.local-crops-number)."""
    flags, sections = [], []
    for name, field in model.model_fields.items():
        if name in skip:
            continue
        if hasattr(field.annotation, "model_fields"):
            section = Group(f"--{name}.*", help=field.description or "", sort_key=2)
            sections += _flags(field.annotation, section, f"{name}.")
            continue
        flag = f"--{prefix}{name}".replace("_", "-")
        off = (f"--{prefix}no-{name}",) if field.default is True else ()
        words = " ".join((field.description or "").split())
        bare = _bare(field.annotation)
        many = get_origin(bare) is tuple and get_args(bare)[-1] is Ellipsis  # --task knn linear
        text = words[:1].upper() + words[1:]
        shown = Parameter(name=flag, group=group, help=text, negative=off, consume_multiple=many)
        kind = Annotated[bare, shown]  # type: ignore[valid-type]
        flags.append(_keyword(f"{prefix}{name}".replace(".", "__"), kind, field.default))
    return flags + sections


def _bare(kind: Any) -> Any:
    """A type without its limits: these are checked for flags, YAML and Python alike, in core.settings.validated."""
    if get_origin(kind) is Annotated:
        return _bare(get_args(kind)[0])
    if isinstance(kind, UnionType) or get_origin(kind) is Union:
        kinds: Any = tuple(map(_bare, get_args(kind)))
        return reduce(or_, kinds)
    return kind


def _keyword(name: str, kind: Any, default: Any = None) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    """{"views__local_crops_number": 4} -> {"views": {"local_crops_number": 4}}"""
    values: dict[str, Any] = {}
    for name, value in flat.items():
        section, _, key = name.rpartition("__")
        (values.setdefault(section, {}) if section else values)[key] = value
    return values
