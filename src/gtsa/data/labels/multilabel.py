"""JSON with the list of classes that are in each image: {"1.jpg": ["cat", "dog"], "2.jpg": []}."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gtsa.data.labels import Kind, Labelled, Problems, divided
from gtsa.data.labels._classes import digest, listed, unique
from gtsa.data.labels._files import located
from gtsa.data.labels._json import parsed, told
from gtsa.data.sources.folder import Folder


@dataclass(frozen=True)
class Rows:
    """Which classes are in which image."""

    matrix: Tensor  # bool [images, classes]

    def __getitem__(self, index: int) -> Tensor:
        return self.matrix[index].clone()  # a view would take the whole matrix along to another process


class Several:
    """An object of image paths, from the images' folder on, with lists of class names.

    A file of parts holds several such objects, and may hold the ``classes`` in order:
    {"classes": [...], "train": {...}, "val": {...}}. LABELS is then FILE:PART, e.g. labels.json:train. Without
    ``classes`` there, or the list of ``classes`` from the user, they are all names in all parts, sorted.
    """

    @staticmethod
    def claims(images: str, labels: str | None, kind: Kind) -> bool:
        return (
            kind == "multilabel"
            and labels is not None
            and divided(labels)[0].lower().endswith(".json")
            and os.path.isdir(images)
        )

    @staticmethod
    def read(images: str, labels: str, kind: Kind, classes: str | None = None, **_: Any) -> Labelled:
        file, part = divided(labels)
        problems = Problems(labels)
        content = parsed(file, problems, unique=True)
        parts = _parts(content, file, part, problems)
        entries = parts[part or ""]
        names = listed(classes) or _classes(content, parts, problems)
        numbers = {name: number for number, name in enumerate(names)}
        files = located(images, ((f"image {name}", name) for name in entries), problems)
        unique("image", ((f"image {name}", f or name) for name, f in zip(entries, files, strict=True)), problems)
        matrix = torch.zeros(len(entries), len(names), dtype=torch.bool)
        for row, (name, given) in enumerate(entries.items()):
            for number in _numbers(f"image {name}", given, numbers, problems):
                matrix[row, number] = True
        if not names:
            problems.add("no classes", labels, "no image has any")
        if not entries:
            problems.add("no images", labels, "there is nothing in it")
        problems.insist()
        source = Folder(images, files=[f for f in files if f is not None])
        rows = (f"{name} {row.nonzero().flatten().tolist()}" for name, row in zip(source.files, matrix, strict=True))
        return Labelled(source, range(len(source)), Rows(matrix), kind, names, digest([names, *rows]))


def _parts(content: Mapping[str, Any], file: str, part: str | None, problems: Problems) -> Mapping[str, Any]:
    """The objects of images in a file by part; a file that is not divided has one, named ''."""
    inner = {key: value for key, value in content.items() if isinstance(value, dict)}
    parts = {key: value for key, value in inner.items() if key == part or (value and _images(value))}
    if part is not None and part not in parts:
        problems.add("unknown part", part, f"{file} has {', '.join(parts) or 'no parts'}")
    elif part is None and parts:
        problems.add("no part named", file, f"it has parts: write {' or '.join(f'{file}:{key}' for key in parts)}")
    problems.insist()
    return parts or {"": content}


def _images(value: Mapping[str, Any]) -> bool:
    return all(isinstance(given, list) for given in value.values())


def _classes(content: Mapping[str, Any], parts: Mapping[str, Any], problems: Problems) -> tuple[str, ...]:
    if "" not in parts and "classes" in content:
        given = content["classes"]
        if isinstance(given, list) and all(isinstance(name, str) for name in given):
            unique("class", ((f"classes[{place}]", name) for place, name in enumerate(given)), problems)
            return tuple(given)
        problems.add("wrong type", "classes", f"a list of names is needed, not {told(given)}")
    lists = (given for part in parts.values() for given in part.values() if isinstance(given, list))
    return tuple(sorted({name for given in lists for name in given if isinstance(name, str)}))


def _numbers(place: str, given: Any, numbers: Mapping[str, int], problems: Problems) -> list[int]:
    if not isinstance(given, list) or not all(isinstance(name, str) for name in given):
        problems.add("wrong type", place, f"a list of class names is needed, not {told(given)}")
        return []
    for name in given:
        if not name:
            problems.add("empty label", place, "a class has no name")
        elif name not in numbers:
            problems.add("unknown class", place, f"{name}: not in the list of {len(numbers)} classes")
    return [numbers[name] for name in given if name in numbers]
