"""Settings as flags: the command line has the names, types, defaults and help of the settings."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import reduce
from typing import Annotated, Any, get_args, get_origin

from cyclopts import Group, Parameter

from gtsa.core.settings import Strict, merged, validated, without_limits
from gtsa.core.settings_file import read_yaml, to_yaml

CONFIG = Parameter(
    name="--config",
    help="YAML file of settings; flags override it. May be given again: a later file overrides earlier ones.",
    negative=(),
)
Files = Annotated[tuple[str, ...], CONFIG]
PRINT = Parameter(negative=(), help="Print the settings as YAML and stop.")


def signature(model: type[Strict], *first: inspect.Parameter, skip: tuple[str, ...] = ()) -> inspect.Signature:
    """The signature of a verb whose keywords are the settings of ``model``, ``--config`` and ``--print-config``."""
    yaml = [
        keyword("config_files", Files, ()),
        keyword("print_config", Annotated[bool, PRINT], False),
    ]
    return inspect.Signature([*first, *_flags(model, Group("Settings", sort_key=1), skip=skip), *yaml])


def settings(flat: dict[str, Any], model: type[Strict], **more: object) -> dict[str, Any] | None:
    """The settings of a command line: flags override --config. None after --print-config has printed them."""
    files, print_only = flat.pop("config_files", ()), flat.pop("print_config", False)
    given = merged(read_files(files), {**_nested(flat), **more})
    if print_only:
        print(to_yaml(validated(model, given)), end="")
        return None
    return given


def read_files(files: Sequence[str]) -> dict[str, Any]:
    """The settings in YAML files, later ones over earlier ones."""
    return reduce(merged, map(read_yaml, files), {})


def _flags(model: type[Strict], group: Group, prefix: str = "", skip: tuple[str, ...] = ()) -> list[inspect.Parameter]:
    """A keyword for every setting of a model; sections become dotted flags (--views.local-crops-number)."""
    flags, sections = [], []
    for name, field in model.model_fields.items():
        if name in skip:
            continue
        kind: Any = field.annotation
        if isinstance(kind, type) and issubclass(kind, Strict):
            section = Group(f"--{name}.*", help=field.description or "", sort_key=2)
            sections += _flags(kind, section, f"{name}.")
            continue
        flag = f"--{prefix}{name}".replace("_", "-")
        off = (f"--{prefix}no-{name}",) if field.default is True else ()
        description = " ".join((field.description or "").split())
        bare = without_limits(kind)
        many = get_origin(bare) is tuple and get_args(bare)[-1] is Ellipsis  # --task knn linear
        text = description[:1].upper() + description[1:]
        parameter = Parameter(name=flag, group=group, help=text, negative=off, consume_multiple=many)
        flags.append(keyword(f"{prefix}{name}".replace(".", "__"), Annotated[bare, parameter], field.default))
    return flags + sections


def keyword(name: str, kind: Any, default: Any = None) -> inspect.Parameter:
    """A keyword of a verb's signature."""
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    """{"views__local_crops_number": 4} -> {"views": {"local_crops_number": 4}}"""
    values: dict[str, Any] = {}
    for name, value in flat.items():
        section, _, key = name.rpartition("__")
        (values.setdefault(section, {}) if section else values)[key] = value
    return values
