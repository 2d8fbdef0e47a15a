"""COCO's JSON for detection: boxes with classes, and masks as polygons or run lengths."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gtsa.core.terminal import say
from gtsa.data.labels import Boxes, Kind, LabelFormat, Labelled, LabelOptions, Problems
from gtsa.data.labels._classes import check_unique, digest
from gtsa.data.labels._files import locate, read_sizes
from gtsa.data.labels._json import check_lists, check_records, parse_json, quoted
from gtsa.data.labels._shapes import InvalidShape, Shape, check_box, check_number, check_shape, draw_mask
from gtsa.data.sources.folder import Folder


class _Instance(NamedTuple):
    image: int  # index
    box: tuple[float, float, float, float]  # x, y, width, height
    category: int  # index of the class
    crowd: bool
    area: float
    id: int
    shape: Shape | None


@dataclass(frozen=True)
class Instances:
    """All instances of all images, ordered by image. Masks are drawn when an image is read."""

    starts: Sequence[int]  # index of each image's first instance, and the end
    sizes: Sequence[tuple[int, int]]  # width, height of each image
    boxes: Tensor
    classes: Tensor
    crowd: Tensor
    areas: Tensor
    ids: Tensor
    shapes: Sequence[Shape] | None

    def __getitem__(self, index: int) -> Boxes:
        own = slice(self.starts[index], self.starts[index + 1])
        width, height = self.sizes[index]
        masks = None
        if self.shapes is not None:
            each = [draw_mask(shape, width, height) for shape in self.shapes[own]]
            masks = torch.stack(each) if each else torch.zeros(0, height, width, dtype=torch.bool)
        boxes, classes, crowd, areas, ids = (
            whole[own].clone()  # a view would carry the whole tensor to another process
            for whole in (self.boxes, self.classes, self.crowd, self.areas, self.ids)
        )
        return Boxes(boxes, classes, masks, crowd, areas, ids)


class Coco(LabelFormat):
    """``file_name`` starts at the images' folder. The classes are the categories in the order of the file's ids.

    ``area`` is required: metrics by object size use it. ``iscrowd`` is 0 where it is missing. Boxes and polygons may
    extend 1 px over the edge of the image. Instances with an empty box and area 0 (COCO train2017 has two) are left out
    and reported. An empty box with another area is a fault.
    """

    needs: ClassVar[dict[Kind, str]] = {"boxes": "a COCO JSON file"}

    @staticmethod
    def claims(images: str, labels: str | None, kind: Kind) -> bool:
        return kind == "boxes" and (labels or "").lower().endswith(".json") and os.path.isdir(images)

    @staticmethod
    def read(images: str, labels: str, kind: Kind, options: LabelOptions) -> Labelled:
        problems = Problems(labels)
        content = parse_json(labels, problems)
        check_lists(content, problems)
        categories, known = check_records(content, "categories", {"name": str}, problems)
        categories.sort(key=lambda category: category["id"])
        check_unique("category", ((f"category {row['id']}", row["name"]) for row in categories), problems)
        fields = {"file_name": str, "width": int, "height": int}
        pictures, seen = check_records(content, "images", fields, problems)
        files = _find_files(images, pictures, problems)
        instances = _read_instances(content, pictures, seen, categories, known, problems)
        problems.raise_if_any()
        instances.sort(key=lambda instance: instance.image)
        has_masks = _has_masks(instances, labels, problems)
        names = [(row["id"], row["name"]) for row in categories]
        image_sizes = [(row["width"], row["height"]) for row in pictures]
        return Labelled(
            source=Folder(images, files=files),
            indices=range(len(files)),
            targets=_pack(instances, image_sizes, has_masks),
            kind=kind,
            classes=tuple(name for _, name in names),
            digest=digest([names, *zip(files, image_sizes, strict=True), *map(_digest_values, instances)]),
            category_ids=tuple(number for number, _ in names),
            image_ids=tuple(row["id"] for row in pictures),
            has_masks=has_masks,
            groups=_groups(categories),
        )


def _groups(categories: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """Supercategories, where every category has one."""
    names = [row.get("supercategory") for row in categories]
    return tuple(map(str, names)) if all(isinstance(name, str) and name for name in names) else ()


def _find_files(images: str, pictures: Sequence[dict[str, Any]], problems: Problems) -> list[str]:
    """Paths below ``images``. Each file must exist, be named once, and have the size in the labels."""
    positions = [f"image {row['id']}" for row in pictures]
    paths = locate(
        images, ((position, row["file_name"]) for position, row in zip(positions, pictures, strict=True)), problems
    )
    existing = [
        (position, row, name)
        for position, row, name in zip(positions, pictures, paths, strict=True)
        if name is not None
    ]
    check_unique("image", ((position, name) for position, _, name in existing), problems)
    files = [os.path.join(images, name) for *_, name in existing]
    for (position, row, name), size in zip(existing, read_sizes(files), strict=True):
        if isinstance(size, str):
            problems.add("image that cannot be read", position, f"{name}: {size}")
        elif size != (row["width"], row["height"]):
            sizes = f"{row['width']} x {row['height']} px in the labels, the upright image has {size[0]} x {size[1]} px"
            problems.add("image of another size", position, f"{name}: {sizes}")
    return [name for *_, name in existing]


def _read_instances(
    content: dict[str, Any],
    pictures: Sequence[dict[str, Any]],
    seen: set[int],
    categories: Sequence[dict[str, Any]],
    known: set[int],
    problems: Problems,
) -> list[_Instance]:
    image_of = {row["id"]: (index, row["width"], row["height"]) for index, row in enumerate(pictures)}
    class_of = {row["id"]: index for index, row in enumerate(categories)}
    fields = {"image_id": int, "category_id": int, "bbox": object, "area": object}
    instances, empty = [], []
    for row in check_records(content, "annotations", fields, problems)[0]:
        position, image, category = f"annotation {row['id']}", row["image_id"], row["category_id"]
        if image not in seen:
            problems.add("unknown image id", position, f"there is no image {image}")
        if category not in known:
            problems.add("unknown category id", position, f"there is no category {category}")
        if image not in image_of:  # reported already, here or as an image
            continue
        instance = _read_instance(row, position, *image_of[image], class_of.get(category, -1), problems)
        if instance is None:
            continue
        if not _is_empty(instance.box):
            instances.append(instance)
        elif instance.area == 0:
            empty.append(instance.id)
        else:
            problems.add(
                "empty box with an area", position, f"'bbox' is {quoted(row['bbox'])}, 'area' is {quoted(row['area'])}"
            )
    if empty:
        few = ", ".join(map(str, empty[:10])) + (", ..." if len(empty) > 10 else "")
        say(f"annotations with an empty box and area 0 are left out: {len(empty):,} (id {few})")
    return instances


def _read_instance(
    row: dict[str, Any], position: str, image: int, width: int, height: int, category: int, problems: Problems
) -> _Instance | None:
    """The instance of a valid annotation. Otherwise every fault is added to the problems, and None is returned."""
    parts: dict[str, Any] = {}
    checks: dict[str, Callable[[], Any]] = {
        "area": lambda: _check_area(row["area"]),
        "box": lambda: check_box(row["bbox"], width, height),
        "crowd": lambda: _check_crowd(row.get("iscrowd", 0)),
        "shape": lambda: check_shape(row.get("segmentation", []), width, height),
    }
    for name, check in checks.items():
        try:
            parts[name] = check()
        except InvalidShape as fault:
            problems.add(fault.kind, position, fault.message)
    if len(parts) < len(checks):
        return None
    return _Instance(image=image, category=category, id=row["id"], **parts)


def _is_empty(box: tuple[float, float, float, float]) -> bool:
    """Whether noinstance is left of it in the precision of Boxes."""
    x, y, w, h = box
    return not (np.float32(x + w) > np.float32(x) and np.float32(y + h) > np.float32(y))


def _check_area(value: object) -> float:
    if (area := check_number(value, "'area'")) < 0:
        raise InvalidShape("negative area", f"'area' is {quoted(value)}")
    return area


def _check_crowd(value: object) -> bool:
    if value not in (0, 1):
        raise InvalidShape("wrong type", f"'iscrowd' is {quoted(value)}, not 0 or 1")
    return bool(value)


def _has_masks(instances: Sequence[_Instance], labels: str, problems: Problems) -> bool:
    """Whether masks are used. If most annotations have a mask, the others are faults. If few have one, none is used."""
    count = sum(instance.shape is not None for instance in instances)
    if len(instances) / 2 < count < len(instances):
        for instance in instances:
            if instance.shape is None:
                problems.add("annotation without a mask", f"annotation {instance.id}", "others have a 'segmentation'")
        problems.raise_if_any()
    if 0 < count < len(instances):
        say(f"{labels}: {len(instances) - count:,} of {len(instances):,} annotations have no mask; only boxes are used")
    return 0 < count == len(instances)


def _pack(instances: Sequence[_Instance], image_sizes: Sequence[tuple[int, int]], has_masks: bool) -> Instances:
    """``instances`` are ordered by image."""
    counts = np.bincount(
        np.array([instance.image for instance in instances], dtype=np.int64), minlength=len(image_sizes)
    )
    corners = [(x, y, x + w, y + h) for x, y, w, h in (instance.box for instance in instances)]
    return Instances(
        starts=[0, *np.cumsum(counts).tolist()],
        sizes=image_sizes,
        boxes=torch.tensor(corners, dtype=torch.float32).reshape(-1, 4),
        classes=torch.tensor([instance.category for instance in instances], dtype=torch.int64),
        crowd=torch.tensor([instance.crowd for instance in instances], dtype=torch.bool),
        areas=torch.tensor([instance.area for instance in instances], dtype=torch.float32),
        ids=torch.tensor([instance.id for instance in instances], dtype=torch.int64),
        shapes=[instance.shape for instance in instances if instance.shape is not None] if has_masks else None,
    )


def _digest_values(instance: _Instance) -> list[Any]:
    """Plain values for the digest. The numbers of a shape are hashed first."""
    parts = [instance.shape] if isinstance(instance.shape, np.ndarray) else instance.shape or []
    return [*instance[:-1], *((len(part), hashlib.sha256(part.tobytes()).hexdigest()) for part in parts)]
