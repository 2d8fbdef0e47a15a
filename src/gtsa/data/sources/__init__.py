"""Where images come from. One file is one kind of source; they are found by walking this folder.

A module here defines one class with ``claims(spec) -> bool``, a constructor that takes the spec, and the protocol
``Source`` below. In Python any torch Dataset of images works as well (see ``dataset.py``).
"""

from __future__ import annotations

import fnmatch
import importlib
import os
import pkgutil
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from gtsa.core.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

Detail = Callable[[int, int], float]
OUTSIDE = "a link out of the folder, to"
PACKED = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip", ".7z", ".rar")


class Source(Protocol):
    """Numbered images."""

    ignored: dict[str, int]  # what else lies there and is no image: {suffix or kind: count}
    unreadable: list[tuple[str, str]]  # folders that cannot be listed, and why
    outside: list[tuple[str, str]]  # links that lead out of the folder and are not followed, and where to

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """How the user knows this image, e.g. its path below the folder."""

    def size(self, index: int) -> int:
        """Bytes of the file, 0 where there is none."""

    def path(self, index: int) -> str | None:
        """The file, where there is one."""

    def read(self, index: int, detail: Detail | None = None) -> Tensor:
        """uint8 RGB [3, H, W]. Raises images.BadImage with the reason."""


def kinds() -> Iterator[Any]:
    """The source classes of this folder, by module name."""
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda m: m.name):
        for value in vars(importlib.import_module(f"{__name__}.{module.name}")).values():
            if isinstance(value, type) and hasattr(value, "claims") and value.__module__.startswith(__name__):
                yield value


def open_source(data: Any, **options: Any) -> Source:
    """The source that ``data`` names, or wraps: a folder, a list file, a torch Dataset.

    Raises:
        UserError: nothing there answers to ``data`` (3).
    """
    for kind in kinds():
        if kind.claims(data):
            return kind(data, **options)  # type: ignore[no-any-return]
    if isinstance(data, str | os.PathLike) and os.path.isfile(data):
        if str(data).lower().endswith(PACKED):
            raise UserError(f"--data {data} is an archive: extract it and give the folder with its images", 3)
        raise UserError(
            f"--data {data} is a file: give the folder that it is in, or a .txt file with one path a line", 3
        )
    raise absent(data)


def absent(data: Any) -> UserError:
    return UserError(f"--data {data}: there is no such folder; give a folder of images, or a .txt file with paths", 3)


def chosen(include: Sequence[str], exclude: Sequence[str]) -> Callable[[str], bool]:
    """Says of a path below the data folder whether to take it: it answers to one of ``include``, if there are any, and
    to none of ``exclude``.

    A pattern is for the whole path, and * stands for slashes too; it is for files and for whole folders (``masks`` is
    ``masks/*``); one without a slash is for names at any depth.
    """
    wanted, unwanted = _any(include), _any(exclude)
    return lambda name: (wanted is None or bool(wanted.match(name))) and not (unwanted and unwanted.match(name))


def _any(patterns: Sequence[str]) -> re.Pattern[str] | None:
    whole = []
    for pattern in patterns:
        bare = pattern.removeprefix("./").rstrip("/")
        deep = "/" not in bare or bare.startswith("**/")
        bare = bare.removeprefix("**/").replace("**/", "*")
        starts = [bare, f"*/{bare}"] if deep else [bare]
        whole += [end for start in starts for end in (start, f"{start}/*")]
    return re.compile("|".join(map(fnmatch.translate, whole))) if whole else None
