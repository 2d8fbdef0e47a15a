"""A text file that names the images, one path a line."""

from __future__ import annotations

import codecs
import os
import stat
from collections import Counter
from collections.abc import Sequence

from torch import Tensor

from gtsa.core.errors import UserError
from gtsa.data.images import decoding
from gtsa.data.sources import ALL, EVERY, Detail, Progress, Selection, matcher


class Listing:
    """The images that a .txt file names, in the order of their paths' bytes, each once.

    Paths are relative to ``data_root`` (by default the list file's own folder) and must lie in it. Empty lines and
    lines that start with # are ignored. ``ignored`` counts repeated paths, and paths that are not selected.
    """

    def __init__(
        self,
        file: str,
        selection: Selection = ALL,
        files: Sequence[str] | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.root = os.path.realpath(selection.data_root or os.path.dirname(os.path.abspath(file)))
        self.range16, self.decoder = selection.range16, selection.decoder
        self.ignored: dict[str, int] = Counter()
        self.unreadable: list[tuple[str, str]] = []
        self.outside: list[tuple[str, str]] = []
        if files is not None:
            self.files, self.sizes = list(files), [0] * len(files)
            return
        size_of = self._read_paths(file, progress)
        is_selected = matcher(selection.include, selection.exclude)
        self.files = sorted(filter(is_selected, size_of), key=os.fsencode)
        self.sizes = [size_of[name] for name in self.files]
        if len(self.files) < len(size_of):
            self.ignored["not chosen"] = len(size_of) - len(self.files)

    @staticmethod
    def claims(data: object) -> bool:
        return isinstance(data, str | os.PathLike) and os.path.isfile(data) and str(data).lower().endswith(".txt")

    def _read_paths(self, file: str, progress: Progress | None) -> dict[str, int]:
        """Path below the root and bytes of every image."""
        size_of, folders, top = dict[str, int](), dict[str, str](), os.path.join(self.root, "")
        with open(file, "rb") as lines:
            for number, line in enumerate(lines, 1):
                entry = line.removeprefix(codecs.BOM_UTF8).strip(b"\r\n")
                if not entry.strip() or entry.startswith(b"#"):
                    continue
                if b"\0" in entry:
                    raise UserError(f"{file}, line {number}: a null byte; give a text file with one path a line", 3)
                path, size = self._resolve(os.fsdecode(entry), folders)
                if not path.startswith(top):
                    raise UserError(
                        f"{file}, line {number}: {os.fsdecode(entry)!r} lies outside {self.root}; "
                        "name a folder above all images with --data-root",
                        8,
                    )
                if (name := path[len(top) :]) in size_of:
                    self.ignored["repeated"] += 1
                size_of[name] = size
                if progress and number % EVERY == 0:
                    progress(len(size_of))
        return size_of

    def _resolve(self, entry: str, folders: dict[str, str]) -> tuple[str, int]:
        """The real path and the bytes of an entry. ``folders``: those resolved so far; resolving every path is slow."""
        folder, name = os.path.split(entry)
        if folder not in folders:
            folders[folder] = os.path.realpath(os.path.join(self.root, folder))
        path = os.path.join(folders[folder], name)
        try:
            status = os.lstat(path)
            if not stat.S_ISREG(status.st_mode):  # a link, or no file
                path = os.path.realpath(path)
                status = os.stat(path)
        except OSError:  # reported when the image is opened
            return path, 0
        return path, status.st_size

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
