"""A text file that names the images, one path a line."""

from __future__ import annotations

import codecs
import os
from collections.abc import Sequence

from torch import Tensor

from gtsa.core.errors import UserError
from gtsa.data import decoding
from gtsa.data.sources import ALL, Detail, Progress, Selection, matcher


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
        self.range16 = selection.range16
        self.ignored: dict[str, int] = {}
        self.unreadable: list[tuple[str, str]] = []
        self.outside: list[tuple[str, str]] = []
        if files is not None:
            self.files = list(files)
            return
        paths = self._read_paths(file)
        names = set(paths)
        if len(names) < len(paths):
            self.ignored["repeated"] = len(paths) - len(names)
        is_selected = matcher(selection.include, selection.exclude)
        self.files = sorted(filter(is_selected, names), key=os.fsencode)
        if len(self.files) < len(names):
            self.ignored["not chosen"] = len(names) - len(self.files)

    @staticmethod
    def claims(data: object) -> bool:
        return isinstance(data, str | os.PathLike) and os.path.isfile(data) and str(data).lower().endswith(".txt")

    def _read_paths(self, file: str) -> list[str]:
        """Paths below the root, in the order of the lines."""
        with open(file, "rb") as lines:
            entries = [line.removeprefix(codecs.BOM_UTF8).strip(b"\r\n") for line in lines]
        paths = []
        for number, entry in enumerate(entries, 1):
            if not entry.strip() or entry.startswith(b"#"):
                continue
            if b"\0" in entry:
                raise UserError(f"{file}, line {number}: a null byte; give a text file with one path a line", 3)
            path = os.path.realpath(os.path.join(self.root, os.fsdecode(entry)))
            if os.path.commonpath([path, self.root]) != self.root:
                raise UserError(
                    f"{file}, line {number}: {os.fsdecode(entry)!r} lies outside {self.root}; "
                    "name a folder above all images with --data-root",
                    8,
                )
            paths.append(os.path.relpath(path, self.root))
        return paths

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return self.files[index]

    def size(self, index: int) -> int:
        try:
            return os.path.getsize(self.path(index))
        except OSError:
            return 0

    def path(self, index: int) -> str:
        return os.path.join(self.root, self.files[index])

    def read(self, index: int, detail: Detail | None = None) -> Tensor:
        return decoding.decode(self.path(index), detail, self.range16)
