"""Where images come from. One file is one kind of source; they are found by walking this folder.

A module here defines one class with ``claims(spec) -> bool``, a constructor that takes the spec, and the protocol
``Source`` below. In Python any torch Dataset of images works as well (see ``dataset.py``).
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

from gtsa.errors import Remedy

if TYPE_CHECKING:
    from torch import Tensor

Detail = Callable[[int, int], float]


class Source(Protocol):
    """Numbered images."""

    ignored: dict[str, int]  # what else lies there and is no image: {suffix or kind: count}
    unreadable: list[tuple[str, str]]  # folders that cannot be listed, and why

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
        Remedy: nothing there answers to ``data`` (3).
    """
    for kind in kinds():
        if kind.claims(data):
            return kind(data, **options)  # type: ignore[no-any-return]
    if isinstance(data, str | os.PathLike) and os.path.isfile(data):
        raise Remedy(f"--data {data} is a file: give the folder that it is in, or a .txt file with one path a line", 3)
    raise absent(data)


def absent(data: Any) -> Remedy:
    return Remedy(f"--data {data}: there is no such folder; give a folder of images, or a .txt file with paths", 3)
