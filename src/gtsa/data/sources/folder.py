"""A folder of images, nested as it may be."""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Iterator, Sequence

from torch import Tensor

from gtsa.data.images import decoding
from gtsa.data.shards import storage
from gtsa.data.sources import ALL, EVERY, OUTSIDE, SHARDS, Detail, Progress, Selection, matcher


class Folder:
    """Every image file below ``root``, in the order of their paths' bytes.

    Hidden files are ignored. Links are followed, to a folder once. Without ``follow_links`` links that lead out of
    ``root`` are listed in ``outside`` instead. ``ignored`` counts files whose suffix is not that of an image, and files
    that are not selected. ``unreadable`` lists folders that cannot be listed.
    """

    def __init__(
        self,
        root: str,
        selection: Selection = ALL,
        files: Sequence[str] | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.root = os.fspath(root)
        self.range16, self.decoder = selection.range16, selection.decoder
        self.ignored: dict[str, int] = Counter()
        self.unreadable: list[tuple[str, str]] = []
        self.outside: list[tuple[str, str]] = []
        if files is not None:
            self.files, self.sizes = list(files), [0] * len(files)
            return
        self._inside = None if selection.follow_links else os.path.join(os.path.realpath(self.root), "")
        is_selected = matcher(selection.include, selection.exclude)
        size_of: dict[str, int] = {}
        for name, size in self._walk():
            if is_selected(name):
                size_of[name] = size
                if progress and len(size_of) % EVERY == 0:
                    progress(len(size_of))
            else:
                self.ignored["not chosen"] += 1
        self.files = sorted(size_of, key=os.fsencode)
        self.sizes = [size_of[name] for name in self.files]

    @staticmethod
    def claims(data: object) -> bool:
        return (
            isinstance(data, str | os.PathLike)
            and os.path.isdir(data)
            and not storage.holds_only(os.fspath(data), SHARDS, decoding.SUFFIXES)
        )

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return self.files[index]

    def size(self, index: int) -> int:
        return self.sizes[index]

    def path(self, index: int) -> str:
        return os.path.join(self.root, self.files[index])

    def file(self, index: int) -> str:
        return self.path(index)

    def read(self, index: int, detail: Detail | None = None) -> Tensor:
        return decoding.decode(self.path(index), detail, self.range16, self.decoder)

    def _walk(self) -> Iterator[tuple[str, int]]:
        """Path below the root and bytes of every image file."""
        folders, seen = deque([""]), set()
        while folders:
            folder = folders.popleft()  # below the root, which is ""
            try:
                path = os.path.join(self.root, folder) if folder else self.root
                status = os.stat(path)
                if (status.st_dev, status.st_ino) in seen:  # a link to a folder that was listed already
                    continue
                seen.add((status.st_dev, status.st_ino))
                with os.scandir(path) as unsorted:
                    entries = sorted(unsorted, key=lambda entry: os.fsencode(entry.name))
            except OSError as error:
                self.unreadable.append((folder or ".", error.strerror or str(error)))
                continue
            for entry in entries:
                name = f"{folder}/{entry.name}" if folder else entry.name
                if entry.name.startswith("."):
                    self.ignored["hidden"] += 1
                elif entry.is_symlink() and self._leads_out(entry, name):
                    continue
                elif _is_folder(entry):  # links last: files keep their own path where they have one
                    (folders.append if entry.is_symlink() else folders.appendleft)(name)
                elif (suffix := os.path.splitext(entry.name)[1].lower()) in decoding.SUFFIXES:
                    yield name, _bytes(entry)
                else:
                    self.ignored[suffix or "no suffix"] += 1

    def _leads_out(self, entry: os.DirEntry[str], name: str) -> bool:
        """Whether a link leads out of the root and is not followed. It is listed if it could lead to images."""
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
    except OSError:  # a dangling link: reported when it is opened
        return 0
