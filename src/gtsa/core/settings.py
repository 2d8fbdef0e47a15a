"""Strict settings: one definition for flags, YAML and Python, from a class or from a constructor's signature."""

from __future__ import annotations

import difflib
import inspect
import os
import reprlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import or_
from types import UnionType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Generic,
    Literal,
    Never,
    Protocol,
    Self,
    TypeAlias,
    TypeVar,
    Union,
    get_args,
    get_origin,
)

import docstring_parser
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator
from pydantic_core import ErrorDetails

from gtsa.core.errors import UserError
from gtsa.core.migration import name_now
from gtsa.core.plugins import REQUIRED, Declared

if TYPE_CHECKING:
    # For type checkers: after planning no setting is "auto" or missing, so both add nothing to a setting's type.
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
SHORTENED = reprlib.Repr()  # shortens a wrong value for a message
SHORTENED.maxstring = SHORTENED.maxother = 120


class Strict(BaseModel):
    """Unknown keys and wrong types are errors. All errors are reported at once."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _accept_written_forms(cls, values: object) -> object:
        """Lists become tuples, paths become text, and a single value becomes a tuple where several are allowed."""
        if not isinstance(values, Mapping):
            return values
        converted = {}
        for name, value in values.items():
            value = os.fspath(value) if isinstance(value, os.PathLike) else value
            kind = cls.model_fields[name].annotation if name in cls.model_fields else None
            if isinstance(value, list | tuple):
                value = tuple(os.fspath(v) if isinstance(v, os.PathLike) else v for v in value)
            elif get_origin(kind) is tuple and get_args(kind)[-1] is Ellipsis and isinstance(value, str | int | float):
                value = (value,)
            converted[name] = value
        return converted


class Documented(Strict):
    """Settings with a docstring under each as its help. pydantic needs a tenth of a second a class to read these, so
    this is only for classes that are written out.
    """

    model_config = ConfigDict(use_attribute_docstrings=True)


def without_limits(kind: Any) -> Any:
    """A type as users write it: no limits, which ``validated`` checks, and a dictionary for a section."""
    if get_origin(kind) is Annotated:
        return without_limits(get_args(kind)[0])
    if isinstance(kind, UnionType) or get_origin(kind) is Union:
        return reduce(or_, map(without_limits, get_args(kind)))
    return dict if isinstance(kind, type) and issubclass(kind, Strict) else kind


F = TypeVar("F", bound=Callable[..., Any])


def with_keywords(model: type[Strict], skip: Collection[str] = ()) -> Callable[[F], F]:
    """Gives a function that takes ``**settings`` of ``model`` a signature which names them, for help() and editors."""

    def named(function: F) -> F:
        own = inspect.signature(function)
        first = [p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        given = {*skip, *(p.name for p in first)}
        keywords = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=field.get_default(call_default_factory=True),
                annotation=without_limits(field.annotation),
            )
            for name, field in model.model_fields.items()
            if name not in given
        ]
        function.__signature__ = own.replace(parameters=[*first, *keywords])  # type: ignore[attr-defined]
        return function

    return named


def is_auto(value: object) -> bool:
    """Whether gtsa chooses the value of a setting."""
    return value == "auto"


S = TypeVar("S", bound=Strict)


def with_sections(base: type[S], name: str, sections: Mapping[str, type[Strict]], help_of: str) -> type[S]:
    """``base`` with a section of further settings for each of ``sections``."""
    base.model_config["use_attribute_docstrings"] = False  # read already; sections have no docstrings
    fields: dict[str, Any] = {
        key: (kind, Field(kind(), description=help_of.format(key))) for key, kind in sections.items()
    }
    return create_model(name, __base__=base, **fields)


def settings_of(declared: Declared, name: str, skip: Collection[str] = (), auto: Collection[str] = ()) -> type[Strict]:
    """The keyword arguments of a constructor as settings: names, types, defaults and help from the constructor itself.

    Arguments in ``auto`` may be "auto", and are by default.
    """
    help_of = _argument_help(declared.doc)
    fields: dict[str, Any] = {}
    for argument, (kind, default) in declared.arguments.items():
        if argument not in skip:
            assert default is not REQUIRED
            if argument in auto:
                kind, default = Auto | kind, "auto"
            fields[argument] = (kind, Field(default, description=help_of.get(argument)))
    return create_model(name, __base__=Strict, **fields)


def _argument_help(docstring: str) -> dict[str, str]:
    """The help of each argument. Arguments may share a line: ``a, b: help``."""
    help_of = {}
    for entry in docstring_parser.parse(docstring).params:
        for name in entry.arg_name.split(","):
            help_of[name.strip()] = " ".join((entry.description or "").split())
    return help_of


def validated(model: type[S], values: Mapping[str, Any], where: str = "") -> S:
    """Settings from plain values. Raises one UserError with all errors."""
    try:
        return model(**values)
    except ValidationError as errors:
        messages_of: dict[str, list[str]] = {}
        for error in errors.errors():
            name, message = _setting_and_message(error, model)
            messages_of.setdefault(name, []).append(message)
        lines = messages_of.pop("", [])  # errors about several settings name them in the message
        lines += [f"{name}: {' or '.join(dict.fromkeys(messages))}" for name, messages in messages_of.items()]
    except UserError as error:
        lines = str(error).split("\n")
    lines = [line for text in lines for line in text.split("\n")]
    if len(lines) > 1:
        lines = ["several settings are wrong:", *(f"  {line}" for line in lines)]
    raise UserError((f"{where}: " if where else "") + "\n".join(lines))


def _setting_and_message(error: ErrorDetails, model: type[Strict]) -> tuple[str, str]:
    """The setting that an error of pydantic is about, and a message."""
    section: object = model
    key: list[str] = []
    for part in map(str, error["loc"]):  # the parts after the setting's name are branches of its type
        fields = getattr(section, "model_fields", {})
        key.append(part)
        if part not in fields:
            break
        section = fields[part].annotation
        if get_origin(section) is dict:  # its keys are names that the user chose
            key += map(str, error["loc"][len(key) : len(key) + 1])
        if not hasattr(section, "model_fields"):
            break
    name = ".".join(key)
    if not name:
        return name, str(error["ctx"]["error"]) if "ctx" in error else error["msg"]
    if error["type"] == "extra_forbidden":
        if now := name_now(".".join(key[:-1]), key[-1]):
            return name, f"is called {now} now"
        near = difflib.get_close_matches(key[-1], list(getattr(section, "model_fields", {})), 1)
        return name, f"there is no such setting{f', did you mean {near[0]}?' if near else ''}"
    return name, f"{SHORTENED.repr(error['input'])} {_lower(error['msg']).removeprefix('input ')}"


def _lower(text: str) -> str:
    return text[0].lower() + text[1:]


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``over`` on top of ``base``; sections are merged, not replaced."""
    result = {k: v for k, v in base.items() if not (k == "steps" and "epochs" in over)}
    if "steps" in over and "epochs" in result:
        del result["epochs"]  # both set the length: the later one counts
    for key, value in over.items():
        section = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = {**result[key], **value} if section else value
    return result


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by their dotted names, e.g. {"gtsa.momentum": 0.99}."""
    flattened: dict[str, Any] = {}
    for name, value in values.items():
        flattened |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flattened


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


class HasModelCopy(Protocol):
    """Settings, of which a copy with other values can be made."""

    def model_copy(self, *, update: Mapping[str, Any] | None = None) -> Self: ...


P = TypeVar("P", bound=HasModelCopy)


@dataclass
class Plan(Generic[P]):
    """Resolved settings, and a reason for each that was left to gtsa."""

    settings: P
    reasons: dict[str, str]

    def settle(self, reasons: dict[str, str], **values: Any) -> None:
        self.settings = self.settings.model_copy(update=values)
        self.reasons |= reasons
