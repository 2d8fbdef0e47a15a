"""Image files that labels name: found below their folder and nowhere else, and of the size that is said."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from gtsa.core.terminal import say
from gtsa.data import decoding
from gtsa.data.labels import Problems
from gtsa.data.labels._json import told
from gtsa.data.pixels import BadImage
from gtsa.data.sources import Source

SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that exchange width and height


def located(root: str, names: Iterable[tuple[object, Any]], problems: Problems) -> list[str | None]:
    """Paths below ``root`` for pairs of place in the labels and name.

    None where a problem is told instead: not a path, one that leads outside (also over a link), or to no file.
    """
    top = os.path.realpath(root)
    folders: dict[str, str] = {}  # real ones by name: resolving each path from the top would be most of the work
    return [_located(top, folders, place, name, problems) for place, name in names]


def _located(top: str, folders: dict[str, str], place: object, name: Any, problems: Problems) -> str | None:
    if not isinstance(name, str) or not name or "\0" in name:
        problems.add("wrong type", place, f"the image's path is {told(name)}")
        return None
    if os.path.isabs(name) or os.pardir in name.split(os.sep):
        problems.add("path outside the images", place, f"{name}: name images from the images' folder on, without '..'")
        return None
    folder, file = os.path.split(os.path.normpath(name))
    try:
        if folder not in folders:
            folders[folder] = os.path.realpath(os.path.join(top, folder))
        path = os.path.join(folders[folder], file)
        status = os.lstat(path)
        if stat.S_ISLNK(status.st_mode):
            path = os.path.realpath(path)
            status = os.stat(path)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        problems.add("image missing on disk", place, f"{name}: {getattr(error, 'strerror', None) or error}")
        return None
    if not path.startswith(top.rstrip(os.sep) + os.sep):
        problems.add("path outside the images", place, f"{name}: a link leads out of the images' folder to {path}")
        return None
    if not stat.S_ISREG(status.st_mode):
        problems.add("image missing on disk", place, f"{name}: not a regular file")
        return None
    return os.path.join(folder, file)


def sizes(paths: Sequence[str]) -> list[tuple[int, int] | str]:
    """Width and height of each image as it is read, upright, from its header; or the reason why it cannot be read."""
    with ThreadPoolExecutor(min(32, (os.cpu_count() or 1) * 2)) as pool:
        return list(pool.map(_size, paths))


def _size(path: str) -> tuple[int, int] | str:
    try:
        found = decoding.header(path)
        with decoding.opened(path) as image:
            try:
                turn = 1 if found.format == "TIFF" else image.getexif().get(0x0112, 1)  # Pillow has turned TIFFs
            except Exception:  # damaged EXIF turns nothing
                turn = 1
    except BadImage as reason:
        return str(reason)
    return (found.height, found.width) if turn in SIDEWAYS else (found.width, found.height)


def passed_over(source: Source) -> None:
    """Says how many files lie among the images and are none by their suffix."""
    others = [f"{count:,} {kind}" for kind, count in sorted(source.ignored.items()) if kind != "hidden"]
    if others:
        say(f"not read, for they are no images by their suffix: {', '.join(others)}")
