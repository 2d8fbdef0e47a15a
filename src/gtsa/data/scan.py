"""What is in the data, before anything is trained on it: every file is used, or named with its reason."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gtsa.core.errors import UserError, escaped
from gtsa.core.terminal import Count
from gtsa.data import damage, decoding, remarks
from gtsa.data.pixels import BadImage, Range
from gtsa.data.sources import Source
from gtsa.data.threaded import Room, each

HEADERS = 100_000  # files whose headers are read; of more, an even sample of this many
DECODED = 1_000  # so few files are decoded whole: it takes seconds
AT_ONCE = 2**26  # pixels that are decoded at a time, by all threads together; a larger image is decoded alone
SMALLEST_DRAFT = 1 / 8  # of JPEGs, which are read whole for it all the same


@dataclass
class Scan:
    """The account of a source: ``total = len(used) + len(bad)``."""

    used: list[int] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)  # name, reason
    formats: Counter[str] = field(default_factory=Counter)  # "JPEG RGB": count
    sides: dict[int, tuple[int, int]] = field(default_factory=dict)  # number: width, height as the header says
    frames: int = 0  # files with more than one picture, of which the first is used
    decoded: int = 0  # that were read whole and are used
    looked_at: int = 0
    ignored: dict[str, int] = field(default_factory=dict)
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    outside: list[tuple[str, str]] = field(default_factory=list)  # links out of the folder, which are not followed
    remarks: list[str] = field(default_factory=list)  # what hardly was meant so

    @property
    def total(self) -> int:
        return len(self.used) + len(self.bad)

    def report(self) -> dict[str, Any]:
        """Plain values for JSON."""
        widths, heights = np.array(list(self.sides.values()) or [(0, 0)]).T
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
            "links_not_followed": [{"name": name, "reason": reason} for name, reason in self.outside],
            "remarks": self.remarks,
        }


def scan(source: Source, decode: bool = False, range16: Range = (0, 65535)) -> Scan:
    """Reads names, sizes and headers; decodes every file if asked, or if there are no more than a thousand.

    Files that were decoded before and have not changed since (path, size, time) are not decoded again.
    """
    decode = decode or len(source) <= DECODED
    chosen: Any = range(len(source))
    if len(source) > HEADERS and not decode:
        chosen = np.linspace(0, len(source) - 1, HEADERS).astype(int).tolist()
    result = Scan(looked_at=len(chosen), ignored=dict(source.ignored), unreadable=list(source.unreadable))
    result.outside = list(getattr(source, "outside", ()))
    memory = _Memory(source, range16) if decode else None
    look = _Look(source, memory)
    bad: dict[int, str] = {}
    noted = remarks.Noted(source, range16)
    try:
        with Count("checked" if decode else "looked at", len(chosen)) as count:
            for done, (index, found, reason) in enumerate(each(look, chosen), 1):
                count(done, f"{len(bad):,} cannot be used" if bad else "")
                if reason is not None:
                    bad[index] = reason
                elif found is not None:
                    result.formats[f"{found.format} {found.mode}"] += 1
                    result.sides[index] = (found.width, found.height)
                    result.frames += found.frames > 1
                    noted.add(index, found)
    finally:  # what was decoded before a stop is remembered too
        if memory:
            memory.save()
    result.decoded = len(chosen) - len(bad) if decode else 0
    result.used = [i for i in range(len(source)) if i not in bad]
    result.bad = [(source.name(i), reason) for i, reason in bad.items()]
    result.remarks = noted.remarks()
    return result


class _Look:
    """Header of an image, or why it cannot be used. Images are decoded where there is a memory for it."""

    def __init__(self, source: Source, memory: _Memory | None) -> None:
        self.source, self.memory, self.room = source, memory, Room(AT_ONCE)

    def __call__(self, index: int) -> tuple[int, decoding.Header | None, str | None]:
        path = self.source.path(index)
        try:
            found = None if path is None else decoding.header(path)
            if self.memory and not (path and self.memory.knows(path)):
                with self.room.of(found.width * found.height if found else 0):
                    pixels = self.source.read(index, _draft)
                    found = found or decoding.Header("item", "RGB", pixels.shape[-1], pixels.shape[-2])
                    del pixels
                if path:
                    _insist_whole(path, found)
                    self.memory.add(path)
            return index, found, None
        except BadImage as reason:
            return index, None, str(reason)


def _insist_whole(path: str, found: decoding.Header) -> None:
    try:
        reason = damage.hole(path, found.format, found.width, found.height)
    except OSError as error:
        reason = error.strerror or str(error)
    if reason:
        raise BadImage(reason)


def _draft(width: int, height: int) -> float:
    return SMALLEST_DRAFT


def no_images(result: Scan, data: str) -> UserError:
    """What to tell of a place without images."""
    others = ", ".join(f"{count} {kind}" for kind, count in Counter(result.ignored).most_common(5))
    there = f"it holds {others}" if others else "it is empty"
    there = f"{links(result)}" if result.outside else there
    return UserError(
        f"{data}: no images ({there}); put {', '.join(sorted(decoding.SUFFIXES))} files there, nested or not",
        3,
    )


def insist(result: Scan, data: Any, max_bad: float) -> None:
    """Raises UserError (3) where there is nothing to learn from, or too much of it is bad."""
    if result.total == 0:
        raise no_images(result, f"--data {data}")
    if len(result.bad) > max(1, max_bad * result.looked_at) or not result.used:
        first = "".join(f"\n  {escaped(name)}: {reason}" for name, reason in result.bad[:5])
        more = f"\n  and {len(result.bad) - 5} more" if len(result.bad) > 5 else ""
        raise UserError(
            f"--data {data}: {len(result.bad)} of {result.looked_at} images cannot be used:{first}{more}\n"
            "mend or remove them ('gtsa check' lists all)"
            + (f", or leave them out with --max-bad {enough(result)}" if result.used else ""),
            3,
        )


def links(result: Scan) -> str:
    """One line on the links that lead out of the folder."""
    count = len(result.outside)
    name, reason = result.outside[0]
    many = f"{count:,} links lead" if count > 1 else "a link leads"
    where = escaped(reason.rpartition(", to ")[2])
    return f"{many} out of the folder ({escaped(name)} -> {where}): follow with --follow-links"


def summed(named: Iterable[tuple[str, str]], examples: int = 3) -> list[str]:
    """A line for each reason, the most frequent first, with some of the names that it is about."""
    names: dict[str, list[str]] = {}
    for name, reason in named:
        names.setdefault(reason, []).append(escaped(name))
    lines = []
    for reason, those in sorted(names.items(), key=lambda pair: -len(pair[1])):
        if len(those) == 1:
            lines.append(f"{those[0]}: {reason}")
        else:
            more = ", ..." if len(those) > examples else ""
            lines.append(f"{len(those):,} files: {reason} ({', '.join(those[:examples])}{more})")
    return lines


def enough(result: Scan) -> float:
    """The least --max-bad, in hundredths, that lets the usable images through."""
    return math.ceil(100 * len(result.bad) / max(1, result.looked_at)) / 100


class _Memory:
    """Which files decoded well, by path, size and time; kept in the user's cache folder, never in the data."""

    def __init__(self, source: Source, range16: Range) -> None:
        root = os.path.abspath(os.fspath(getattr(source, "root", "")))
        told = f"{root} {range16} whole 1 {damage.warned()}"  # other checks than these remember for themselves
        key = hashlib.sha256(told.encode("utf-8", "surrogateescape")).hexdigest()[:16]
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        self.file = Path(cache) / "gtsa" / "decoded" / f"{key}.json"
        try:
            self.known = {tuple(entry) for entry in json.loads(self.file.read_text())}
        except (OSError, ValueError, TypeError):
            self.known = set()
        self.found: set[tuple] = set()
        self.seen: set[str] = set()

    def _entry(self, path: str) -> tuple:
        status = os.stat(path)
        return (path, status.st_size, status.st_mtime_ns)

    def knows(self, path: str) -> bool:
        entry = self._entry(path)
        self.seen.add(path)
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
            there = {entry for entry in self.known if entry[0] not in self.seen}
            draft.write_text(json.dumps(sorted(self.found | there)))
            draft.replace(self.file)
        except OSError:  # a cache that cannot be kept costs time, nothing else
            pass
