"""The keywords of the verbs are their settings: in the TypedDict, in the signature and in help()."""

import inspect
import os
import pydoc
import types
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest

import gtsa
from gtsa.comparison.arguments import CompareArguments
from gtsa.comparison.settings import Compare
from gtsa.core.settings import Strict
from gtsa.evaluation.arguments import EvaluateArguments
from gtsa.evaluation.settings import Evaluate, EvaluatorSettings
from gtsa.pretraining.arguments import PretrainArguments, RunArguments
from gtsa.pretraining.settings import MethodSettings, Pretrain

OWN = {  # parameters that are no keywords only
    "pretrain": ("data",),
    "preview": ("data", "out", "image", "epoch"),
    "evaluate": ("weights", "task"),
    "compare": ("methods",),
}
SETTINGS = {"pretrain": Pretrain, "preview": Pretrain, "evaluate": Evaluate, "compare": Compare}
ARGUMENTS = {
    "pretrain": PretrainArguments,
    "preview": RunArguments,
    "evaluate": EvaluateArguments,
    "compare": CompareArguments,
}
SECTIONS = {*MethodSettings, *EvaluatorSettings}  # a new method or evaluation is one file: editors need not know it


def fields(verb):
    return {name: field for name, field in SETTINGS[verb].model_fields.items() if name not in OWN[verb]}


def kinds(kind: Any) -> set:
    """The members of a union, without limits; each value of a Literal by itself."""
    if get_origin(kind) is Annotated:
        return kinds(get_args(kind)[0])
    if get_origin(kind) in (Union, types.UnionType):
        return set().union(*map(kinds, get_args(kind)))
    if get_origin(kind) is Literal:
        return {("literal", value) for value in get_args(kind)}
    if get_origin(kind) is dict or (isinstance(kind, type) and issubclass(kind, Strict)):
        return {("section",)}
    if get_origin(kind) is tuple and get_args(kind)[-1] is Ellipsis:
        return {("many", get_args(kind)[0])}
    return {kind}


def argument_kinds(kind: Any) -> set:
    """The same of an argument: one value or several stand for a tuple of any length, a mapping for a section."""
    actual = {member for member in kinds(kind) if member != os.PathLike[str]}  # a path is text or PathLike
    for member in list(actual):
        if get_origin(member) is Sequence:
            (element,) = argument_kinds(get_args(member)[0])
            assert element in actual, f"{kind}: one value without a sequence is accepted, too"
            actual = (actual - {member, element}) | {("many", element)}
        elif get_origin(member) is Mapping:
            assert get_args(member)[0] is str
            actual = (actual - {member}) | {("section",)}
    return actual


@pytest.mark.parametrize("verb", OWN)
def test_they_are_the_settings(verb):
    arguments = get_type_hints(ARGUMENTS[verb])
    assert set(arguments) - SECTIONS == set(fields(verb)) - SECTIONS
    assert set(arguments) <= set(fields(verb))
    assert ARGUMENTS[verb].__required_keys__ == frozenset()


@pytest.mark.parametrize("verb", OWN)
def test_they_have_the_types_of_the_settings(verb):
    for name, kind in get_type_hints(ARGUMENTS[verb]).items():
        assert argument_kinds(kind) == kinds(fields(verb)[name].annotation), name


@pytest.mark.parametrize("verb", OWN)
def test_the_signature_names_them_with_their_defaults(verb):
    parameters = inspect.signature(getattr(gtsa, verb)).parameters
    assert tuple(parameters)[: len(OWN[verb])] == OWN[verb]
    assert list(parameters)[len(OWN[verb]) :] == list(fields(verb))
    for name, field in fields(verb).items():
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert parameters[name].default == field.get_default(call_default_factory=True)


@pytest.mark.parametrize("verb", OWN)
def test_help_shows_them(verb):
    text = pydoc.render_doc(getattr(gtsa, verb), renderer=pydoc.plaintext)
    for name in fields(verb):
        assert f" {name}: " in text, name
