"""A folder of images, nested as it may be."""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from gtsa import images
from gtsa.sources import Detail


class Folder:
    """Every image file below ``root``, in the order of their paths' bytes.

    Hidden files are passed over, links to folders are followed once. Files that are no images by their suffix are
    counted in ``ignored``; folders that cannot be listed are named in ``unreadable``. ``files`` names the images to
    take instead of all there are.
    """

    def __init__(
        self,
        root: str,
        range16: images.Range = (0, 65535),
        data_root: str | None = None,
        files: Sequence[str] | None = None,
    ) -> None:
        self.root = os.fspath(root)
        self.range16 = range16
        self.ignored: dict[str, int] = Counter()
        self.unreadable: list[tuple[str, str]] = []
        if files is None:
            found = dict(self._walk())
            self.files = sorted(found, key=os.fsencode)
            self.sizes = [found[name] for name in self.files]
        else:
            self.files, self.sizes = list(files), [0] * len(files)

    @staticmethod
    def claims(data: Any) -> bool:
        return isinstance(data, str | os.PathLike) and os.path.isdir(data)

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return self.files[index]

    def size(self, index: int) -> int:
        return self.sizes[index]

    def path(self, index: int) -> str:
        return os.path.join(self.root, self.files[index])

    def read(self, index: int, detail: Detail | None = None) -> Tensor:
        return images.decode(self.path(index), detail, self.range16)

    def _walk(self) -> Iterator[tuple[str, int]]:
        folders, seen = deque([self.root]), set()
        while folders:
            folder = folders.popleft()
            try:
                status = os.stat(folder)
                if (status.st_dev, status.st_ino) in seen:  # a link back to where we came from
                    continue
                seen.add((status.st_dev, status.st_ino))
                entries = sorted(os.scandir(folder), key=lambda entry: os.fsencode(entry.name))
            except OSError as error:
                self.unreadable.append((os.path.relpath(folder, self.root), error.strerror or str(error)))
                continue
            for entry in entries:
                if entry.name.startswith("."):
                    self.ignored["hidden"] += 1
                elif _is_folder(entry):  # links last, so that what they lead to goes by its own name
                    (folders.append if entry.is_symlink() else folders.appendleft)(entry.path)
                elif (suffix := os.path.splitext(entry.name)[1].lower()) in images.SUFFIXES:
                    try:
                        size = entry.stat().st_size
                    except OSError:  # a link to nothing: named later, when it is opened
                        size = 0
                    yield os.path.relpath(entry.path, self.root), size
                else:
                    self.ignored[suffix or "no suffix"] += 1


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False
