"""Images with labels. One file is one format; formats are found by walking this folder.

A module here defines one class with ``claims(images, labels, kind) -> bool`` and ``read(images, labels, kind,
**options) -> Labelled``. Everything is checked before anything learns from it: what is wrong is collected in
``Problems``, which tells it by file and id, in bounded number.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import pkgutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from gtsa.core.errors import UserError, escaped
from gtsa.data.sources import Source

Kind = Literal["none", "classes", "multilabel", "masks", "boxes"]
IGNORE = -1  # of a mask: pixels that nobody labelled
SHOWN = 20  # problems that are told one by one
LONGEST = 400  # characters of one


@dataclass(frozen=True)
class Boxes:
    """The things in an image: ``n`` boxes with their classes, and masks where there are any."""

    boxes: Tensor  # [n, 4] float32: x1, y1, x2, y2, px
    classes: Tensor  # [n] int64, places in Labelled.classes
    masks: Tensor | None  # [n, H, W] bool
    crowd: Tensor  # [n] bool: a group of things; ignored, neither right nor wrong
    areas: Tensor  # [n] float32, px
    ids: Tensor  # [n] int64, as the file numbers them


class Targets(Protocol):
    """What is known of image number ``index`` of the source.

    int for ``classes``; bool [C] for ``several``; int64 [H, W] of class places and IGNORE for ``masks``, of the size of
    the image as ``source.read`` gives it; Boxes for ``boxes``; None for ``none``.
    """

    def __getitem__(self, index: int) -> Any: ...


@dataclass(frozen=True)
class Labelled:
    """Numbered images with their labels."""

    source: Source
    places: Sequence[int]  # of the images in the source
    targets: Targets
    kind: Kind
    classes: tuple[str, ...]
    digest: str  # SHA-256 of names and labels
    category_ids: tuple[int, ...] = ()  # of boxes: the file's own numbers of the classes
    image_ids: tuple[int, ...] = ()  # of boxes: the file's own numbers of the images, by place in the source
    has_masks: bool = False  # of boxes: every box has one
    groups: tuple[str, ...] = ()  # of boxes: the supercategory of each class, where the file tells them

    def __len__(self) -> int:
        return len(self.places)

    def name(self, index: int) -> str:
        return self.source.name(self.places[index])

    def read(self, index: int) -> Tensor:
        """uint8 RGB [3, H, W]. Raises images.BadImage."""
        return self.source.read(self.places[index])

    def target(self, index: int) -> Any:
        return self.targets[self.places[index]]

    def take(self, indices: Sequence[int]) -> Labelled:
        """Some of the images, in this order."""
        return replace(self, places=[self.places[i] for i in indices])

    def numbered_as(self, other: Labelled) -> Labelled:
        """The same images with classes and their numbers as in ``other``, which has all of these and perhaps more."""
        if self.classes == other.classes:
            return self
        places = torch.tensor([other.classes.index(name) for name in self.classes])
        targets = Renumbered(self.targets, places, len(other.classes))
        return replace(
            self, targets=targets, classes=other.classes, category_ids=other.category_ids, groups=other.groups
        )

    @property
    def fingerprint(self) -> str:
        """Of labels and chosen images: the same data set gives the same one anywhere."""
        told = f"{self.digest} {list(self.places)}"
        return hashlib.sha256(told.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Renumbered:
    """Targets with other numbers for their classes."""

    targets: Targets
    places: Tensor  # [C] int64: the new number of each class
    count: int  # of classes that there are then

    def __getitem__(self, index: int) -> Any:
        target = self.targets[index]
        if isinstance(target, Boxes):
            return replace(target, classes=self.places[target.classes])
        if not isinstance(target, Tensor):
            return int(self.places[target])
        if target.dtype == torch.bool:
            return torch.zeros(self.count, dtype=torch.bool).index_put((self.places[target],), torch.tensor(True))
        return torch.where(target == IGNORE, IGNORE, self.places[target.clamp(min=0)])


class UnknownFormat(UserError):
    """No format here answers to what was given."""

    def __init__(self, message: str) -> None:
        super().__init__(message, 3)


@dataclass
class Problems:
    """What is wrong with labels, collected so that all of it is told at once."""

    where: str  # the file or folder
    found: list[tuple[str, str, str]] = field(default_factory=list)  # kind of fault, place in the file, what it is

    def add(self, kind: str, place: object, what: str) -> None:
        self.found.append((kind, _short(str(place)), _short(what)))

    def insist(self) -> None:
        """Raises UserError (3) with a line for each kind of fault and the first faults, some of every kind."""
        if self.found:
            counts: Counter[str] = Counter()
            order = []
            for fault in self.found:
                order.append((counts[fault[0]], fault))
                counts[fault[0]] += 1
            shown = [fault for _, fault in sorted(order, key=lambda pair: pair[0])[:SHOWN]]
            table = "".join(f"\n  {count:6,} x {kind}" for kind, count in counts.most_common())
            lines = "".join(f"\n  {place}: {what}" for _, place, what in shown)
            more = f"\n  and {len(self.found) - len(shown):,} more" if len(self.found) > len(shown) else ""
            raise UserError(
                f"{escaped(self.where)}: the labels cannot be used:{table}\nthese are they:{lines}{more}", 3
            )


def _short(text: str) -> str:
    text = escaped(text[:LONGEST])
    return text if len(text) < LONGEST else f"{text[:LONGEST]} ..."


def divided(labels: str) -> tuple[str, str | None]:
    """FILE:PART -> file and part; the part is None where the whole is a file, or no file comes before the colon."""
    file, _, part = labels.rpartition(":")
    return (file, part) if os.path.isfile(file) and not os.path.exists(labels) else (labels, None)


def formats() -> Iterator[Any]:
    """The classes of this folder that read a format, by module name."""
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda m: m.name):
        for value in vars(importlib.import_module(f"{__name__}.{module.name}")).values():
            if isinstance(value, type) and hasattr(value, "claims") and value.__module__ == f"{__name__}.{module.name}":
                yield value


def open_labelled(images: str, labels: str | None, kind: Kind, **options: Any) -> Labelled:
    """The images in ``images`` with what ``labels`` says of them.

    Args:
        images: folder, or list file.
        labels: file or folder of labels; FILE:PART names a part of a JSON file (several classes an image); None: the
            images' own folder holds them (class folders).
        kind: what the evaluation needs.
        options: ``ignore`` (mask value that counts for nothing), ``reduce_zero_label``, ``classes`` (file with the
            names in order, one a line).

    Raises:
        UnknownFormat: no format answers to what was given.
        UserError: the labels are wrong (3).
    """
    for place in (images, divided(labels)[0] if labels else None):
        if place is not None and not os.path.exists(place):
            raise UserError(f"{escaped(place)}: there is no such file or folder", 3)
    if labels and os.path.isfile(images) and os.path.isdir(labels) and not images.endswith(".txt"):
        raise UnknownFormat(f"{escaped(images)} is a file, {escaped(labels)} a folder: first come IMAGES, then LABELS")
    for form in formats():
        if form.claims(images, labels, kind):
            return form.read(images, labels, kind, **options)  # type: ignore[no-any-return]
    wanted = {
        "none": "a folder of images",
        "classes": "class folders, a CSV with columns path and label, or iNaturalist JSON",
        "multilabel": "a JSON object of image names with lists of classes, or FILE:PART where it is in parts",
        "masks": "a folder of PNG masks with the images' names",
        "boxes": "a COCO JSON file",
    }[kind]
    told = f"{images} with labels {labels}" if labels else images
    raise UnknownFormat(f"{escaped(told)}: this evaluation needs {wanted}")
