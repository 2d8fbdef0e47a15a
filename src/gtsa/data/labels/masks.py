"""A folder of PNG masks with the images' names: IMAGES/a/1.jpg has LABELS/a/1.png (ADE20K and many others).

The values in a mask are the numbers of classes: the places in its palette, or 8 or 16 bits of grey.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gtsa.core.errors import escaped
from gtsa.core.terminal import say
from gtsa.data import decoding as pictures
from gtsa.data.labels import IGNORE, Kind, Labelled, Problems
from gtsa.data.labels._classes import digest, listed, unique
from gtsa.data.labels._files import sizes
from gtsa.data.labels._json import parsed
from gtsa.data.pixels import BadImage
from gtsa.data.sources import Source, open_source
from gtsa.data.sources.folder import Folder

LARGEST = 2**16  # values of 16 bits


@dataclass(frozen=True)
class Places:
    """Masks of class places and IGNORE, read when they are asked for."""

    paths: Sequence[str]
    table: np.ndarray  # int64: place by value

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(self.table[values(self.paths[index])])


class Masks:
    """Images with a mask each; those without one are left out and counted.

    The classes come from the file ``classes``, one name a line, for the values from 0 on (from 1 with
    ``reduce_zero_label``), or else from a ``classes.json`` in the masks' folder or the one above: a list of names, or
    an object with ``classes``, a list of names or of {"id": 0, "name": "person"}, and perhaps ``ignore_index``.
    Without either they are "class 0" to the largest value that occurs.
    """

    @staticmethod
    def claims(images: str, labels: str | None, kind: Kind) -> bool:
        return kind == "masks" and labels is not None and os.path.isdir(labels)

    @staticmethod
    def read(
        images: str,
        labels: str,
        kind: Kind,
        ignore: int | None = None,
        reduce_zero_label: bool = False,
        classes: str | None = None,
    ) -> Labelled:
        problems = Problems(labels)
        folder = Folder(labels)
        source, names = _paired(open_source(images), folder, images, problems)
        paths = [os.path.join(labels, name) for name in names]
        with ThreadPoolExecutor(min(32, (os.cpu_count() or 1) * 2)) as pool:
            found = list(pool.map(_look, paths))
        known, given = _known(labels, classes, reduce_zero_label)
        if given is not None and ignore is None:
            say(f"{labels}: {given} counts for nothing, as its classes.json says")
        nothing = (given if ignore is None else ignore, 0 if reduce_zero_label else None)
        ignored = {value for value in nothing if value is not None}
        if known is None:
            known = _numbered(found, names, ignored, problems)
        known = {value: name for value, name in known.items() if value not in ignored}
        if not known:
            problems.add("no classes", labels, "there is no mask, or every pixel in them is ignored")
        _sound(names, found, sizes([source.path(i) or "" for i in range(len(source))]), known, ignored, problems)
        problems.insist()
        _shares(labels, known, ignored, found, paths)
        table = np.full(LARGEST, IGNORE)
        for place, value in enumerate(known):
            table[value] = place
        rows = (f"{name} {mask.digest}" for name, mask in zip(names, found, strict=True) if isinstance(mask, _Mask))
        told = digest([*known.items(), sorted(ignored), *rows])
        return Labelled(source, range(len(source)), Places(paths, table), kind, tuple(known.values()), told)


class _Mask(NamedTuple):
    size: tuple[int, int]  # width, height
    values: tuple[int, ...]  # that occur
    pixels: tuple[int, ...]  # of each of them
    digest: str


def values(path: str) -> np.ndarray:
    """The numbers in a PNG mask, uint8 or uint16 [H, W]. Raises BadImage with the reason."""
    form = pictures.header(path).format
    if form != "PNG":
        raise BadImage(f"a {form} image, which does not keep numbers exactly: save masks as PNG")
    with open(path, "rb") as file:
        depth, colours = file.read(26)[24:26]
    if colours not in (0, 3) and depth > 8:
        raise BadImage("colours or transparency, not numbers of classes: convert it to grey values or a palette")
    with pictures.opened(path) as image:
        try:
            array = np.asarray(image)
        except Exception as error:  # Pillow's decoders raise nearly anything on a damaged file
            raise BadImage(f"damaged: {error}") from None
    if colours == 2 and (array == array[..., :1]).all():
        array = array[..., 0]
    elif colours not in (0, 3):
        raise BadImage("colours or transparency, not numbers of classes: convert it to grey values or a palette")
    if colours == 0 and depth in (2, 4):  # Pillow has stretched them to 255
        array = array // (255 // (2**depth - 1))
    return array.astype(np.uint16 if depth == 16 else np.uint8)


LISTED = 30  # classes whose share of pixels is told
VOID = re.compile(
    r"(void|ignored?|unlabell?ed|unlabeled|unknown|undefined|unannotated|no ?label|none|don'?t care|out of roi)",
    re.IGNORECASE,
)  # names of classes that hardly are any
FAR = 20  # a step between values that is no accident of a small set


def _look(path: str) -> _Mask | str:
    try:
        array = values(path)
    except BadImage as reason:
        return str(reason)
    counts = np.bincount(array.ravel())
    occur = np.flatnonzero(counts)
    told = hashlib.sha256(array.astype("<u2").tobytes()).hexdigest()
    return _Mask((array.shape[1], array.shape[0]), tuple(occur.tolist()), tuple(counts[occur].tolist()), told)


def _shares(
    labels: str, known: Mapping[int, str], ignored: set[int], masks: Sequence[_Mask | str], paths: Sequence[str]
) -> None:
    """Says which share of the pixels each class has, and which class hardly is one."""
    counts: Counter[int] = Counter()
    for mask in masks:
        if isinstance(mask, _Mask):
            counts.update(dict(zip(mask.values, mask.pixels, strict=True)))
    total = max(1, sum(counts.values()))
    named = [f"{known[value]} {100 * count / total:.2g} %" for value, count in counts.most_common() if value in known]
    nothing = sum(counts[value] for value in ignored)
    told = ", ".join(named[:LISTED]) + (f" and {len(named) - LISTED} more" if len(named) > LISTED else "")
    say(f"{escaped(labels)}: pixels: {escaped(told)}; {100 * nothing / total:.2g} % count for nothing")
    black = _black(paths[0]) if paths else set()
    for value, name in known.items():
        if counts[value] and (VOID.fullmatch(name.strip()) or (value in black and value > 0)):
            why = "is black in the masks' palette" if not VOID.fullmatch(name.strip()) else "counts as a class"
            say(f"{escaped(name)} (value {value}) {why}: give --ignore {value} if it stands for no class")


def _black(path: str) -> set[int]:
    """The places of a mask's palette that are black, if it has other colours."""
    with pictures.opened(path) as image:
        colours = image.getpalette("RGB") if image.mode == "P" else None
    triples = [tuple(colours[i : i + 3]) for i in range(0, len(colours or ()), 3)] if colours else []
    last = max((place for place, colour in enumerate(triples) if any(colour)), default=-1)
    return {place for place, colour in enumerate(triples[: last + 2]) if not any(colour)}


def _paired(source: Source, masks: Folder, images: str, problems: Problems) -> tuple[Source, list[str]]:
    """The images that have a mask, and the names of their masks."""
    by_stem: dict[str, list[str]] = {}
    for index in range(len(source)):
        by_stem.setdefault(os.path.splitext(source.name(index))[0], []).append(source.name(index))
    pairs: dict[str, str] = {}
    for name in masks.files:
        stem = os.path.splitext(name)[0]
        owners = by_stem.get(stem, [])
        if not owners:
            problems.add("mask without an image", name, f"there is no image {stem}.* among the images")
        elif len(owners) > 1:
            problems.add("mask of several images", name, f"{' and '.join(owners)}: give them names of their own")
        elif owners[0] in pairs:
            problems.add("several masks of one image", name, f"{pairs[owners[0]]} is one already: remove one of them")
        else:
            pairs[owners[0]] = name
    for folder, reason in (*source.unreadable, *masks.unreadable):
        problems.add("folder that cannot be listed", folder, reason)
    if len(pairs) < len(source):
        say(f"{len(source) - len(pairs):,} of {len(source):,} images have no mask and are left out")
    names = [name for index in range(len(source)) if (name := source.name(index)) in pairs]
    return open_source(images, files=names), [pairs[name] for name in names]


def _sound(
    names: Sequence[str],
    masks: Sequence[_Mask | str],
    images: Sequence[tuple[int, int] | str],
    known: Mapping[int, str],
    ignored: set[int],
    problems: Problems,
) -> None:
    for name, mask, size in zip(names, masks, images, strict=True):
        if isinstance(size, str):
            problems.add("image that cannot be read", name, f"its image: {size}")
        if isinstance(mask, str):
            problems.add("mask that cannot be read", name, mask)
            continue
        if not isinstance(size, str) and mask.size != size:
            told = f"{mask.size[0]} x {mask.size[1]} px, but the image is {size[0]} x {size[1]} px, upright"
            problems.add("mask of another size", name, told)
        unknown = [value for value in mask.values if value not in known and value not in ignored]
        if unknown:
            few = ", ".join(map(str, unknown[:10])) + (", ..." if len(unknown) > 10 else "")
            told = f"{few}: not among the {len(known)} classes; give --ignore where a value stands for no class"
            problems.add("unknown class id", name, told)


def _numbered(
    masks: Sequence[_Mask | str], names: Sequence[str], ignored: set[int], problems: Problems
) -> dict[int, str]:
    """Names for all values up to the largest. A value far above all others is hardly a class, which is told."""
    occur = sorted({value for mask in masks if isinstance(mask, _Mask) for value in mask.values} - ignored)
    if len(occur) > 1 and (occur[-1] - occur[-2] > FAR or (occur[-1] == 255 and occur[-2] != 254)):
        value, below = occur[-1], occur[-2]
        for name, mask in zip(names, masks, strict=True):
            if isinstance(mask, _Mask) and value in mask.values:
                told = f"give --ignore {value} if it stands for no class, or name all classes with --classes FILE"
                problems.add(f"value {value} far above all others", name, f"no other is above {below}: {told}")
    return {value: f"class {value}" for value in range(occur[-1] + 1)} if occur else {}


def _known(labels: str, classes: str | None, reduced: bool) -> tuple[dict[int, str] | None, int | None]:
    """Names of classes by value, and the value to ignore, where a file tells them."""
    first = 1 if reduced else 0
    if names := listed(classes):
        return dict(enumerate(names, first)), None
    for folder in (Path(labels), Path(os.path.abspath(labels)).parent):
        if (file := folder / "classes.json").is_file():
            return _from_json(str(file), first)
    return None, None


def _from_json(file: str, first: int) -> tuple[dict[int, str], int | None]:
    problems = Problems(file)
    content = parsed(file, problems, kinds=(dict, list))
    given = content.get("classes") if isinstance(content, dict) else content
    ignore = content.get("ignore_index") if isinstance(content, dict) else None
    found: dict[int, str] = {}
    for place, entry in enumerate(given if isinstance(given, list) else [], first):
        value, name = (entry.get("id"), entry.get("name")) if isinstance(entry, dict) else (place, entry)
        if type(value) is not int or not 0 <= value < LARGEST or not isinstance(name, str):
            problems.add("wrong type", f"class {place}", 'a name is needed, or {"id": 0, "name": "person"}')
        elif value in found:
            problems.add("duplicate id", f"class {place}", f"{value} is {found[value]} already")
        else:
            found[value] = name
    unique("class", ((f"class {value}", name) for value, name in found.items()), problems)
    if not found and not problems.found:
        problems.add("no classes", file, 'a list of names is needed, or an object with a list "classes"')
    if ignore is not None and type(ignore) is not int:
        problems.add("wrong type", "ignore_index", "a whole number is needed")
    problems.insist()
    return dict(sorted(found.items())), ignore
