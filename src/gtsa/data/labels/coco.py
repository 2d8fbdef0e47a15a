"""COCO's JSON for detection: boxes with classes, and masks as polygons or run lengths."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gtsa.core.terminal import say
from gtsa.data.labels import Boxes, Kind, Labelled, Problems
from gtsa.data.labels._classes import digest, unique
from gtsa.data.labels._files import located, sizes
from gtsa.data.labels._json import lists, parsed, records, told
from gtsa.data.labels._shapes import Fault, Shape, box, mask, number, shape
from gtsa.data.sources.folder import Folder


class _Thing(NamedTuple):
    image: int  # place among the images
    box: tuple[float, float, float, float]  # x, y, width, height
    category: int  # place among the classes
    crowd: bool
    area: float
    id: int
    shape: Shape | None


@dataclass(frozen=True)
class Things:
    """All things of all images, those of an image side by side; masks are drawn when they are asked for."""

    starts: Sequence[int]  # of each image, and the end
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
            drawn = [mask(shape, width, height) for shape in self.shapes[own]]
            masks = torch.stack(drawn) if drawn else torch.zeros(0, height, width, dtype=torch.bool)
        boxes, classes, crowd, areas, ids = (
            whole[own].clone()  # a view would take the whole along to another process
            for whole in (self.boxes, self.classes, self.crowd, self.areas, self.ids)
        )
        return Boxes(boxes, classes, masks, crowd, areas, ids)


class Coco:
    """``file_name`` starts at the images' folder. The classes are the categories in the order of the file's ids.

    ``area`` is needed, for it decides what is small, medium and large; ``iscrowd`` is 0 where it is missing. Boxes and
    polygons may reach 1 px over the edge of the image. Things of no size that say so (a box of no width or height, area
    0: COCO train2017 has two) are left out and told; a box of no size with an area is a fault.
    """

    @staticmethod
    def claims(images: str, labels: str | None, kind: Kind) -> bool:
        return kind == "boxes" and (labels or "").lower().endswith(".json") and os.path.isdir(images)

    @staticmethod
    def read(images: str, labels: str, kind: Kind, **_: Any) -> Labelled:
        problems = Problems(labels)
        content = parsed(labels, problems)
        lists(content, problems)
        categories, known = records(content, "categories", {"name": str}, problems)
        categories.sort(key=lambda category: category["id"])
        unique("category", ((f"category {row['id']}", row["name"]) for row in categories), problems)
        fields = {"file_name": str, "width": int, "height": int}
        pictures, seen = records(content, "images", fields, problems)
        files = _files(images, pictures, problems)
        things = _things(content, pictures, seen, categories, known, problems)
        problems.insist()
        things.sort(key=lambda thing: thing.image)
        drawn = _drawn(things, labels, problems)
        names = [(row["id"], row["name"]) for row in categories]
        measures = [(row["width"], row["height"]) for row in pictures]
        return Labelled(
            source=Folder(images, files=files),
            places=range(len(files)),
            targets=_packed(things, measures, drawn),
            kind=kind,
            classes=tuple(name for _, name in names),
            digest=digest([names, *zip(files, measures, strict=True), *map(_plain, things)]),
            category_ids=tuple(number for number, _ in names),
            image_ids=tuple(row["id"] for row in pictures),
            has_masks=drawn,
            groups=_groups(categories),
        )


def _groups(categories: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """Supercategories, where every category tells one."""
    found = [row.get("supercategory") for row in categories]
    return tuple(map(str, found)) if all(isinstance(name, str) and name for name in found) else ()


def _files(images: str, pictures: Sequence[dict[str, Any]], problems: Problems) -> list[str]:
    """Paths below ``images``; that each is there, alone, and of the size that the file says."""
    places = [f"image {row['id']}" for row in pictures]
    found = located(images, ((place, row["file_name"]) for place, row in zip(places, pictures, strict=True)), problems)
    there = [(place, row, name) for place, row, name in zip(places, pictures, found, strict=True) if name is not None]
    unique("image", ((place, name) for place, _, name in there), problems)
    paths = [os.path.join(images, name) for *_, name in there]
    for (place, row, name), size in zip(there, sizes(paths), strict=True):
        if isinstance(size, str):
            problems.add("image that cannot be read", place, f"{name}: {size}")
        elif size != (row["width"], row["height"]):
            own = f"{row['width']} x {row['height']} px in the labels, {size[0]} x {size[1]} px as it is read, upright"
            problems.add("image of another size", place, f"{name}: {own}")
    return [name for *_, name in there]


def _things(
    content: dict[str, Any],
    pictures: Sequence[dict[str, Any]],
    seen: set[int],
    categories: Sequence[dict[str, Any]],
    known: set[int],
    problems: Problems,
) -> list[_Thing]:
    image_of = {row["id"]: (place, row["width"], row["height"]) for place, row in enumerate(pictures)}
    class_of = {row["id"]: place for place, row in enumerate(categories)}
    fields = {"image_id": int, "category_id": int, "bbox": object, "area": object}
    things, empty = [], []
    for row in records(content, "annotations", fields, problems)[0]:
        place, image, category = f"annotation {row['id']}", row["image_id"], row["category_id"]
        if image not in seen:
            problems.add("unknown image id", place, f"there is no image {image}")
        if category not in known:
            problems.add("unknown category id", place, f"there is no category {category}")
        if image not in image_of:  # told already, here or as an image
            continue
        thing = _thing(row, place, *image_of[image], class_of.get(category, -1), problems)
        if thing is None:
            continue
        if not _flat(thing.box):
            things.append(thing)
        elif thing.area == 0:
            empty.append(thing.id)
        else:
            problems.add("box of no size", place, f"'bbox' is {told(row['bbox'])}, 'area' is {told(row['area'])}")
    if empty:
        few = ", ".join(map(str, empty[:10])) + (", ..." if len(empty) > 10 else "")
        say(f"annotations of no size and area 0 are left out: {len(empty):,} (id {few})")
    return things


def _thing(
    row: dict[str, Any], place: str, image: int, width: int, height: int, category: int, problems: Problems
) -> _Thing | None:
    """All that is wrong with an annotation is told, or it is returned."""
    parts: dict[str, Any] = {}
    checks: dict[str, Callable[[], Any]] = {
        "area": lambda: _area(row["area"]),
        "box": lambda: box(row["bbox"], width, height),
        "crowd": lambda: _crowd(row.get("iscrowd", 0)),
        "shape": lambda: shape(row.get("segmentation", []), width, height),
    }
    for name, check in checks.items():
        try:
            parts[name] = check()
        except Fault as fault:
            problems.add(fault.kind, place, fault.what)
    if len(parts) < len(checks):
        return None
    return _Thing(image=image, category=category, id=row["id"], **parts)


def _flat(box: tuple[float, float, float, float]) -> bool:
    """Whether nothing is left of it in the precision of Boxes."""
    x, y, w, h = box
    return not (np.float32(x + w) > np.float32(x) and np.float32(y + h) > np.float32(y))


def _area(value: Any) -> float:
    if (found := number(value, "'area'")) < 0:
        raise Fault("negative area", f"'area' is {told(value)}")
    return found


def _crowd(value: Any) -> bool:
    if value not in (0, 1):
        raise Fault("wrong type", f"'iscrowd' is {told(value)}, not 0 or 1")
    return bool(value)


def _drawn(things: Sequence[_Thing], labels: str, problems: Problems) -> bool:
    """Whether there are masks. Where most have one the others are faults; where few have one they are of no use."""
    count = sum(thing.shape is not None for thing in things)
    if len(things) / 2 < count < len(things):
        for thing in things:
            if thing.shape is None:
                problems.add("annotation without a mask", f"annotation {thing.id}", "others have a 'segmentation'")
        problems.insist()
    if 0 < count < len(things):
        say(f"{labels}: {len(things) - count:,} of {len(things):,} annotations have no mask: boxes alone are used")
    return 0 < count == len(things)


def _packed(things: Sequence[_Thing], measures: Sequence[tuple[int, int]], drawn: bool) -> Things:
    """``things`` lie in the order of their images."""
    counts = np.bincount(np.array([thing.image for thing in things], dtype=np.int64), minlength=len(measures))
    corners = [(x, y, x + w, y + h) for x, y, w, h in (thing.box for thing in things)]
    return Things(
        starts=[0, *np.cumsum(counts).tolist()],
        sizes=measures,
        boxes=torch.tensor(corners, dtype=torch.float32).reshape(-1, 4),
        classes=torch.tensor([thing.category for thing in things], dtype=torch.int64),
        crowd=torch.tensor([thing.crowd for thing in things], dtype=torch.bool),
        areas=torch.tensor([thing.area for thing in things], dtype=torch.float32),
        ids=torch.tensor([thing.id for thing in things], dtype=torch.int64),
        shapes=[thing.shape for thing in things if thing.shape is not None] if drawn else None,
    )


def _plain(thing: _Thing) -> list[Any]:
    """For the digest; the many numbers of a shape as a digest of their own."""
    parts = [thing.shape] if isinstance(thing.shape, np.ndarray) else thing.shape or []
    return [*thing[:-1], *((len(part), hashlib.sha256(part.tobytes()).hexdigest()) for part in parts)]
