"""A folder of images, nested as it may be."""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from gtsa.data import decoding
from gtsa.data.pixels import Range
from gtsa.data.sources import OUTSIDE, Detail, chosen

EVERY = 1_000  # files between two words to ``progress``


class Folder:
    """Every image file below ``root``, in the order of their paths' bytes.

    Hidden files are passed over. Links are followed, to folders once; without ``follow_links`` those that lead out of
    ``root`` are named in ``outside`` instead. Files that are no images by their suffix, or not chosen by ``include``
    and ``exclude``, are counted in ``ignored``; folders that cannot be listed are named in ``unreadable``. ``files``
    names the images to take instead of all there are. ``progress`` is told how many images have been listed.
    """

    def __init__(
        self,
        root: str,
        range16: Range = (0, 65535),
        data_root: str | None = None,
        files: Sequence[str] | None = None,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        follow_links: bool = True,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self.root = os.fspath(root)
        self.range16 = range16
        self.ignored: dict[str, int] = Counter()
        self.unreadable: list[tuple[str, str]] = []
        self.outside: list[tuple[str, str]] = []
        if files is not None:
            self.files, self.sizes = list(files), [0] * len(files)
            return
        self._inside = None if follow_links else os.path.join(os.path.realpath(self.root), "")
        wanted = chosen(include, exclude)
        found: dict[str, int] = {}
        for name, size in self._walk():
            if wanted(name):
                found[name] = size
                if progress and len(found) % EVERY == 0:
                    progress(len(found))
            else:
                self.ignored["not chosen"] += 1
        self.files = sorted(found, key=os.fsencode)
        self.sizes = [found[name] for name in self.files]

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
        return decoding.decode(self.path(index), detail, self.range16)

    def _walk(self) -> Iterator[tuple[str, int]]:
        """Name below the root and bytes of every image file."""
        folders, seen = deque([""]), set()
        while folders:
            folder = folders.popleft()  # below the root, which is ""
            try:
                status = os.stat(place := os.path.join(self.root, folder) if folder else self.root)
                if (status.st_dev, status.st_ino) in seen:  # a link back to where we came from
                    continue
                seen.add((status.st_dev, status.st_ino))
                with os.scandir(place) as listed:
                    entries = sorted(listed, key=lambda entry: os.fsencode(entry.name))
            except OSError as error:
                self.unreadable.append((folder or ".", error.strerror or str(error)))
                continue
            for entry in entries:
                name = f"{folder}/{entry.name}" if folder else entry.name
                if entry.name.startswith("."):
                    self.ignored["hidden"] += 1
                elif entry.is_symlink() and self._leads_out(entry, name):
                    continue
                elif _is_folder(entry):  # links last, so that what they lead to goes by its own name
                    (folders.append if entry.is_symlink() else folders.appendleft)(name)
                elif (suffix := os.path.splitext(entry.name)[1].lower()) in decoding.SUFFIXES:
                    yield name, _bytes(entry)
                else:
                    self.ignored[suffix or "no suffix"] += 1

    def _leads_out(self, entry: os.DirEntry[str], name: str) -> bool:
        """Whether a link leads out of the root, where that is not allowed; then it is named, if it could be images."""
        if self._inside is None:
            return False
        target = os.path.realpath(entry.path)
        if os.path.join(target, "").startswith(self._inside):
            return False
        if os.path.isdir(target) or os.path.splitext(name)[1].lower() in decoding.SUFFIXES:
            self.outside.append((name, f"{OUTSIDE} {target}"))
        else:
            self.ignored["links out of the folder"] += 1
        return True


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _bytes(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat().st_size
    except OSError:  # a link to nothing: named later, when it is opened
        return 0
