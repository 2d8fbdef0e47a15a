"""Directives that read gtsa's own definitions: flags from the settings, help of a verb, exit codes, the Python API."""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, get_args, get_origin

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import gtsa
from gtsa.cli.main import VERBS, app
from gtsa.comparison.settings import Compare
from gtsa.core.errors import EXIT_CODES
from gtsa.core.settings import Strict
from gtsa.evaluation.settings import Evaluate
from gtsa.pretraining import settings as pretraining

MODELS: dict[str, type[Strict]] = {"pretrain": pretraining.Pretrain, "evaluate": Evaluate, "compare": Compare}
NO_FLAG = {"evaluate": ("weights", "devices", "nodes"), "compare": ("rows", "pretrain", "evaluate", "tasks")}
NAMES = {int: "integer", float: "number", str: "text", bool: "true or false", dict: "mapping", Any: "value"}
BOUNDS = {"ge": "at least {}", "gt": "above {}", "le": "at most {}", "lt": "below {}"}
VIEWS = {
    **{name: f"above {least}, at most {most}; low, then high" for name, least, most in pretraining.VIEW_RANGES},
    **dict.fromkeys(pretraining.VIEW_SHARES, "from 0 to 1"),
    **{name: f"from 0 to {most}" for name, most in pretraining.VIEW_JITTER},
}


def kind_of(kind: Any) -> tuple[list[str], list[str]]:
    """The words for a type, and its limits, e.g. (["integer", "`auto`"], ["at least 1"])."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        words, limits = kind_of(arguments[0])
        return words, limits + limits_of(arguments[1:])
    if origin in (types.UnionType, typing.Union):
        parts = [kind_of(part) for part in arguments if part is not type(None)]
        return [word for words, _ in parts for word in words], [limit for _, limits in parts for limit in limits]
    if origin is Literal:
        return [f"`{value}`" for value in arguments], []
    if origin is tuple and arguments[-1] is Ellipsis:
        words, limits = kind_of(arguments[0])
        return [f"one or several ({' or '.join(words)})"], limits
    if origin is tuple:
        words, _ = kind_of(arguments[0])
        return [f"{len(arguments)} values ({' or '.join(words)})"], []
    return [NAMES.get(origin or kind, getattr(kind, "__name__", str(kind)))], []


def limits_of(metadata: typing.Iterable[Any]) -> list[str]:
    found = []
    for part in metadata:
        inner = getattr(part, "metadata", None)  # pydantic's Field
        found += limits_of(inner) if inner else []
        for name, text in BOUNDS.items():
            if isinstance(bound := getattr(part, name, None), int | float):
                found.append(text.format("2^63" if bound == 2**63 else f"{bound:g}"))
    return found


def shown(value: object) -> str:
    if value is None or value == ():
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return f"`{' '.join(f'{v:.4g}' if isinstance(v, float) else str(v) for v in value)}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def facts_of(words: list[str], limits: list[str], default: object, required: bool) -> str:
    facts = f"{' or '.join(dict.fromkeys(words))}{', ' if limits else ''}{', '.join(dict.fromkeys(limits))}"
    return f"{facts}; required" if required else f"{facts}; default {shown(default)}"


def escaped(text: str) -> str:
    """Plain text as MyST, its first letter a capital unless it names a value."""
    text = re.sub(r"([*\[\]<>$_])", r"\\\1", " ".join(text.split()))
    return text if text.startswith("auto") else text[:1].upper() + text[1:]


def option(flag: str, text: str, facts: str) -> str:
    return f"```{{option}} {flag}\n{escaped(text)} *{facts}*\n```\n"


def entries(verb: str, model: type[Strict], prefix: str = "") -> Iterator[str]:
    """MyST text: an option for every setting, then a section for every section of settings."""
    sections = []
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Strict):
            sections.append((name, field))
            continue
        words, limits = kind_of(field.annotation)
        limits += limits_of(field.metadata)
        if prefix == "views." and name in VIEWS:
            limits.append(VIEWS[name])
        flag = f"--{prefix}{name}".replace("_", "-")
        if field.default is True:
            flag += f", --{prefix}no-{name}".replace("_", "-")
        if not prefix and name in NO_FLAG.get(verb, ()):
            flag = name.upper() if name == "weights" else f"{name}:"
        default = field.get_default(call_default_factory=True)
        default = None if default == {} else default
        yield option(flag, field.description or "", facts_of(words, limits, default, field.is_required()))
    for name, field in sections:
        yield f"## `--{name}.*`\n\n{field.description or ''}\n"
        yield from entries(verb, field.annotation, f"{name}.")


class Settings(SphinxDirective):
    """``{gtsa-settings} VERB``: all flags of a verb with type, range, default and help."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        verb = self.arguments[0]
        text = "\n".join([f"```{{program}} gtsa {verb}\n```\n\n## Settings\n", *entries(verb, MODELS[verb])])
        return self.parse_text_to_nodes(text, allow_section_headings=True)


class Verbs(SphinxDirective):
    """A section for every verb without a page of its own."""

    def run(self) -> list[nodes.Node]:
        text = [line for verb in (*VERBS, "completion") if verb not in MODELS for line in verb_of(verb)]
        return self.parse_text_to_nodes("\n".join(text), allow_section_headings=True)


def verb_of(verb: str) -> Iterator[str]:
    """MyST text: what a verb is for, and its arguments."""
    arguments = app[verb].assemble_argument_collection(parse_docstring=True)
    yield f"## gtsa {verb}\n\n{escaped(app[verb].help or '')}\n\n```{{program}} gtsa {verb}\n```\n"
    for argument in arguments:
        if argument.names != ("*",):  # a group of arguments, which follow
            default = argument.field_info.default
            words, limits = kind_of(argument.hint)
            facts = facts_of(words, limits, default, default is inspect.Parameter.empty)
            yield option(", ".join(argument.names), argument.parameter.help or "", facts)


class ExitCodes(SphinxDirective):
    def run(self) -> list[nodes.Node]:
        rows: Mapping[int, str] = {**EXIT_CODES, 130: "stopped by Ctrl-C with nothing to save"}
        table = "| code | meaning |\n|---|---|\n" + "\n".join(f"| {code} | {text} |" for code, text in rows.items())
        return self.parse_text_to_nodes(table)


class Functions(SphinxDirective):
    """All names of ``gtsa.__all__``, with the keywords that stand for a page of settings left out."""

    def run(self) -> list[nodes.Node]:
        text = "```{eval-rst}\n"
        for name in gtsa.__all__:
            kind = "autoexception" if name == "UserError" else "autofunction"
            text += f".. {kind}:: gtsa.{name}{self._signature(name)}\n\n"
        return self.parse_text_to_nodes(f"{text}```\n")

    def _signature(self, name: str) -> str:
        if name not in MODELS and name not in ("preview", "profile"):
            return ""
        known = inspect.unwrap(getattr(gtsa, name))
        first = [
            parameter.replace(annotation=inspect.Parameter.empty)
            for parameter in inspect.Signature.from_callable(known).parameters.values()
            if parameter.kind is not inspect.Parameter.KEYWORD_ONLY
        ]
        inside = ", ".join(str(p) for p in first if p.kind is not inspect.Parameter.VAR_KEYWORD)
        return f"({inside}{', ' if inside else ''}**settings)"


def setup(sphinx: Sphinx) -> dict[str, bool]:
    sphinx.add_directive("gtsa-settings", Settings)
    sphinx.add_directive("gtsa-verbs", Verbs)
    sphinx.add_directive("gtsa-exit-codes", ExitCodes)
    sphinx.add_directive("gtsa-functions", Functions)
    return {"parallel_read_safe": True}
