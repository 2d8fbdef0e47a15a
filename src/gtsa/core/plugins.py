"""Finds the classes of a folder, and reads their declarations from source without importing them.

So the command line knows the settings of every method and every evaluation without torch.
"""

from __future__ import annotations

import ast
import importlib
import pkgutil
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

T = typing.TypeVar("T")
REQUIRED: Any = object()  # the default of an argument that has none


@dataclass(frozen=True)
class Declared:
    """A class as declared in its source.

    Attributes:
        summary: first line of the module's docstring.
        doc: docstring of the class.
        arguments: of the constructor, without ``self``: {name: (type, default or REQUIRED)}. The type is Any if it or
            the default needs an import.
        constants: class attributes, also those of the abstract base. Values that need an import are None, in a
            dictionary one by one.
    """

    summary: str
    doc: str
    arguments: dict[str, tuple[Any, Any]]
    constants: dict[str, Any] = field(default_factory=dict)


def declared(file: Path, name: str = "", base: str = "") -> Declared | None:
    """The class ``name``, or the first one with the base ``base``; None if there is none."""
    module = ast.parse(file.read_text(encoding="utf-8"))
    known = {key: getattr(typing, key) for key in ("Any", "Literal")}
    for key, expression in _assignments(module.body):
        value = _value(expression, known)
        if value is not None:
            known[key] = value
    for node in module.body:
        if isinstance(node, ast.ClassDef) and (node.name == name or base in map(ast.unparse, node.bases)):
            return Declared(
                (ast.get_docstring(module) or "").partition("\n")[0],
                ast.get_docstring(node) or "",
                _arguments(node, known),
                {key: _value(value, known) for key, value in _assignments(node.body)},
            )
    return None


def all_declared(folder: Path, base: str, source: Path) -> dict[str, Declared]:
    """{module: its class with the base ``base``} of all modules in ``folder``; ``source`` defines the base."""
    inherited = declared(source, base)
    assert inherited is not None
    declarations = {}
    for file in sorted(folder.glob("[!_]*.py")):
        own = declared(file, base=base)
        if own is not None:
            constants = {**inherited.constants, **own.constants}
            declarations[file.stem] = Declared(own.summary, own.doc, own.arguments, constants)
    return declarations


def classes(package: ModuleType, base: type[T]) -> dict[str, type[T]]:
    """{module: class} of every module in a package that defines a subclass of ``base``."""
    subclasses = {}
    for module in sorted(pkgutil.iter_modules(package.__path__), key=lambda m: m.name):
        name = f"{package.__name__}.{module.name}"
        for value in vars(importlib.import_module(name)).values():
            if isinstance(value, type) and issubclass(value, base) and value.__module__ == name and value is not base:
                subclasses[module.name] = value
    return subclasses


def _assignments(body: list[ast.stmt]) -> Iterator[tuple[str, ast.expr]]:
    for node in body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            yield node.targets[0].id, node.value
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            yield node.target.id, node.value


def _arguments(node: ast.ClassDef, known: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The arguments of ``__init__``, or the fields of a dataclass."""
    for part in node.body:
        if isinstance(part, ast.FunctionDef) and part.name == "__init__":
            arguments = part.args.args[1:] + part.args.kwonlyargs
            missing: list[ast.expr | None] = [None] * (len(part.args.args[1:]) - len(part.args.defaults))
            defaults = [*missing, *part.args.defaults, *part.args.kw_defaults]
            return {
                argument.arg: (_type_of(argument.annotation, known), _default(default, known))
                for argument, default in zip(arguments, defaults, strict=True)
            }
    return {
        part.target.id: (_type_of(part.annotation, known), _default(part.value, known))
        for part in node.body
        if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)
    }


def _type_of(node: ast.expr | None, known: Mapping[str, Any]) -> Any:
    value = None if node is None else _value(node, known)
    return Any if value is None else value


def _default(node: ast.expr | None, known: Mapping[str, Any]) -> Any:
    return REQUIRED if node is None else _value(node, known)


def _value(node: ast.expr, known: Mapping[str, Any]) -> Any:
    """The value of an expression of plain values, types and constants of its module; None if it needs an import."""
    try:
        return ast.literal_eval(node)
    except ValueError:  # types and constants
        pass
    try:
        return eval(compile(ast.Expression(node), "<declared>", "eval"), dict(known))  # the source is gtsa's own
    except (NameError, AttributeError, TypeError):
        if isinstance(node, ast.Dict) and all(node.keys):
            return {_value(key, known): _value(value, known) for key, value in zip(node.keys, node.values, strict=True)}  # type: ignore[arg-type]
        return None
