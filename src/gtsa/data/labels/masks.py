"""A folder of PNG masks with the images' names: IMAGES/a/1.jpg has LABELS/a/1.png (ADE20K and many others).

The values in a mask stand for classes: palette indices, or grey values of 8 or 16 bits.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from gtsa.core.errors import escaped
from gtsa.core.terminal import say
from gtsa.data.labels import IGNORE, Kind, LabelFormat, Labelled, LabelOptions, Problems
from gtsa.data.labels._classes import check_unique, digest, read_class_names
from gtsa.data.labels._files import read_sizes
from gtsa.data.labels._json import parse_json
from gtsa.data.labels._mask_files import Mask, black_values, read_mask, read_values
from gtsa.data.sources import Source, open_source
from gtsa.data.sources.folder import Folder

KEYS = ("classes", "ignore_index", "report_classes")  # of classes.json
VALUES = 2**16  # number of values of 16 bits
LISTED = 30  # classes whose share of pixels is printed
VOID = re.compile(
    r"(void|ignored?|unlabell?ed|unlabeled|unknown|undefined|unannotated|no ?label|none|don'?t care|out of roi)",
    re.IGNORECASE,
)  # names of pixels without a class
FAR = 20  # a gap between values that is too wide for chance


@dataclass(frozen=True)
class MaskTargets:
    """Masks of class indices and IGNORE, read when they are used."""

    paths: Sequence[str]
    table: np.ndarray  # int64: class index by value

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(self.table[read_values(self.paths[index])])


class Masks(LabelFormat):
    """Images with a mask each. Images without a mask are left out and counted.

    The class names come from the file ``classes``, one a line, for the values from 0 on (from 1 with
    ``reduce_zero_label``). Otherwise they come from a ``classes.json`` in the masks' folder or the folder above: a list
    of names, or an object with ``classes``, a list of names or of {"id": 0, "name": "person"}, and optionally
    ``ignore_index`` and ``report_classes``, the names of the classes that means are over. Without either file the
    classes are "class 0" to the largest value that occurs.
    """

    needs: ClassVar[dict[Kind, str]] = {"masks": "a folder of PNG masks with the images' names"}

    @staticmethod
    def claims(images: str, labels: str | None, kind: Kind) -> bool:
        return kind == "masks" and labels is not None and os.path.isdir(labels)

    @staticmethod
    def read(images: str, labels: str, kind: Kind, options: LabelOptions) -> Labelled:
        problems = Problems(labels)
        source, names = _pair(images, Folder(labels), problems)
        paths = [os.path.join(labels, name) for name in names]
        with ThreadPoolExecutor(min(32, (os.cpu_count() or 1) * 2)) as pool:
            masks = list(pool.map(read_mask, paths))
        class_of, ignored, report = _classes(labels, options, masks, names, problems)
        sizes = read_sizes([source.path(index) or "" for index in range(len(source))])
        _check_masks(names, masks, sizes, class_of, ignored, problems)
        problems.raise_if_any()
        _report_shares(labels, class_of, ignored, masks, paths)
        table = np.full(VALUES, IGNORE)
        for index, value in enumerate(class_of):
            table[value] = index
        rows = (f"{name} {mask.digest}" for name, mask in zip(names, masks, strict=True) if isinstance(mask, Mask))
        hashed = digest([*class_of.items(), sorted(ignored), *rows])
        classes, targets = tuple(class_of.values()), MaskTargets(paths, table)
        return Labelled(source, range(len(source)), targets, kind, classes, hashed, report_classes=report)


def _pair(images: str, masks: Folder, problems: Problems) -> tuple[Source, list[str]]:
    """The images that have a mask, and the names of their masks."""
    source = open_source(images)
    by_stem: dict[str, list[str]] = {}
    for index in range(len(source)):
        by_stem.setdefault(os.path.splitext(source.name(index))[0], []).append(source.name(index))
    mask_of: dict[str, str] = {}
    for name in masks.files:
        stem = os.path.splitext(name)[0]
        owners = by_stem.get(stem, [])
        if not owners:
            problems.add("mask without an image", name, f"there is no image {stem}.* among the images")
        elif len(owners) > 1:
            problems.add("mask of several images", name, f"{' and '.join(owners)}: give them different names")
        elif owners[0] in mask_of:
            problems.add("several masks of one image", name, f"{mask_of[owners[0]]} is one already: remove one of them")
        else:
            mask_of[owners[0]] = name
    for folder, reason in (*source.unreadable, *masks.unreadable):
        problems.add("folder that cannot be listed", folder, reason)
    if len(mask_of) < len(source):
        say(f"{len(source) - len(mask_of):,} of {len(source):,} images have no mask and are left out")
    names = [name for index in range(len(source)) if (name := source.name(index)) in mask_of]
    return open_source(images, files=names), [mask_of[name] for name in names]


# Classes


def _classes(
    labels: str, options: LabelOptions, masks: Sequence[Mask | str], names: Sequence[str], problems: Problems
) -> tuple[dict[int, str], set[int], tuple[str, ...]]:
    """Names of the classes by value, the values that stand for no class, and the classes to report if not all."""
    class_of, ignore_index, report = _read_names(labels, options)
    if ignore_index is not None and options.ignore is None:
        say(f"{labels}: value {ignore_index} is ignored, as its classes.json says")
    ignore = ignore_index if options.ignore is None else options.ignore
    ignored = {value for value in (ignore, 0 if options.reduce_zero_label else None) if value is not None}
    if class_of is None:
        class_of = _number_classes(masks, names, ignored, problems)
    class_of = {value: name for value, name in class_of.items() if value not in ignored}
    if not class_of:
        problems.add("no classes", labels, "there is no mask, or every pixel in them is ignored")
    return class_of, ignored, report


def _read_names(labels: str, options: LabelOptions) -> tuple[dict[int, str] | None, int | None, tuple[str, ...]]:
    """Names of classes by value, the value to ignore, and the classes to report, where a file lists them."""
    first = 1 if options.reduce_zero_label else 0
    if names := read_class_names(options.classes):
        return dict(enumerate(names, first)), None, ()
    for folder in (Path(labels), Path(os.path.abspath(labels)).parent):
        if (file := folder / "classes.json").is_file():
            return _read_json_names(str(file), first)
    return None, None, ()


def _read_json_names(file: str, first: int) -> tuple[dict[int, str], int | None, tuple[str, ...]]:
    problems = Problems(file)
    content = parse_json(file, problems, kinds=(dict, list))
    entries = content.get("classes") if isinstance(content, dict) else content
    ignore = content.get("ignore_index") if isinstance(content, dict) else None
    report = content.get("report_classes", []) if isinstance(content, dict) else []
    if isinstance(content, dict):
        _check_keys(file, content, problems)
    class_of: dict[int, str] = {}
    for number, entry in enumerate(entries if isinstance(entries, list) else [], first):
        value, name = (entry.get("id"), entry.get("name")) if isinstance(entry, dict) else (number, entry)
        if type(value) is not int or not 0 <= value < VALUES or not isinstance(name, str):
            problems.add("wrong type", f"class {number}", 'a name is needed, or {"id": 0, "name": "person"}')
        elif value in class_of:
            problems.add("duplicate id", f"class {number}", f"{value} is {class_of[value]} already")
        else:
            class_of[value] = name
    check_unique("class", ((f"class {value}", name) for value, name in class_of.items()), problems)
    if not class_of and not problems.faults:
        problems.add("no classes", file, 'a list of names is needed, or an object with a list "classes"')
    if ignore is not None and type(ignore) is not int:
        problems.add("wrong type", "ignore_index", "a whole number is needed")
    if not isinstance(report, list) or any(name not in class_of.values() for name in report):
        problems.add("unknown class", "report_classes", "a list of names is needed that are all among the classes")
    problems.raise_if_any()
    return dict(sorted(class_of.items())), ignore, tuple(report)


def _check_keys(file: str, content: Mapping[str, object], problems: Problems) -> None:
    """Reports keys that are not read. One that seems to name the ignored value is a fault: results depend on it."""
    known = f"known keys are {', '.join(KEYS[:-1])} and {KEYS[-1]}"
    unread = [key for key in content if key not in KEYS]
    for key in (key for key in unread if "ignor" in key.lower()):
        problems.add("unknown key", key, f"it is not read; name the value to ignore with ignore_index ({known})")
    if others := [key for key in unread if "ignor" not in key.lower()]:
        say(f"{escaped(file)}: keys that are not read: {escaped(', '.join(others))}; {known}")


def _number_classes(
    masks: Sequence[Mask | str], names: Sequence[str], ignored: set[int], problems: Problems
) -> dict[int, str]:
    """Numbers as names for all values up to the largest. A value far above all others is a fault."""
    values = sorted({value for mask in masks if isinstance(mask, Mask) for value in mask.values} - ignored)
    if len(values) > 1 and (values[-1] - values[-2] > FAR or (values[-1] == 255 and values[-2] != 254)):
        value, below = values[-1], values[-2]
        advice = f"give --ignore {value} if it stands for no class, or name all classes with --classes FILE"
        owners = [n for n, mask in zip(names, masks, strict=True) if isinstance(mask, Mask) and value in mask.values]
        problems.add_shared(f"value {value} far above all others", owners, f"no other is above {below}: {advice}")
    return {value: f"class {value}" for value in range(values[-1] + 1)} if values else {}


# Checks


def _check_masks(
    names: Sequence[str],
    masks: Sequence[Mask | str],
    sizes: Sequence[tuple[int, int] | str],
    class_of: Mapping[int, str],
    ignored: set[int],
    problems: Problems,
) -> None:
    """Compares masks with the sizes of their images and the known values."""
    for name, mask, size in zip(names, masks, sizes, strict=True):
        if isinstance(size, str):
            problems.add("image that cannot be read", name, f"its image: {size}")
        if isinstance(mask, str):
            problems.add("mask that cannot be read", name, mask)
            continue
        if not isinstance(size, str) and mask.size != size:
            message = f"{mask.size[0]} x {mask.size[1]} px, but the upright image has {size[0]} x {size[1]} px"
            problems.add("mask of another size", name, message)
        unknown = [value for value in mask.values if value not in class_of and value not in ignored]
        if unknown:
            few = ", ".join(map(str, unknown[:10])) + (", ..." if len(unknown) > 10 else "")
            message = f"{few}: not among the {len(class_of)} classes; give --ignore where a value stands for no class"
            problems.add("unknown class id", name, message)


def _report_shares(
    labels: str, class_of: Mapping[int, str], ignored: set[int], masks: Sequence[Mask | str], paths: Sequence[str]
) -> None:
    """Prints the share of pixels of each class, and doubtful classes."""
    counts: Counter[int] = Counter()
    for mask in masks:
        if isinstance(mask, Mask):
            counts.update(dict(zip(mask.values, mask.pixels, strict=True)))
    total = max(1, sum(counts.values()))
    listed = [f"{class_of[value]} {100 * n / total:.2g} %" for value, n in counts.most_common() if value in class_of]
    more = f" and {len(listed) - LISTED} more" if len(listed) > LISTED else ""
    shares = escaped(", ".join(listed[:LISTED]) + more)
    share_ignored = 100 * sum(counts[value] for value in ignored) / total
    say(f"{escaped(labels)}: pixels: {shares}; {share_ignored:.2g} % ignored")
    black = black_values(paths[0]) if paths else set()
    for value, name in class_of.items():
        if counts[value] and (VOID.fullmatch(name.strip()) or (value in black and value > 0)):
            why = "counts as a class" if VOID.fullmatch(name.strip()) else "is black in the masks' palette"
            say(f"{escaped(name)} (value {value}) {why}: give --ignore {value} if it stands for no class")
