"""The JSON of iNaturalist 2017 to 2021: lists of images, annotations and categories, one category an image."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, ClassVar

from gtsa.data.labels import Kind, LabelFormat, Labelled, LabelOptions, Problems
from gtsa.data.labels._classes import check_unique, label_images, read_class_names
from gtsa.data.labels._files import locate
from gtsa.data.labels._json import check_lists, check_records, parse_json
from gtsa.data.sources.folder import Folder

LISTS = re.compile(rb'"(images|annotations|categories)"\s*:\s*\[\s*\{')  # a multilabel file has none of these


class INaturalist(LabelFormat):
    """``file_name`` starts at the images' folder. The classes are all categories in the order of their ids."""

    needs: ClassVar[dict[Kind, str]] = {"classes": "iNaturalist JSON"}

    @staticmethod
    def claims(images: str, labels: str | None, kind: Kind) -> bool:
        return (
            kind == "classes"
            and labels is not None
            and labels.lower().endswith(".json")
            and os.path.isdir(images)
            and os.path.isfile(labels)
            and LISTS.search(Path(labels).read_bytes()) is not None
        )

    @staticmethod
    def read(images: str, labels: str, kind: Kind, options: LabelOptions) -> Labelled:
        problems = Problems(labels)
        content = parse_json(labels, problems)
        check_lists(content, problems)
        categories, category_ids = check_records(content, "categories", {"name": str}, problems)
        pictures, image_ids = check_records(content, "images", {"file_name": str}, problems)
        annotations, _ = check_records(content, "annotations", {"image_id": int, "category_id": int}, problems)
        categories.sort(key=lambda category: category["id"])
        names = {category["id"]: category["name"] for category in categories}
        check_unique("category", ((f"category {number}", name) for number, name in names.items()), problems)
        category_of = _check_annotations(annotations, image_ids, category_ids, problems)
        files = _find_files(images, pictures, problems)
        annotated = category_of.keys() | _annotated_images(content["annotations"])
        for row in pictures:
            if row["id"] not in annotated:
                problems.add("image without a label", f"image {row['id']}", f"{row['file_name']}: it has no annotation")
        labelled = [names.get(category_of.get(row["id"], -1)) for row in pictures]
        classes = read_class_names(options.classes) or tuple(names.values())
        return label_images(Folder(images, files=files), labelled, classes, kind, problems)


def _check_annotations(
    annotations: list[dict[str, Any]], image_ids: set[int], category_ids: set[int], problems: Problems
) -> dict[int, int]:
    """The category of each image, by ids."""
    category_of: dict[int, int] = {}
    for row in annotations:
        position, image, category = f"annotation {row['id']}", row["image_id"], row["category_id"]
        if image not in image_ids:
            problems.add("unknown image id", position, f"there is no image {image}")
        if category not in category_ids:
            problems.add("unknown category id", position, f"there is no category {category}")
        if category_of.setdefault(image, category) != category:
            message = f"image {image} has category {category_of[image]} already, not {category}"
            problems.add("two labels for one image", position, message)
    return category_of


def _find_files(images: str, pictures: list[dict[str, Any]], problems: Problems) -> list[str]:
    """Paths below ``images``. A file that is missing keeps its name in the labels."""
    paths = locate(images, ((f"image {row['id']}", row["file_name"]) for row in pictures), problems)
    files = [row["file_name"] if path is None else path for row, path in zip(pictures, paths, strict=True)]
    check_unique("image", ((f"image {row['id']}", file) for row, file in zip(pictures, files, strict=True)), problems)
    return files


def _annotated_images(annotations: list[Any]) -> set[int]:
    """Images that any annotation names, even an annotation with a fault."""
    ids = (row.get("image_id") for row in annotations if isinstance(row, dict))
    return {number for number in ids if isinstance(number, int)}
