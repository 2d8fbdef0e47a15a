"""What is in the data, before anything is trained on it: every file is used, or named with its reason."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gtsa import images
from gtsa.core import Remedy
from gtsa.errors import escaped as escaped
from gtsa.sources import Source

HEADERS = 100_000  # files whose headers are read; of more, an even sample of this many
DECODED = 1_000  # so few files are decoded whole: it takes seconds


@dataclass
class Scan:
    """The account of a source: ``total = len(used) + len(bad)``."""

    used: list[int] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)  # name, reason
    formats: Counter[str] = field(default_factory=Counter)  # "JPEG RGB": count
    sides: list[tuple[int, int]] = field(default_factory=list)  # width, height
    frames: int = 0  # files with more than one picture, of which the first is used
    decoded: int = 0
    looked_at: int = 0
    ignored: dict[str, int] = field(default_factory=dict)
    unreadable: list[tuple[str, str]] = field(default_factory=list)

    @property
    def total(self) -> int:
        return len(self.used) + len(self.bad)

    def report(self) -> dict[str, Any]:
        """Plain values for JSON."""
        widths, heights = (np.array([s[i] for s in self.sides] or [0]) for i in (0, 1))
        return {
            "images": self.total,
            "used": len(self.used),
            "bad": [{"name": name, "reason": reason} for name, reason in self.bad],
            "looked_at": self.looked_at,
            "decoded": self.decoded,
            "formats": dict(self.formats.most_common()),
            "width": {"least": int(widths.min()), "median": int(np.median(widths)), "most": int(widths.max())},
            "height": {"least": int(heights.min()), "median": int(np.median(heights)), "most": int(heights.max())},
            "of_several_frames": self.frames,
            "other_files": dict(self.ignored),
            "folders_not_listed": [{"name": name, "reason": reason} for name, reason in self.unreadable],
        }


def scan(source: Source, decode: bool = False, range16: images.Range = (0, 65535)) -> Scan:
    """Reads names, sizes and headers; decodes every file if asked, or if there are no more than a thousand.

    Files that were decoded before and have not changed since (path, size, time) are not decoded again.
    """
    decode = decode or len(source) <= DECODED
    chosen = range(len(source))
    if len(source) > HEADERS and not decode:
        chosen = np.linspace(0, len(source) - 1, HEADERS).astype(int).tolist()
    result = Scan(ignored=dict(source.ignored), unreadable=list(source.unreadable), looked_at=len(chosen))
    memory = _Memory(source, range16) if decode else None

    def look(index: int) -> tuple[int, images.Header | None, str | None]:
        path = source.path(index)
        try:
            found = None if path is None else images.header(path)
            if decode and not (memory and path and memory.knows(path)):
                pixels = source.read(index)
                found = found or images.Header("item", "RGB", pixels.shape[-1], pixels.shape[-2])
                if memory and path:
                    memory.add(path)
            return index, found, None
        except images.BadImage as reason:
            return index, None, str(reason)

    bad: dict[int, str] = {}
    with ThreadPoolExecutor(min(32, (os.cpu_count() or 1) * 2)) as pool:
        for index, found, reason in pool.map(look, chosen):
            if reason is not None:
                bad[index] = reason
            elif found is not None:
                result.formats[f"{found.format} {found.mode}"] += 1
                result.sides.append((found.width, found.height))
                result.frames += found.frames > 1
    result.decoded = len(chosen) if decode else 0
    result.used = [i for i in range(len(source)) if i not in bad]
    result.bad = [(source.name(i), reason) for i, reason in bad.items()]
    if memory:
        memory.save()
    return result


def insist(result: Scan, data: Any, max_bad: float) -> None:
    """Raises Remedy (3) where there is nothing to learn from, or too much of it is bad."""
    if result.total == 0:
        others = ", ".join(f"{count} {kind}" for kind, count in Counter(result.ignored).most_common(5))
        there = f"it holds {others}" if others else "it is empty"
        raise Remedy(
            f"--data {data}: no images ({there}); put {', '.join(sorted(images.SUFFIXES))} files there, nested or not",
            3,
        )
    if len(result.bad) > max(1, max_bad * result.looked_at) or not result.used:
        first = "".join(f"\n  {escaped(name)}: {reason}" for name, reason in result.bad[:5])
        more = f"\n  and {len(result.bad) - 5} more" if len(result.bad) > 5 else ""
        raise Remedy(
            f"--data {data}: {len(result.bad)} of {result.looked_at} images cannot be used:{first}{more}\n"
            "mend or remove them ('gtsa check' lists all)"
            + (f", or leave them out with --max-bad {enough(result)}" if result.used else ""),
            3,
        )


def enough(result: Scan) -> float:
    """The least --max-bad, in hundredths, that lets the usable images through."""
    return math.ceil(100 * len(result.bad) / max(1, result.looked_at)) / 100


class _Memory:
    """Which files decoded well, by path, size and time; kept in the user's cache folder, never in the data."""

    def __init__(self, source: Source, range16: images.Range) -> None:
        root = os.path.abspath(os.fspath(getattr(source, "root", "")))
        key = hashlib.sha256(f"{root} {range16}".encode("utf-8", "surrogateescape")).hexdigest()[:16]
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        self.file = Path(cache) / "gtsa" / "decoded" / f"{key}.json"
        try:
            self.known = {tuple(entry) for entry in json.loads(self.file.read_text())}
        except (OSError, ValueError, TypeError):
            self.known = set()
        self.found: set[tuple] = set()

    def _entry(self, path: str) -> tuple:
        status = os.stat(path)
        return (path, status.st_size, status.st_mtime_ns)

    def knows(self, path: str) -> bool:
        entry = self._entry(path)
        if entry in self.known:
            self.found.add(entry)
            return True
        return False

    def add(self, path: str) -> None:
        self.found.add(self._entry(path))

    def save(self) -> None:
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            draft = self.file.with_suffix(f".{os.getpid()}")
            draft.write_text(json.dumps(sorted(self.found)))
            draft.replace(self.file)
        except OSError:  # a cache that cannot be kept costs time, nothing else
            pass
