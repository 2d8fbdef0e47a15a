"""Where images come from. One file is one kind of source; they are discovered in this folder.

A module here defines one class in the form of ``SourceClass``, whose instances are a ``Source``. In Python any torch
Dataset of images is a source, too (see ``torch_dataset.py``).
"""

from __future__ import annotations

import fnmatch
import importlib
import math
import os
import pkgutil
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

from gtsa.core.errors import UserError
from gtsa.data.shards import storage

if TYPE_CHECKING:
    from torch import Tensor

    from gtsa.data.images.blobs import File

Detail = Callable[[int, int], float]  # width, height -> the smallest scale that is useful
Progress = Callable[[int], None]  # number of images listed so far
EVERY = 1_000  # images between two calls of ``progress``
SHARDS = ".tar"  # a folder of these and no images is a set of shards
OUTSIDE = "a link out of the folder, to"
PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip", ".7z", ".rar")


@dataclass(frozen=True)
class Selection:
    """Which images of a data set are used, and how their values are read.

    Attributes:
        range16: values of 16-bit images that become black and white.
        data_root: for list files, the folder that paths are relative to.
        include, exclude: patterns of paths below the folder (see ``matcher``).
        follow_links: follow links that lead out of the folder.
        decoder: of JPEG files, "pillow" or "simplejpeg".
    """

    range16: tuple[float, float] = (0, 65535)
    data_root: str | None = None
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    follow_links: bool = True
    decoder: str = "pillow"


ALL = Selection()


class Source(Protocol):
    """Numbered images."""

    range16: tuple[float, float]  # values of 16-bit images that become black and white
    ignored: dict[str, int]  # other files of the folder: {suffix or kind: count}
    unreadable: list[tuple[str, str]]  # folders that cannot be listed, and why
    outside: list[tuple[str, str]]  # links that lead out of the folder and are not followed, and their targets

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """The image's name for the user, e.g. its path below the folder."""

    def size(self, index: int) -> int:
        """Bytes of the file; 0 without a file."""

    def path(self, index: int) -> str | None:
        """The path of the file, if the image has one of its own."""

    def file(self, index: int) -> File | None:
        """The image file: its path, or its bytes in a larger file; None without a file. Raises BadImage."""

    def read(self, index: int, detail: Detail | None = None) -> Tensor:
        """uint8 RGB [3, H, W]. Raises BadImage with the reason."""


class SourceClass(Protocol):
    """A class of sources. ``files``: the names of the images to use, instead of all."""

    @staticmethod
    def claims(data: object) -> bool:
        """Whether ``data`` is of this kind."""

    def __call__(
        self,
        data: object,
        selection: Selection = ALL,
        files: Sequence[str] | None = None,
        progress: Progress | None = None,
    ) -> Source: ...


def open_source(
    data: object, selection: Selection = ALL, files: Sequence[str] | None = None, progress: Progress | None = None
) -> Source:
    """Opens the images that ``data`` names or wraps: a folder, a list file, tar shards, a torch Dataset.

    Args:
        data: path, or any object that a source class claims.
        files: names of the images to use, instead of all.
        progress: called with the number of images listed so far.

    Raises:
        UserError: no source class claims ``data`` (3).
    """
    for kind in kinds():
        if kind.claims(data):
            return kind(data, selection, files, progress)
    if isinstance(data, str | os.PathLike) and os.path.isfile(data):
        if str(data).lower().endswith(PACKED):
            raise packed_data(str(data))
        raise UserError(
            f"--data {data} is a file: give the folder that it is in, or a .txt file with one path a line", 3
        )
    raise missing_data(data)


def range16_problems(range16: tuple[float, float] | None) -> list[str]:
    """A line unless black is below white, and both are finite; None: it is not given."""
    if range16 is None or -math.inf < range16[0] < range16[1] < math.inf:
        return []
    black, white = range16
    return [f"--range16 {black:g} {white:g}: black must be below white; for images of 12 bits give --range16 0 4095"]


def check_range16(range16: tuple[float, float] | None) -> None:
    """Raises UserError (2) unless black is below white, and both are finite; None: it is not given."""
    if problems := range16_problems(range16):
        raise UserError(problems[0])


def check_exists(data: str) -> None:
    """Raises UserError where a path does not exist (3), or the library for a URL is missing (2)."""
    storage.check_url(data)
    if not may_exist(data):
        raise missing_data(data)


def may_exist(data: str) -> bool:
    """Whether a path exists, or is a pattern or URL, which only its source can resolve."""
    return os.path.exists(data) or storage.is_url(data) or storage.is_pattern(data)


def missing_data(data: object) -> UserError:
    return UserError(
        f"--data {data}: there is no such folder; give a folder of images, a .txt file with paths, or tar shards", 3
    )


def packed_data(data: str) -> UserError:
    tar = "" if data.lower().endswith(PACKED[-3:]) else ", or decompress it to a .tar file and give that"
    return UserError(f"--data {data} is a compressed archive: extract it and give the folder with its images{tar}", 3)


def kinds() -> Iterator[SourceClass]:
    """The source classes of this folder, by module name."""
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda m: m.name):
        for value in vars(importlib.import_module(f"{__name__}.{module.name}")).values():
            if isinstance(value, type) and hasattr(value, "claims") and value.__module__.startswith(f"{__name__}."):
                yield cast(SourceClass, value)


def matcher(include: Sequence[str], exclude: Sequence[str]) -> Callable[[str], bool]:
    """A function that decides whether a path below the data folder is used.

    A path is used if it matches one of ``include`` (or there are none) and none of ``exclude``. A pattern is for the
    whole path, and * matches slashes, too. It matches files and whole folders (``masks`` is ``masks/*``). A pattern
    without a slash matches names at any depth.
    """
    included, excluded = _compile(include), _compile(exclude)
    return lambda name: (included is None or bool(included.match(name))) and not (excluded and excluded.match(name))


def _compile(patterns: Sequence[str]) -> re.Pattern[str] | None:
    whole = []
    for pattern in patterns:
        bare = pattern.removeprefix("./").rstrip("/")
        deep = "/" not in bare or bare.startswith("**/")
        bare = bare.removeprefix("**/").replace("**/", "*")
        starts = [bare, f"*/{bare}"] if deep else [bare]
        whole += [end for start in starts for end in (start, f"{start}/*")]
    return re.compile("|".join(map(fnmatch.translate, whole))) if whole else None
