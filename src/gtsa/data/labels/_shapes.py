"""Boxes, polygons and run lengths as COCO writes them: every number is checked here, before C code sees any of it.

pycocotools and its kin crash on huge coordinates, and take a polygon of four numbers for a box.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor, from_numpy

from gtsa.data.labels._json import told

Shape = list[np.ndarray] | np.ndarray  # polygons [2 n] of x and y, px; or run lengths, of background first
SLACK = 1.0  # px that a shape may reach over the edge of its image
LONGEST = 7  # characters of one run length: 35 bits


class Fault(Exception):
    """What is wrong: a kind of fault, and this one."""

    def __init__(self, kind: str, what: str) -> None:
        super().__init__(kind, what)
        self.kind, self.what = kind, what


def number(value: Any, name: str) -> float:
    """A finite number. Raises Fault."""
    return float(numbers([value], name)[0])


def numbers(values: list[Any], name: str) -> np.ndarray:
    """Finite numbers, float64. Raises Fault."""
    if wrong := [value for value in values if type(value) not in (int, float)]:
        raise Fault("wrong type", f"{name} holds {told(wrong[0])}, not a number")
    try:
        found = np.array(values, dtype=np.float64)
    except OverflowError:  # an integer of hundreds of digits
        found = np.full(1, np.inf)
    if not np.isfinite(found).all():
        raise Fault("number that is not finite", f"{name} is {told(values if len(values) > 1 else values[0])}")
    return found


def box(value: Any, width: int, height: int) -> tuple[float, float, float, float]:
    """x, y, width and height in px, within an image of ``width`` x ``height`` px; 0 is a size. Raises Fault."""
    if not isinstance(value, list) or len(value) != 4:
        raise Fault("box that is not four numbers", f"'bbox' is {told(value)}: [x, y, width, height] is needed")
    x, y, w, h = numbers(value, "'bbox'").tolist()
    if w < 0 or h < 0:
        raise Fault("box of negative size", f"'bbox' {told(value)}: [x, y, width, height] is needed")
    if min(x, y) < -SLACK or x + w > width + SLACK or y + h > height + SLACK:
        raise Fault("box outside its image", f"'bbox' {told(value)} in {width} x {height} px")
    return x, y, w, h


def shape(value: Any, width: int, height: int) -> Shape | None:
    """Polygons or run lengths of an image of ``width`` x ``height`` px; None for no polygon at all. Raises Fault."""
    if isinstance(value, dict):
        return _runs(value, width, height)
    if not isinstance(value, list):
        raise Fault("wrong type", f"'segmentation' is {told(value)}: polygons or run lengths are needed")
    if value and type(value[0]) in (int, float):
        raise Fault("polygon that is not in a list", "'segmentation' is a list of polygons, even where there is one")
    return [_polygon(polygon, width, height) for polygon in value] or None


def _polygon(value: Any, width: int, height: int) -> np.ndarray:
    if not isinstance(value, list):
        raise Fault("wrong type", f"a polygon is {told(value)}, not a list [x, y, x, y, ...]")
    if len(value) % 2:
        raise Fault("polygon with half a point", f"{len(value)} coordinates: x and y are needed of every point")
    if len(value) < 6:
        raise Fault("polygon of fewer than 3 points", f"{len(value)} coordinates are {len(value) // 2} points")
    points = numbers(value, "a polygon")
    xs, ys = points[0::2], points[1::2]
    if points.min() < -SLACK or xs.max() > width + SLACK or ys.max() > height + SLACK:
        reach = f"x {xs.min():g} to {xs.max():g}, y {ys.min():g} to {ys.max():g}"
        raise Fault("polygon outside its image", f"{reach} in {width} x {height} px")
    return points


def _runs(value: dict[str, Any], width: int, height: int) -> np.ndarray:
    if "size" not in value or "counts" not in value:
        raise Fault("missing key", "run lengths need 'size' and 'counts'")
    if value["size"] != [height, width]:
        raise Fault("run lengths of another size", f"{told(value['size'])}, but height and width are {[height, width]}")
    counts = value["counts"]
    if isinstance(counts, str):
        runs = _unpacked(counts)
    elif isinstance(counts, list) and all(type(count) is int for count in counts):
        runs = np.array([min(max(count, -1), 2**40) for count in counts], dtype=np.int64)
    else:
        raise Fault("wrong type", f"'counts' is {told(counts)}: whole numbers or a string are needed")
    if len(runs) and runs.min() < 0:
        raise Fault("negative run length", f"number {int(runs.argmin())} of 'counts'")
    if runs.sum() != height * width:
        raise Fault("run lengths that do not fill the image", f"they add up to {runs.sum()}, not {height * width} px")
    return runs


def _unpacked(text: str) -> np.ndarray:
    """Run lengths from COCO's string: 5 bits a character with the lowest first, 32 for "goes on", 48 for "0" added.

    The highest bit is the sign; from the fourth on, a number is the difference to the one two before.
    """
    codes = np.array([ord(letter) for letter in text], dtype=np.int64) - 48
    if not len(codes) or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        raise Fault("bad run-length string", f"{told(text)}: it is cut off, or holds other characters than 0 to o")
    ends = np.flatnonzero(codes & 32 == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > LONGEST:
        raise Fault("bad run-length string", f"{told(text)}: a number of {lengths.max()} characters")
    places = np.arange(len(codes)) - np.repeat(starts, lengths)
    runs = np.add.reduceat((codes & 31) << (5 * places), starts)
    runs -= np.where(codes[ends] & 16, np.int64(1) << (5 * lengths), 0)
    for first in (1, 2):
        runs[first::2] = np.cumsum(runs[first::2])
    return runs


def mask(value: Shape, width: int, height: int) -> Tensor:
    """bool [height, width] of a checked shape."""
    from faster_coco_eval.core import mask as coco  # here, for it takes long to load

    objects = [{"size": [height, width], "counts": value.tolist()}] if isinstance(value, np.ndarray) else None
    found = coco.frPyObjects(objects or [polygon.tolist() for polygon in value], height, width)
    return from_numpy(np.ascontiguousarray(coco.decode(coco.merge(found)))).bool()
