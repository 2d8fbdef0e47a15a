"""Boxes, polygons and run lengths of COCO. Every number is checked before C code reads it.

pycocotools and similar libraries crash on huge coordinates, and read a polygon of four numbers as a box.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor, from_numpy

from gtsa.data.labels._json import quoted

Shape = list[np.ndarray] | np.ndarray  # polygons [2 n] of x and y, px; or run lengths, of background first
SLACK = 1.0  # px that a shape may extend over the edge of its image
LONGEST = 7  # characters of one run length: 35 bits


class InvalidShape(Exception):
    """A kind of fault, and a message."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(kind, message)
        self.kind, self.message = kind, message


def check_number(value: object, name: str) -> float:
    """A finite number. Raises InvalidShape."""
    return float(check_numbers([value], name)[0])


def check_numbers(values: list[object], name: str) -> np.ndarray:
    """Finite numbers, float64. Raises InvalidShape."""
    if wrong := [value for value in values if type(value) not in (int, float)]:
        raise InvalidShape("wrong type", f"{name} holds {quoted(wrong[0])}, not a number")
    try:
        array = np.array(values, dtype=np.float64)
    except OverflowError:  # an integer of hundreds of digits
        array = np.full(1, np.inf)
    if not np.isfinite(array).all():
        raise InvalidShape("number that is not finite", f"{name} is {quoted(values if len(values) > 1 else values[0])}")
    return array


def check_box(value: object, width: int, height: int) -> tuple[float, float, float, float]:
    """x, y, width and height of a box in an image of ``width`` x ``height`` px; sizes may be 0. Raises InvalidShape."""
    if not isinstance(value, list) or len(value) != 4:
        raise InvalidShape(
            "box that is not four numbers", f"'bbox' is {quoted(value)}: [x, y, width, height] is needed"
        )
    x, y, w, h = check_numbers(value, "'bbox'").tolist()
    if w < 0 or h < 0:
        raise InvalidShape("box of negative size", f"'bbox' {quoted(value)}: [x, y, width, height] is needed")
    if min(x, y) < -SLACK or x + w > width + SLACK or y + h > height + SLACK:
        raise InvalidShape("box outside its image", f"'bbox' {quoted(value)} in {width} x {height} px")
    return x, y, w, h


def check_shape(value: object, width: int, height: int) -> Shape | None:
    """Polygons or run lengths of an image of ``width`` x ``height`` px; None for an empty list. Raises InvalidShape."""
    if isinstance(value, dict):
        return _check_runs(value, width, height)
    if not isinstance(value, list):
        raise InvalidShape("wrong type", f"'segmentation' is {quoted(value)}: polygons or run lengths are needed")
    if value and type(value[0]) in (int, float):
        raise InvalidShape(
            "polygon that is not in a list", "'segmentation' must be a list of polygons, also for one polygon"
        )
    return [_check_polygon(polygon, width, height) for polygon in value] or None


def _check_polygon(value: object, width: int, height: int) -> np.ndarray:
    if not isinstance(value, list):
        raise InvalidShape("wrong type", f"a polygon is {quoted(value)}, not a list [x, y, x, y, ...]")
    if len(value) % 2:
        raise InvalidShape("polygon with half a point", f"{len(value)} coordinates: every point needs x and y")
    if len(value) < 6:
        raise InvalidShape("polygon of fewer than 3 points", f"{len(value)} coordinates are {len(value) // 2} points")
    points = check_numbers(value, "a polygon")
    xs, ys = points[0::2], points[1::2]
    if points.min() < -SLACK or xs.max() > width + SLACK or ys.max() > height + SLACK:
        extent = f"x {xs.min():g} to {xs.max():g}, y {ys.min():g} to {ys.max():g}"
        raise InvalidShape("polygon outside its image", f"{extent} in {width} x {height} px")
    return points


def _check_runs(value: dict[str, Any], width: int, height: int) -> np.ndarray:
    if "size" not in value or "counts" not in value:
        raise InvalidShape("missing key", "run lengths need 'size' and 'counts'")
    if value["size"] != [height, width]:
        raise InvalidShape(
            "run lengths of another size", f"{quoted(value['size'])}, but height and width are {[height, width]}"
        )
    counts = value["counts"]
    if isinstance(counts, str):
        runs = _unpack(counts)
    elif isinstance(counts, list) and all(type(count) is int for count in counts):
        runs = np.array([min(max(count, -1), 2**40) for count in counts], dtype=np.int64)
    else:
        raise InvalidShape("wrong type", f"'counts' is {quoted(counts)}: whole numbers or a string are needed")
    if len(runs) and runs.min() < 0:
        raise InvalidShape("negative run length", f"number {int(runs.argmin())} of 'counts'")
    if runs.sum() != height * width:
        raise InvalidShape(
            "run lengths that do not fill the image", f"they add up to {runs.sum()}, not {height * width} px"
        )
    return runs


def _unpack(text: str) -> np.ndarray:
    """Run lengths from COCO's string. A character is 48 plus 5 bits, lowest first, plus 32 if the number continues.

    The highest bit is the sign. From the fourth on, a number is the difference to the one two before.
    """
    codes = np.array([ord(letter) for letter in text], dtype=np.int64) - 48
    if not len(codes) or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        raise InvalidShape(
            "bad run-length string", f"{quoted(text)}: it is cut off, or holds other characters than 0 to o"
        )
    ends = np.flatnonzero(codes & 32 == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > LONGEST:
        raise InvalidShape("bad run-length string", f"{quoted(text)}: a number of {lengths.max()} characters")
    digits = np.arange(len(codes)) - np.repeat(starts, lengths)
    runs = np.add.reduceat((codes & 31) << (5 * digits), starts)
    runs -= np.where(codes[ends] & 16, np.int64(1) << (5 * lengths), 0)
    for first in (1, 2):
        runs[first::2] = np.cumsum(runs[first::2])
    return runs


def draw_mask(value: Shape, width: int, height: int) -> Tensor:
    """The mask of a checked shape: bool [height, width]."""
    from faster_coco_eval.core import mask as coco  # loaded when needed: it is slow to import

    objects = [{"size": [height, width], "counts": value.tolist()}] if isinstance(value, np.ndarray) else None
    encoded = coco.frPyObjects(objects or [polygon.tolist() for polygon in value], height, width)
    return from_numpy(np.ascontiguousarray(coco.decode(coco.merge(encoded)))).bool()
