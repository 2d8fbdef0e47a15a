"""JSON with the list of classes in each image: {"1.jpg": ["cat", "dog"], "2.jpg": []}."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from gtsa.data.labels import Kind, LabelFormat, Labelled, LabelOptions, Problems, split_part
from gtsa.data.labels._classes import check_unique, digest, read_class_names
from gtsa.data.labels._files import locate
from gtsa.data.labels._json import parse_json, quoted
from gtsa.data.sources.folder import Folder


@dataclass(frozen=True)
class MultilabelTargets:
    """The classes in each image."""

    matrix: Tensor  # bool [images, classes]

    def __getitem__(self, index: int) -> Tensor:
        return self.matrix[index].clone()  # a view would carry the whole matrix to another process


class Multilabel(LabelFormat):
    """An object of image paths, relative to the images' folder, with lists of class names.

    A file of parts holds several such objects, and may hold the ``classes`` in order:
    {"classes": [...], "train": {...}, "val": {...}}. LABELS is then FILE:PART, e.g. labels.json:train. If neither
    the file nor the user lists ``classes``, they are all names in all parts, sorted.
    """

    needs: ClassVar[dict[Kind, str]] = {
        "multilabel": "a JSON object of image names with lists of classes, or FILE:PART where it is in parts"
    }

    @staticmethod
    def claims(images: str, labels: str | None, kind: Kind) -> bool:
        return (
            kind == "multilabel"
            and labels is not None
            and split_part(labels)[0].lower().endswith(".json")
            and os.path.isdir(images)
        )

    @staticmethod
    def read(images: str, labels: str, kind: Kind, options: LabelOptions) -> Labelled:
        file, part = split_part(labels)
        problems = Problems(labels)
        content = parse_json(file, problems, unique=True)
        parts = _read_parts(content, file, part, problems)
        entries = parts[part or ""]
        names = read_class_names(options.classes) or _read_classes(content, parts, problems)
        index_of = {name: index for index, name in enumerate(names)}
        files = locate(images, ((f"image {name}", name) for name in entries), problems)
        check_unique("image", ((f"image {name}", f or name) for name, f in zip(entries, files, strict=True)), problems)
        matrix = torch.zeros(len(entries), len(names), dtype=torch.bool)
        for row, (name, given) in enumerate(entries.items()):
            for index in _class_indices(f"image {name}", given, index_of, problems):
                matrix[row, index] = True
        if not names:
            problems.add("no classes", labels, "no image has a class")
        if not entries:
            problems.add("no images", labels, "the object is empty")
        problems.raise_if_any()
        source = Folder(images, files=[f for f in files if f is not None])
        rows = (f"{name} {row.nonzero().flatten().tolist()}" for name, row in zip(source.files, matrix, strict=True))
        return Labelled(source, range(len(source)), MultilabelTargets(matrix), kind, names, digest([names, *rows]))


def _read_parts(content: Mapping[str, Any], file: str, part: str | None, problems: Problems) -> Mapping[str, Any]:
    """The objects of images in a file by part. A file without parts has one object, named ''."""
    inner = {key: value for key, value in content.items() if isinstance(value, dict)}
    parts = {key: value for key, value in inner.items() if key == part or (value and _has_images(value))}
    if part is not None and part not in parts:
        problems.add("unknown part", part, f"{file} has {', '.join(parts) or 'no parts'}")
    elif part is None and parts:
        problems.add(
            "no part named", file, f"the file has parts: write {' or '.join(f'{file}:{key}' for key in parts)}"
        )
    problems.raise_if_any()
    return parts or {"": content}


def _has_images(value: Mapping[str, Any]) -> bool:
    return all(isinstance(given, list) for given in value.values())


def _read_classes(content: Mapping[str, Any], parts: Mapping[str, Any], problems: Problems) -> tuple[str, ...]:
    if "" not in parts and "classes" in content:
        given = content["classes"]
        if isinstance(given, list) and all(isinstance(name, str) for name in given):
            check_unique("class", ((f"classes[{position}]", name) for position, name in enumerate(given)), problems)
            return tuple(given)
        problems.add("wrong type", "classes", f"a list of names is needed, not {quoted(given)}")
    lists = (given for part in parts.values() for given in part.values() if isinstance(given, list))
    return tuple(sorted({name for given in lists for name in given if isinstance(name, str)}))


def _class_indices(position: str, given: object, index_of: Mapping[str, int], problems: Problems) -> list[int]:
    if not isinstance(given, list) or not all(isinstance(name, str) for name in given):
        problems.add("wrong type", position, f"a list of class names is needed, not {quoted(given)}")
        return []
    for name in given:
        if not name:
            problems.add("empty label", position, "a class has no name")
        elif name not in index_of:
            problems.add("unknown class", position, f"{name}: not in the list of {len(index_of)} classes")
    return [index_of[name] for name in given if name in index_of]
