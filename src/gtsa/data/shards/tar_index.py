"""The images in a tar file: names, offsets and sizes, read from its headers alone.

Python's tarfile reads the same headers, but keeps an object of each member and takes several times as long.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

BLOCK = 512
SCHEMA = 1
LONGEST = 2**20  # bytes of a long name or of pax records; more is damage
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK": "zip"}
LINKS = {b"1": "a hard link", b"2": "a symbolic link"}
FILES = (b"0", b"\0", b"7")
EMPTY = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders, pipes: without content, whatever their size is

Read = Callable[[int, int], bytes]  # offset, length -> bytes


@dataclass
class TarIndex:
    """The images of a tar file.

    Attributes:
        names: of the images, as in the archive without a leading ``./``; each once (of repeated names the last).
        offsets, sizes: where the image files lie, in bytes.
        bad: {number: reason} of images that cannot be read.
        ignored: other members, {suffix or kind: count}.
        problem: why the archive cannot be read to its end; empty if it can.
    """

    names: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    bad: dict[int, str] = field(default_factory=dict)
    ignored: dict[str, int] = field(default_factory=Counter)
    problem: str = ""


class NotTar(Exception):
    """A file that is no tar archive. The message says what it is."""


@dataclass
class _Header:
    """One header, and what extended headers before it say."""

    name: str
    size: int
    kind: bytes
    sparse: bool


class _Damage(Exception):
    """The archive cannot be read further."""


def read_index(read: Read, size: int, suffixes: frozenset[str] | set[str]) -> TarIndex:
    """Reads the headers of an archive of ``size`` bytes. Members whose suffix is in ``suffixes`` are images.

    Raises:
        NotTar: there is no header at the start.
        OSError: from ``read``.
    """
    index, numbers = TarIndex(), dict[str, int]()
    walk = _Walk(read, size)
    try:
        while (header := walk.next_header()) is not None:
            name = header.name.removeprefix("./")
            suffix = os.path.splitext(name)[1].lower()
            if "/." in f"/{name}":
                index.ignored["hidden"] += 1
            elif suffix not in suffixes or header.kind not in (*FILES, *LINKS, b"S"):
                if header.kind in FILES:
                    index.ignored[suffix or "no suffix"] += 1
            else:
                if name in numbers:
                    index.ignored["repeated"] += 1
                _put(index, numbers, name, walk.data, header.size, _reason(header, walk.data, size))
            walk.skip(header.size)
    except _Damage as damage:
        if not walk.data:
            raise NotTar(str(damage)) from None
        index.problem = str(damage)
    return index


def _put(index: TarIndex, numbers: dict[str, int], name: str, offset: int, size: int, reason: str) -> None:
    number = numbers.setdefault(name, len(numbers))
    if number == len(index.names):
        index.names.append(name)
        index.offsets.append(offset)
        index.sizes.append(size)
    else:
        index.offsets[number], index.sizes[number] = offset, size
        index.bad.pop(number, None)
    if reason:
        index.bad[number] = reason


def _reason(header: _Header, offset: int, end: int) -> str:
    """Why an image cannot be read; empty if it can."""
    if header.kind in LINKS:
        return f"{LINKS[header.kind]}: pack the file itself (tar --dereference --hard-dereference)"
    if header.sparse:
        return "stored sparse: pack it without --sparse"
    if offset + header.size > end:
        return "cut off: the archive ends within it"
    return ""


class _Walk:
    """Goes from header to header. ``data``: where the content after the last header begins; 0 before the first."""

    def __init__(self, read: Read, size: int) -> None:
        self.read, self.size = read, size
        self.position = self.data = 0
        self.shared: dict[str, str] = {}  # global pax records

    def next_header(self) -> _Header | None:
        """The next member's header; None at the end mark. Raises _Damage."""
        records: dict[str, str] = {}
        while True:
            block = self._block()
            if not any(block):
                return None
            kind, length = block[156:157], self._number(block)
            if kind in (b"x", b"X"):
                records |= self._records(length)
            elif kind == b"g":
                self.shared |= self._records(length)
            elif kind in (b"L", b"K"):
                text = self._content(length).split(b"\0", 1)[0]
                records |= {"path": _text(text)} if kind == b"L" else {}
            else:
                return self._header(block, kind, length, {**self.shared, **records})

    def skip(self, length: int) -> None:
        self.position = self.data + _padded(length)
        if self.position > self.size and self.data + length > self.size:
            raise _Damage("the archive is cut off")

    def _header(self, block: bytes, kind: bytes, length: int, records: Mapping[str, str]) -> _Header:
        name = _text(block[:100].split(b"\0", 1)[0])
        if kind not in (b"S", b"L") and (prefix := _text(block[345:500].split(b"\0", 1)[0])):
            name = f"{prefix}/{name}"
        name = records.get("path", name)
        sparse = kind == b"S" or any(key.startswith("GNU.sparse.") for key in records)
        name = records.get("GNU.sparse.name", name)
        if "size" in records:
            try:
                length = max(0, int(records["size"]))
            except ValueError:
                raise self._damage("a size that is no number") from None
        if kind == b"S":
            more = block[482]
            while more:
                more = self._raw(BLOCK, "a header of a sparse file")[504]
        if kind == b"\0" and name.endswith("/"):  # how old archives store folders
            kind = b"5"
        self.data = self.position
        return _Header(name, 0 if kind in EMPTY else length, kind, sparse)

    def _block(self) -> bytes:
        """The next header block, whose checksum is right, or the end mark."""
        if self.position >= self.size:
            raise _Damage("no end mark: the archive is cut off, or was not closed" if self.size else "an empty file")
        block = self.read(self.position, BLOCK)
        if self.position == 0:
            for magic, form in COMPRESSED.items():
                if block.startswith(magic):
                    raise _Damage(f"compressed with {form}")
        if len(block) < BLOCK:
            raise self._damage("the archive is cut off")
        if any(block) and not _has_checksum(block):
            raise self._damage("no valid header")
        self.position += BLOCK
        return block

    def _records(self, length: int) -> dict[str, str]:
        """Pax records: ``length key=value`` lines."""
        data, records, start = self._content(length), dict[str, str](), 0
        while start < len(data) and data[start]:
            head, space, _ = data[start : start + 20].partition(b" ")
            if not space or not head.isdigit() or not 5 <= int(head) <= len(data) - start:
                raise self._damage("a damaged extended header")
            key, _, value = data[start + len(head) + 1 : start + int(head) - 1].partition(b"=")
            records[_text(key)] = _text(value)
            start += int(head)
        return records

    def _content(self, length: int) -> bytes:
        if not 0 <= length <= LONGEST:
            raise self._damage("a damaged extended header")
        return self._raw(_padded(length), "an extended header")[:length]

    def _raw(self, length: int, what: str) -> bytes:
        data = self.read(self.position, length)
        if len(data) < length:
            raise self._damage(f"the archive ends within {what}")
        self.position += length
        return data

    def _number(self, block: bytes) -> int:
        size = _parse_number(block[124:136])
        if size is None:
            raise self._damage("a size that is no number")
        return size

    def _damage(self, what: str) -> _Damage:
        return _Damage(f"{what}, at byte {self.position:,}")


def _padded(length: int) -> int:
    return -(-length // BLOCK) * BLOCK


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


def _parse_number(raw: bytes) -> int | None:
    """An octal number, or a binary one as GNU and star store large sizes. None if it is neither, or negative."""
    if raw[0] == 0x80:
        return int.from_bytes(raw[1:])
    try:
        return int(raw.split(b"\0", 1)[0].strip() or b"0", 8)
    except ValueError:
        return None


def _has_checksum(block: bytes) -> bool:
    """Whether the sum of a header's bytes is the one in it, which counts as spaces; old tars add signed bytes."""
    stored = _parse_number(block[148:156])
    total = sum(block) - sum(block[148:156]) + 8 * 32
    if stored == total:
        return True
    return stored == total - 256 * sum(byte > 127 for byte in block[:148] + block[156:])


# The index as a file


def to_json(index: TarIndex, mark: Mapping[str, Any]) -> bytes:
    """The index as a file. ``mark``: of the archive, by which a stale index is noticed."""
    return json.dumps({"schema": SCHEMA, "archive": dict(mark), **vars(index)}).encode() + b"\n"


def from_json(raw: bytes, fits: Callable[[Mapping[str, Any]], bool]) -> TarIndex | None:
    """The index in a file; None where it is damaged, of another schema, or of another archive by ``fits(mark)``."""
    try:
        values = json.loads(raw)
        if values.pop("schema") != SCHEMA or not fits(values.pop("archive")):
            return None
        values["bad"] = {int(number): str(reason) for number, reason in values["bad"].items()}
        index = TarIndex(**values)
        same = len(index.names) == len(index.offsets) == len(index.sizes)
        return index if same and all(type(offset) is int for offset in index.offsets) else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def has_member(read: Read, index: TarIndex, number: int) -> bool:
    """Whether the header before an image's content is of a file of its size."""
    block = read(max(0, index.offsets[number] - BLOCK), BLOCK)
    if len(block) < BLOCK or not _has_checksum(block) or block[156:157] not in FILES:
        return False
    name = index.names[number].encode("utf-8", "surrogateescape")
    stored = block[:100].split(b"\0", 1)[0]
    return index.sizes[number] == _parse_number(block[124:136]) and (name.endswith(stored) or len(name) > 90)
