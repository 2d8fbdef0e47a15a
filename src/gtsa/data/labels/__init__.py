"""Images with labels. One file is one format; formats are discovered in this folder.

A format is a class that derives from ``LabelFormat``. Labels are checked before anything is trained or evaluated on
them. All faults are collected in ``Problems``, which reports them by file and id, in bounded number.
"""

from __future__ import annotations

import os
import sys

from gtsa.core import plugins
from gtsa.core.errors import UserError, escaped
from gtsa.data.labels.label_format import LabelFormat, LabelOptions
from gtsa.data.labels.labelled import IGNORE, Boxes, Kind, Labelled, Target, Targets
from gtsa.data.labels.problems import SHOWN, Problems
from gtsa.data.sources import may_exist

__all__ = [
    "IGNORE",
    "SHOWN",
    "Boxes",
    "Kind",
    "LabelFormat",
    "LabelOptions",
    "Labelled",
    "Problems",
    "Target",
    "Targets",
    "UnknownFormat",
    "formats",
    "open_labelled",
    "split_part",
]


class UnknownFormat(UserError):
    """No format claims the images and labels.

    Args:
        given: the images and labels.
        needed: what the user has to give for this kind of labels.
    """

    def __init__(self, given: str, needed: str) -> None:
        super().__init__(f"{given}: these are not {needed}", 3)
        self.given, self.needed = given, needed


def open_labelled(
    images: str,
    labels: str | None,
    kind: Kind,
    ignore: int | None = None,
    reduce_zero_label: bool = False,
    classes: str | None = None,
) -> Labelled:
    """Opens images with their labels.

    Args:
        images: folder, list file, or (without labels) tar shards.
        labels: file or folder of labels; FILE:PART names a part of a JSON file (several classes an image); None: the
            images' own folder holds them (class folders).
        kind: the kind of labels that the evaluation needs.
        ignore, reduce_zero_label, classes: as in LabelOptions.

    Raises:
        UnknownFormat: no format claims the images and labels.
        UserError: the labels are wrong (3).
    """
    for path in (images, split_part(labels)[0] if labels else None):
        if path is not None and not may_exist(path):
            raise UserError(f"{escaped(path)}: there is no such file or folder", 3)
    if labels and os.path.isfile(images) and os.path.isdir(labels) and not images.endswith(".txt"):
        message = f"{escaped(images)} is a file, {escaped(labels)} a folder: give IMAGES first, then LABELS"
        raise UserError(message, 3)
    for form in formats():
        if form.claims(images, labels, kind):
            return form.read(images, labels or "", kind, LabelOptions(ignore, reduce_zero_label, classes))
    given = f"{images} with labels {labels}" if labels else images
    *most, last = [form.needs[kind] for form in formats() if kind in form.needs]
    needed = f"{', '.join(most)}{',' if len(most) > 1 else ''} or {last}" if most else last
    raise UnknownFormat(escaped(given), needed)


def formats() -> list[type[LabelFormat]]:
    """The formats of this folder, by module name."""
    return list(plugins.classes(sys.modules[__name__], LabelFormat).values())  # type: ignore[type-abstract]


def split_part(labels: str) -> tuple[str, str | None]:
    """FILE:PART -> file and part. The part is None where the whole is a file, or no file comes before the colon."""
    file, _, part = labels.rpartition(":")
    return (file, part) if os.path.isfile(file) and not os.path.exists(labels) else (labels, None)
