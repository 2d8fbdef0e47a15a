"""The JSON of iNaturalist 2017 to 2021: lists of images, annotations and categories, one category an image."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from gtsa.data.labels import Kind, Labelled, Problems
from gtsa.data.labels._classes import listed, one_each, unique
from gtsa.data.labels._files import located
from gtsa.data.labels._json import lists, parsed, records
from gtsa.data.sources.folder import Folder

OURS = re.compile(rb'"(images|annotations|categories)"\s*:\s*\[\s*\{')  # lists of classes by image have none of these


class INaturalist:
    """``file_name`` starts at the images' folder; the classes are all categories in the order of their ids."""

    @staticmethod
    def claims(images: str, labels: str | None, kind: Kind) -> bool:
        return (
            kind == "classes"
            and labels is not None
            and labels.lower().endswith(".json")
            and os.path.isdir(images)
            and os.path.isfile(labels)
            and OURS.search(Path(labels).read_bytes()) is not None
        )

    @staticmethod
    def read(images: str, labels: str, kind: Kind, classes: str | None = None, **_: Any) -> Labelled:
        problems = Problems(labels)
        content = parsed(labels, problems)
        lists(content, problems)
        categories, known = records(content, "categories", {"name": str}, problems)
        pictures, seen = records(content, "images", {"file_name": str}, problems)
        given, _ids = records(content, "annotations", {"image_id": int, "category_id": int}, problems)
        categories.sort(key=lambda category: category["id"])
        names = {category["id"]: category["name"] for category in categories}
        unique("category", ((f"category {number}", name) for number, name in names.items()), problems)
        labels_of: dict[int, int] = {}
        for row in given:
            place, image, category = f"annotation {row['id']}", row["image_id"], row["category_id"]
            if image not in seen:
                problems.add("unknown image id", place, f"there is no image {image}")
            if category not in known:
                problems.add("unknown category id", place, f"there is no category {category}")
            if labels_of.setdefault(image, category) != category:
                told = f"image {image} has category {labels_of[image]} already, not {category}"
                problems.add("two labels for one image", place, told)
        found = located(images, ((f"image {row['id']}", row["file_name"]) for row in pictures), problems)
        files: list[str] = [
            row["file_name"] if file is None else file for row, file in zip(pictures, found, strict=True)
        ]
        unique("image", ((f"image {row['id']}", file) for row, file in zip(pictures, files, strict=True)), problems)
        annotated = labels_of.keys() | _images_of(content["annotations"])
        for row in pictures:
            if row["id"] not in annotated:
                problems.add("image without a label", f"image {row['id']}", f"{row['file_name']}: no annotation has it")
        labelled = [names.get(labels_of.get(row["id"], -1)) for row in pictures]
        source = Folder(images, files=files)
        return one_each(source, labelled, listed(classes) or tuple(names.values()), kind, problems)


def _images_of(annotations: list[Any]) -> set[int]:
    """Images that any annotation speaks of, even one that is told as a problem."""
    numbers = (row.get("image_id") for row in annotations if isinstance(row, dict))
    return {number for number in numbers if isinstance(number, int)}
