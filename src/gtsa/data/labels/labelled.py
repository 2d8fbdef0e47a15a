"""Images with their labels, and what a label is for each kind of task."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from gtsa.data.frozen import Frozen
from gtsa.data.images.pixels import Range
from gtsa.data.sources import ALL, Source

Kind = Literal["none", "classes", "multilabel", "masks", "boxes"]
Target: TypeAlias = Any  # by kind, see Targets
IGNORE = -1  # value of unlabelled pixels in a mask


@dataclass(frozen=True)
class Boxes:
    """The instances in an image: ``n`` boxes with classes, and masks where the file has them."""

    boxes: Tensor  # [n, 4] float32: x1, y1, x2, y2, px
    classes: Tensor  # [n] int64, indices into Labelled.classes
    masks: Tensor | None  # [n, H, W] bool
    crowd: Tensor  # [n] bool: a group of instances; ignored, neither right nor wrong
    areas: Tensor  # [n] float32, px
    ids: Tensor  # [n] int64, ids in the file


class Targets(Protocol):
    """The label of image ``index`` of the source.

    int for ``classes``; bool [C] for ``multilabel``; int64 [H, W] of class indices and IGNORE for ``masks``, of the
    size that ``source.read`` gives the image; Boxes for ``boxes``; None for ``none``.
    """

    def __getitem__(self, index: int) -> Target: ...


@dataclass(frozen=True)
class Labelled:
    """Numbered images with their labels."""

    source: Source
    indices: Sequence[int]  # of the images in the source
    targets: Targets
    kind: Kind
    classes: tuple[str, ...]
    digest: str  # SHA-256 of names and labels
    category_ids: tuple[int, ...] = ()  # of boxes: the id of each class in the file
    image_ids: tuple[int, ...] = ()  # of boxes: the id of each image in the file, in the order of the source
    has_masks: bool = False  # of boxes: every box has one
    groups: tuple[str, ...] = ()  # of boxes: the supercategory of each class, if the file has them
    report_classes: tuple[str, ...] = ()  # of masks: the classes that means are over, if not all
    image_groups: tuple[str, ...] = ()  # of each image of the source: those of one group are not independent

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        return self.source.name(self.indices[index])

    def read(self, index: int) -> Tensor:
        """uint8 RGB [3, H, W]. Raises BadImage."""
        return self.source.read(self.indices[index])

    def target(self, index: int) -> Target:
        return self.targets[self.indices[index]]

    def group(self, index: int) -> str:
        """The group of an image; its own name where it has none."""
        return (self.image_groups and self.image_groups[self.indices[index]]) or f"image {self.name(index)}"

    def take(self, indices: Sequence[int]) -> Labelled:
        """Some of the images, in this order."""
        return replace(self, indices=[self.indices[i] for i in indices])

    def with_range16(self, range16: Range, of_runs: bool = False) -> Labelled:
        """The same images, of which those of 16 bits are read with this range.

        The images of a run keep the run's, unless ``of_runs``.
        """
        if isinstance(self.source, Frozen):
            return replace(self, source=self.source.with_range16(range16)) if of_runs else self
        source = copy(self.source)
        source.range16 = range16
        return replace(self, source=source)

    def numbered_as(self, other: Labelled) -> Labelled:
        """The same images with the classes and class indices of ``other``, which has all of these classes."""
        if self.classes == other.classes:
            return self
        new_indices = torch.tensor([other.classes.index(name) for name in self.classes])
        targets = Renumbered(self.targets, new_indices, len(other.classes))
        return replace(
            self, targets=targets, classes=other.classes, category_ids=other.category_ids, groups=other.groups
        )

    @property
    def fingerprint(self) -> str:
        """Hash of labels, chosen images and the range of 16 bits. It does not depend on where the files lie."""
        black, white = self.source.range16
        values = "" if (black, white) == ALL.range16 else f" {black:g} {white:g}"
        return hashlib.sha256(f"{self.digest} {list(self.indices)}{values}".encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Renumbered:
    """Targets with other class indices."""

    targets: Targets
    new_indices: Tensor  # [C] int64: the new index of each class
    count: int  # number of classes afterwards

    def __getitem__(self, index: int) -> Target:
        target = self.targets[index]
        if isinstance(target, Boxes):
            return replace(target, classes=self.new_indices[target.classes])
        if not isinstance(target, Tensor):
            return int(self.new_indices[target])
        if target.dtype == torch.bool:
            present = (self.new_indices[target],)
            return torch.zeros(self.count, dtype=torch.bool).index_put(present, torch.tensor(True))
        return torch.where(target == IGNORE, IGNORE, self.new_indices[target.clamp(min=0)])
