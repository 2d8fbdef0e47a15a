"""Strict settings: one definition for flags, YAML and Python, from a class or from a constructor's signature."""

from __future__ import annotations

import difflib
import io
import os
import reprlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Generic, Literal, Never, TypeAlias, TypeVar, get_args, get_origin

import docstring_parser
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from gtsa.core.errors import UserError
from gtsa.core.migration import SCHEMA, migrated, name_now
from gtsa.core.plugins import REQUIRED, Declared

if TYPE_CHECKING:
    # Once the plan is made every setting has a value, and this is its type to all who read it: none is auto or missing.
    Auto: TypeAlias = Never
    Missing: TypeAlias = Never
else:
    Auto = Literal["auto"]
    Missing = None
AUTO: Any = "auto"
MISSING: Any = None
Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
LARGEST, DEEPEST, MOST = 1_000_000, 20, 100_000  # of a file of settings: bytes, levels, values with those of aliases
SHOWN = reprlib.Repr()  # a wrong value as a message has it: never more than some lines of it
SHOWN.maxstring = SHOWN.maxother = 120


class Strict(BaseModel):
    """Unknown keys and wrong types are errors, and all of them are told at once."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _as_they_are_written(cls, values: Any) -> Any:
        """Lists are tuples, paths are text, and one value will do where several may be given."""
        if not isinstance(values, Mapping):
            return values
        found = {}
        for name, value in values.items():
            value = os.fspath(value) if isinstance(value, os.PathLike) else value
            kind = cls.model_fields[name].annotation if name in cls.model_fields else None
            if isinstance(value, list | tuple):
                value = tuple(os.fspath(v) if isinstance(v, os.PathLike) else v for v in value)
            elif get_origin(kind) is tuple and get_args(kind)[-1] is Ellipsis and isinstance(value, str | int | float):
                value = (value,)
            found[name] = value
        return found


class Documented(Strict):
    """Settings whose help stands under each of them, as a docstring. Looking for it takes pydantic a tenth of a second
    a class, so this is for classes that are written out.
    """

    model_config = ConfigDict(use_attribute_docstrings=True)


def is_auto(value: object) -> bool:
    """Whether a setting is left to gtsa."""
    return value == "auto"


S = TypeVar("S", bound=Strict)


def with_sections(base: type[S], name: str, sections: Mapping[str, type[Strict]], help_of: str) -> type[S]:
    """``base`` and a section of further settings for each of ``sections``, with their help."""
    base.model_config["use_attribute_docstrings"] = False  # has been done, and the sections have none
    fields: dict[str, Any] = {
        key: (kind, Field(kind(), description=help_of.format(key))) for key, kind in sections.items()
    }
    return create_model(name, __base__=base, **fields)


def settings_of(maker: Declared, name: str, skip: Collection[str] = (), auto: Collection[str] = ()) -> type[Strict]:
    """The keyword arguments of a constructor as settings: names, types, defaults and help from the constructor itself.

    Those of ``auto`` may be left to us, and are by default.
    """
    words = _described(maker.doc)
    fields: dict[str, Any] = {}
    for argument, (kind, default) in maker.arguments.items():
        if argument not in skip:
            assert default is not REQUIRED
            if argument in auto:
                kind, default = Auto | kind, "auto"
            fields[argument] = (kind, Field(default, description=words.get(argument)))
    return create_model(name, __base__=Strict, **fields)


def _described(docstring: str) -> dict[str, str]:
    """Help of arguments that share a line: ``a, b: help``."""
    found = {}
    for entry in docstring_parser.parse(docstring).params:
        for name in entry.arg_name.split(","):
            found[name.strip()] = " ".join((entry.description or "").split())
    return found


def validated(model: type[S], values: Mapping[str, Any], where: str = "") -> S:
    """Settings from plain values. Raises one UserError with every mistake."""
    try:
        return model(**values)
    except ValidationError as errors:
        told: dict[str, list[str]] = {}
        for error in errors.errors():
            name, message = _told(error, model)
            told.setdefault(name, []).append(message)
        lines = told.pop("", [])  # contradictions between settings name them themselves
        lines += [f"{name}: {' or '.join(dict.fromkeys(messages))}" for name, messages in told.items()]
    except UserError as remedy:
        lines = str(remedy).split("\n")
    lines = [line for text in lines for line in text.split("\n")]
    if len(lines) > 1:
        lines = ["several settings are wrong:", *(f"  {line}" for line in lines)]
    raise UserError((f"{where}: " if where else "") + "\n".join(lines))


def _told(error: Any, model: Any) -> tuple[str, str]:
    """The setting that an error of pydantic is about, and what to tell."""
    known, key = model, []
    for part in map(str, error["loc"]):  # what follows the setting's own name is the branch of its type
        fields = getattr(known, "model_fields", {})
        key.append(part)
        if part not in fields:
            break
        known = fields[part].annotation
        if get_origin(known) is dict:  # of the user's own names
            key += map(str, error["loc"][len(key) : len(key) + 1])
        if not hasattr(known, "model_fields"):
            break
    name = ".".join(key)
    if not name:
        return name, str(error["ctx"]["error"]) if "ctx" in error else error["msg"]
    if error["type"] == "extra_forbidden":
        if now := name_now(".".join(key[:-1]), key[-1]):
            return name, f"is called {now} now"
        near = difflib.get_close_matches(key[-1], list(getattr(known, "model_fields", {})), 1)
        return name, f"there is no such setting{f', did you mean {near[0]}?' if near else ''}"
    return name, f"{SHOWN.repr(error['input'])} {_lower(error['msg']).removeprefix('input ')}"


def _lower(text: str) -> str:
    return text[0].lower() + text[1:]


def read_yaml(path: str | Path, schema: int = SCHEMA) -> dict[str, Any]:
    """The settings in a YAML file: plain values only, no duplicate keys, nothing it names is imported.

    Args:
        schema: of a file that does not say (see core.migration).
    """
    try:
        with open(path, "rb") as file:
            text = file.read(LARGEST + 1)
    except (OSError, ValueError) as error:  # the latter of a path with a NUL
        raise UserError(f"--config {path}: {getattr(error, 'strerror', None) or error}") from None
    if len(text) > LARGEST:
        raise UserError(f"--config {path} has more than {LARGEST:,} bytes; that is no file of settings")
    try:
        values = YAML(typ="safe", pure=True).load(text.decode())
        _insist_on_plain(values)
    except RecursionError:
        raise UserError(f"--config {path} is nested too deeply; settings have at most {DEEPEST} levels") from None
    except (YAMLError, ValueError, TypeError) as error:  # ValueError: bytes that are not UTF-8, too
        told = " ".join(str(error).split())
        raise UserError(f"--config {path} is not plain YAML: {told[:300]}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"--config {path}: settings are lines of 'name: value'")
    return migrated(values, values.pop("schema", schema), f"--config {path}")


def _insist_on_plain(values: Any) -> None:
    """Raises ValueError where something is no plain value or no setting has its name, RecursionError where there is no
    end of levels. An alias may stand for far more values than the file has bytes, and for itself.
    """
    left, count = [(values, 0)], 0
    while left:
        value, depth = left.pop()
        count += 1
        if depth > DEEPEST:
            raise RecursionError
        if count > MOST:
            raise ValueError(f"it has more than {MOST:,} values")
        if isinstance(value, dict):
            if wrong := [key for key in value if not isinstance(key, str)]:
                raise ValueError(f"{SHOWN.repr(wrong[0])} is not the name of a setting; quote it if it is to be a name")
            left += [(inner, depth + 1) for inner in value.values()]
        elif isinstance(value, list):
            left += [(inner, depth + 1) for inner in value]
        elif not isinstance(value, str | int | float | None):
            raise ValueError(f"{SHOWN.repr(value)} is of type {type(value).__name__}; quote what is to be text")


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


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, tuple | list) else value


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``over`` on top of ``base``; sections are merged, not replaced."""
    both = {k: v for k, v in base.items() if not (k == "steps" and "epochs" in over)}
    if "steps" in over and "epochs" in both:
        del both["epochs"]  # they say the same thing: the later word counts
    for key, value in over.items():
        section = isinstance(value, Mapping) and isinstance(both.get(key), Mapping)
        both[key] = {**both[key], **value} if section else value
    return both


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by their dotted names, e.g. {"gtsa.momentum": 0.99}."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


def differences(old: Strict, new: Strict, prefix: str = "") -> list[str]:
    """A line 'name: old value, now new value' for every setting that differs."""
    lines = []
    for name in type(old).model_fields:
        before, after = getattr(old, name), getattr(new, name)
        if isinstance(before, Strict):
            lines += differences(before, after, f"{prefix}{name}.")
        elif before != after:
            lines.append(f"{prefix}{name}: {before}, now {after}")
    return lines


@dataclass
class Plan(Generic[S]):
    """Resolved settings, and a reason for each that was left to us."""

    settings: S
    reasons: dict[str, str]

    def settle(self, reasons: dict[str, str], **values: Any) -> None:
        self.settings = self.settings.model_copy(update=values)
        self.reasons |= reasons
