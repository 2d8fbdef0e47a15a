"""Finds the image files that labels name, only below the images' folder, and reads their sizes."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from gtsa.core.terminal import say
from gtsa.data.images import decoding
from gtsa.data.images.pixels import BadImage
from gtsa.data.labels import Problems
from gtsa.data.labels._json import quoted
from gtsa.data.sources import Source

SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that exchange width and height


def locate(root: str, names: Iterable[tuple[object, object]], problems: Problems) -> list[str | None]:
    """Paths below ``root``, from pairs of position in the labels and name.

    A name that is no path, leads out of ``root`` (also over a link) or to no file gives None and a fault.
    """
    top = os.path.realpath(root)
    folders: dict[str, str] = {}  # resolved folders by name, since resolving every path is slow
    return [_locate(top, folders, position, name, problems) for position, name in names]


def _locate(top: str, folders: dict[str, str], position: object, name: object, problems: Problems) -> str | None:
    if not isinstance(name, str) or not name or "\0" in name:
        problems.add("wrong type", position, f"the image's path is {quoted(name)}")
        return None
    if os.path.isabs(name) or os.pardir in name.split(os.sep):
        problems.add("path outside the images", position, f"{name}: paths start at the images' folder and have no '..'")
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
        problems.add("image missing on disk", position, f"{name}: {getattr(error, 'strerror', None) or error}")
        return None
    if not path.startswith(top.rstrip(os.sep) + os.sep):
        problems.add("path outside the images", position, f"{name}: a link leads out of the images' folder to {path}")
        return None
    if not stat.S_ISREG(status.st_mode):
        problems.add("image missing on disk", position, f"{name}: not a regular file")
        return None
    return os.path.join(folder, file)


def read_sizes(paths: Sequence[str]) -> list[tuple[int, int] | str]:
    """Width and height of each image, upright, from its header; or the reason why it cannot be read."""
    with ThreadPoolExecutor(min(32, (os.cpu_count() or 1) * 2)) as pool:
        return list(pool.map(_size, paths))


def _size(path: str) -> tuple[int, int] | str:
    try:
        header = decoding.read_header(path)
        with decoding.open_image(path) as image:
            try:
                orientation = 1 if header.format == "TIFF" else image.getexif().get(0x0112, 1)  # Pillow rotates TIFFs
            except Exception:  # damaged EXIF rotates nothing
                orientation = 1
    except BadImage as reason:
        return str(reason)
    return (header.height, header.width) if orientation in SIDEWAYS else (header.width, header.height)


def report_ignored(source: Source) -> None:
    """Reports how many files are ignored, by suffix, and how many paths of a list are repeated."""
    others = [f"{count:,} {kind}" for kind, count in sorted(source.ignored.items()) if kind != "hidden"]
    if others:
        say(f"ignored: {', '.join(others)}")
