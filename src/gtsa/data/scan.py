"""Scans the data before training: every file is used, or reported with the reason."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from gtsa.core.errors import UserError, escaped
from gtsa.core.files import cache_folder
from gtsa.core.terminal import Count, say
from gtsa.data import remarks
from gtsa.data.images import damage, decoding
from gtsa.data.images.blobs import Bytes, File, loaded
from gtsa.data.images.pixels import BadImage, Range
from gtsa.data.sources import ALL, SHARDS, Selection, Source, open_source
from gtsa.data.threaded import PixelBudget, map_in_order, map_short

HEADERS = 100_000  # files whose headers are read; of larger data sets an even sample of this size
DECODED = 1_000  # up to this number all files are decoded: it takes seconds
AT_ONCE = 2**26  # pixels that all threads together decode at a time; a larger image is decoded alone
SMALLEST_DRAFT = 1 / 8  # scale of decoded JPEGs; all of their data are read even so


@dataclass
class Scan:
    """The result of a scan: ``total = len(used) + len(bad)``."""

    used: list[int] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)  # name, reason
    formats: Counter[str] = field(default_factory=Counter)  # "JPEG RGB": count
    sides: dict[int, tuple[int, int]] = field(default_factory=dict)  # index: width, height in the header
    deep: int = 0  # images of more than 8 bits, whose values --range16 scales
    frames: int = 0  # files with more than one picture; the first is used
    decoded: int = 0  # usable images that were decoded
    looked_at: int = 0  # files whose headers were read
    ignored: dict[str, int] = field(default_factory=dict)
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    outside: list[tuple[str, str]] = field(default_factory=list)  # links out of the folder that are not followed
    remarks: list[str] = field(default_factory=list)  # on readable images that look like a mistake

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
            "of_16_bits": self.deep,
            "of_several_frames": self.frames,
            "other_files": dict(self.ignored),
            "folders_not_listed": [{"name": name, "reason": reason} for name, reason in self.unreadable],
            "links_not_followed": [{"name": name, "reason": reason} for name, reason in self.outside],
            "remarks": self.remarks,
        }


def count_deep(report: Mapping[str, Any]) -> int:
    """Images of more than 8 bits in the report of a scan; in one of an early version those that have one channel."""
    formats = report.get("formats", {}).items()
    gray = sum(int(count) for kind, count in formats if str(kind).split()[-1].startswith("I"))
    return int(report.get("of_16_bits", gray))


def list_images(data: object, selection: Selection) -> Source:
    """Opens the images of ``data``, with progress."""
    with Count("listed") as count:
        return open_source(data, selection, progress=count)


def open_images(data: object, selection: Selection) -> Source:
    """Opens the images of ``data``, and reports folders and links that are left out. Raises UserError (3) if empty."""
    source = list_images(data, selection)
    left = Scan(ignored=dict(source.ignored), unreadable=source.unreadable, outside=source.outside)
    for line in group_by_reason(source.unreadable):
        say(f"left out: {line}")
    if source.outside:
        say(f"left out: {describe_links(left)}")
    if not len(source):
        raise no_images(left, data, selection)
    return source


def scan(source: Source, decode: bool = False, range16: Range = (0, 65535)) -> Scan:
    """Reads names, sizes and headers. Decodes every file if ``decode``, or if there are no more than DECODED.

    Files that were decoded before and have not changed since (path, size, time) are not decoded again.
    """
    decode = decode or len(source) <= DECODED
    chosen: Sequence[int] = range(len(source))
    if len(source) > HEADERS and not decode:
        chosen = np.linspace(0, len(source) - 1, HEADERS).astype(int).tolist()
    result = Scan(looked_at=len(chosen), ignored=dict(source.ignored), unreadable=list(source.unreadable))
    result.outside = list(getattr(source, "outside", ()))
    cache = DecodedCache(source, range16) if decode else None
    check, work = CheckImage(source, cache), map_in_order if decode else map_short
    bad: dict[int, str] = {}
    collector = remarks.RemarkCollector(source, range16)
    try:
        with Count("decoded" if decode else "headers read:", len(chosen)) as count:
            for done, (index, header, reason) in enumerate(work(check, chosen), 1):
                count(done, f"{len(bad):,} cannot be used" if bad else "")
                if reason is not None:
                    bad[index] = reason
                elif header is not None:
                    result.formats[f"{header.format} {header.mode}"] += 1
                    result.sides[index] = (header.width, header.height)
                    result.frames += header.frames > 1
                    collector.add(index, header)
    finally:  # also files decoded before a stop
        if cache:
            cache.save()
    result.decoded = len(chosen) - len(bad) if decode else 0
    result.used = [i for i in range(len(source)) if i not in bad]
    result.bad = [(source.name(i), reason) for i, reason in bad.items()]
    result.deep = len(collector.deep)
    result.remarks = collector.remarks()
    return result


class CheckImage:
    """Index -> header of an image, or why it cannot be used. With a cache, images are decoded."""

    def __init__(self, source: Source, cache: DecodedCache | None) -> None:
        self.source, self.cache, self.budget = source, cache, PixelBudget(AT_ONCE)

    def __call__(self, index: int) -> tuple[int, decoding.Header | None, str | None]:
        path = self.source.path(index)
        try:
            file = self.source.file(index)
            if file is not None and self.cache:
                file = loaded(file)
            header = None if file is None else decoding.read_header(file)
            if self.cache and not (path and self.cache.has(path)):
                with self.budget.reserve(header.width * header.height if header else 0):
                    header = self._decode(index, file, header)
                if file is not None:
                    _check_whole(file, header)
                if path:
                    self.cache.add(path)
            return index, header, None
        except BadImage as reason:
            return index, None, str(reason)

    def _decode(self, index: int, file: File | None, header: decoding.Header | None) -> decoding.Header:
        """The header, made from the pixels where there is no file. What is in memory is not read again."""
        if header is not None and isinstance(file, Bytes):
            decoding.decode(file, _draft, self.source.range16)
            return header
        height, width = self.source.read(index, _draft).shape[-2:]
        return header or decoding.Header("item", "RGB", width, height)


def _check_whole(file: File, header: decoding.Header) -> None:
    try:
        reason = damage.find_damage(file, header.format, header.width, header.height)
    except OSError as error:
        reason = error.strerror or str(error)
    if reason:
        raise BadImage(reason)


def _draft(width: int, height: int) -> float:
    return SMALLEST_DRAFT


def no_images(result: Scan, data: object, selection: Selection) -> UserError:
    """The error for data without images, or of which the patterns match none."""
    patterns = [f"--{name} {' '.join(getattr(selection, name))}" for name in ("include", "exclude")]
    given = " and ".join(text for text in patterns if not text.endswith(" "))
    if given:
        every = open_source(data, replace(selection, include=(), exclude=()))
        if count := len(every):
            some = ", ".join(escaped(every.name(index)) for index in range(min(2, count)))
            return UserError(
                f"--data {data}: {given} leaves none of {count:,} images; patterns are compared with paths below the "
                f"folder, e.g. {some}",
                3,
            )
    others = ", ".join(f"{count} {kind}" for kind, count in Counter(result.ignored).most_common(5))
    content = f"it holds {others}" if others else "it is empty"
    content = describe_links(result) if result.outside else content
    action = f"put {', '.join(sorted(decoding.SUFFIXES))} files there, nested or not"
    if SHARDS in result.ignored:
        action = "nested tar shards are given as a pattern, e.g. --data 'DIR/**/*.tar'"
    return UserError(f"--data {data}: no images ({content}); {action}", 3)


def check_scan(result: Scan, data: object, max_bad: float, selection: Selection = ALL) -> None:
    """Raises UserError (3) if there are no usable images, or too many bad ones."""
    if result.total == 0:
        raise no_images(result, data, selection)
    if len(result.bad) > max(1, max_bad * result.looked_at) or not result.used:
        first = "".join(f"\n  {escaped(name)}: {reason}" for name, reason in result.bad[:5])
        more = f"\n  and {len(result.bad) - 5} more" if len(result.bad) > 5 else ""
        raise UserError(
            f"--data {data}: {len(result.bad)} of {result.looked_at} images cannot be used:{first}{more}\n"
            "repair or remove them ('gtsa check' lists all)"
            + (f", or leave them out with --max-bad {least_max_bad(result)}" if result.used else ""),
            3,
        )


def describe_links(result: Scan) -> str:
    """One line on the links that lead out of the folder."""
    count = len(result.outside)
    name, reason = result.outside[0]
    many = f"{count:,} links lead" if count > 1 else "a link leads"
    where = escaped(reason.rpartition(", to ")[2])
    return f"{many} out of the folder ({escaped(name)} -> {where}): follow with --follow-links"


def group_by_reason(bad: Iterable[tuple[str, str]], examples: int = 3) -> list[str]:
    """A line for each reason, the most frequent first, with some of the file names."""
    names: dict[str, list[str]] = {}
    for name, reason in bad:
        names.setdefault(reason, []).append(escaped(name))
    lines = []
    for reason, files in sorted(names.items(), key=lambda pair: -len(pair[1])):
        if len(files) == 1:
            lines.append(f"{files[0]}: {reason}")
        else:
            more = ", ..." if len(files) > examples else ""
            lines.append(f"{len(files):,} files: {reason} ({', '.join(files[:examples])}{more})")
    return lines


def least_max_bad(result: Scan) -> float:
    """The least --max-bad, in hundredths, with which the usable images are accepted."""
    return math.ceil(100 * len(result.bad) / max(1, result.looked_at)) / 100


class DecodedCache:
    """Files that decoded well, by path, size and time. It lies in the user's cache folder, never in the data."""

    def __init__(self, source: Source, range16: Range) -> None:
        root = os.path.abspath(os.fspath(getattr(source, "root", "")))
        checks = f"{root} {range16} whole 1 {damage.sees_warnings()}"  # other checks have a cache of their own
        key = hashlib.sha256(checks.encode("utf-8", "surrogateescape")).hexdigest()[:16]
        self.file = cache_folder() / "decoded" / f"{key}.json"
        try:
            self.known = {tuple(entry) for entry in json.loads(self.file.read_text())}
        except (OSError, ValueError, TypeError):
            self.known = set()
        self.confirmed: set[tuple[str, int, int]] = set()
        self.seen: set[str] = set()

    def _entry(self, path: str) -> tuple[str, int, int]:
        status = os.stat(path)
        return (path, status.st_size, status.st_mtime_ns)

    def has(self, path: str) -> bool:
        entry = self._entry(path)
        self.seen.add(path)
        if entry in self.known:
            self.confirmed.add(entry)
            return True
        return False

    def add(self, path: str) -> None:
        self.confirmed.add(self._entry(path))

    def save(self) -> None:
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            draft = self.file.with_suffix(f".{os.getpid()}")
            others = {entry for entry in self.known if entry[0] not in self.seen}
            draft.write_text(json.dumps(sorted(self.confirmed | others)))
            draft.replace(self.file)
        except OSError:  # without the cache the next scan takes longer
            pass
