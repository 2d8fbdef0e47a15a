"""Holes in JPEG and WebP files, which decoders fill with something and say nothing.

Three things tell a hole. Zeros: a long run of zero bits stands for many equal coefficients in a row, which no picture
has. Warnings of libjpeg, which Pillow does not pass on, but simplejpeg does (pip install 'gtsa[jpeg]'): data that end
before the picture or after it. Tables that no encoder writes. A hole after which a decoder finds its way back to the
right number of blocks cannot be told from a picture.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

try:
    import simplejpeg
except ImportError:  # then libjpeg's warnings are not seen
    simplejpeg = None

SHORTEST = 8  # zero bytes that are looked at
RARE = 72  # zero bits that stand for equal coefficients, not zero: a good code has so many once in 2**72 bits
FLAT = 5_000  # pixels at least that libwebp stores in one zero byte, where they are all the same (measured: 10,000)
MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
GRAVE = ("Corrupt JPEG data", "Premature end of JPEG")


def warned() -> bool:
    """Whether libjpeg's warnings can be seen here."""
    return simplejpeg is not None


def hole(path: str, form: str, width: int, height: int) -> str | None:
    """Why an image that decodes is not whole; None where nothing tells so. ``form`` as Pillow names it."""
    if form not in ("JPEG", "MPO", "WEBP"):
        return None
    with open(path, "rb") as file:
        data = file.read()
    if form == "WEBP":
        return _webp(data, width * height)
    return _zeros(data) or _warning(data)


# JPEG


class _Code(NamedTuple):
    """What zero bits stand for in a Huffman table: bits a symbol, and the symbol."""

    length: int
    symbol: int

    @property
    def bits(self) -> int:
        """Of the symbol and the value that follows it."""
        return self.length + (self.symbol & 15)


class _Scan(NamedTuple):
    """Entropy-coded data from ``start`` to ``stop``, and how many zero bits at most a picture has in a row there."""

    start: int
    stop: int
    limit: float


def _zeros(data: bytes) -> str | None:
    try:
        for scan in _scans(data):
            for place, length in _runs(data, scan.start, scan.stop):
                padding = data[place + length : place + length + 2] == b"\xff\xd9"  # before the end of the picture
                if 8 * length > scan.limit and not padding:
                    return f"damaged: {length:,} zero bytes at byte {place:,}, where no picture has them"
    except _Odd as reason:
        return f"damaged: {reason}"
    except (IndexError, KeyError):  # a file that we do not follow is libjpeg's business
        return None
    return None


class _Odd(Exception):
    """Something that no encoder writes."""


def _runs(data: bytes, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Place and length of the runs of zero bytes."""
    while (place := data.find(b"\0" * SHORTEST, start, stop)) >= 0:
        start = place
        step = 1 << 12
        while step:  # in large steps, then in small ones
            if data[start : start + step] == b"\0" * step and start + step <= stop:
                start += step
            else:
                step >>= 1
        yield place, start - place


def _scans(data: bytes) -> Iterator[_Scan]:
    """The scans of the first picture in the file."""
    tables: dict[int, _Code] = {}
    blocks: dict[int, int] = {}  # of each component in an interleaved unit
    progressive, place = False, 2
    while (found := MARKER.search(data, place)) is not None:
        kind, place = data[found.start() + 1], found.end()
        if kind == 0xD9:
            return
        if kind == 0xD8 or kind == 0x01:
            continue
        stop = place + int.from_bytes(data[place : place + 2])
        part, place = data[place + 2 : stop], stop
        if kind == 0xC4:
            tables |= _huffman(part)
        elif kind == 0xDB:
            _quantisation(part)
        elif kind in (0xC0, 0xC1, 0xC2):
            progressive = kind == 0xC2
            blocks = {part[6 + 3 * i]: (part[7 + 3 * i] >> 4) * (part[7 + 3 * i] & 15) for i in range(part[5])}
        elif kind in (0xC9, 0xCA, 0xC3):  # arithmetic coding, lossless
            return
        elif kind == 0xDA:
            end = MARKER.search(data, place)
            end_at = end.start() if end else len(data)
            yield _Scan(place, end_at, _limit(part, tables, blocks, progressive))
            place = end_at


def _huffman(part: bytes) -> dict[int, _Code]:
    """The code of zero bits of each table: the first one of the shortest length."""
    found: dict[int, _Code] = {}
    while len(part) > 17:
        counts = part[1:17]
        total = sum(counts)
        if total:
            length = next(i for i, count in enumerate(counts, 1) if count)
            found[part[0]] = _Code(length, part[17])
        part = part[17 + total :]
    return found


def _quantisation(part: bytes) -> None:
    while part:
        wide = part[0] >> 4
        values = part[1 : 1 + 64 * (1 + wide)]
        if len(values) == 64 * (1 + wide) and 0 in (memoryview(values).cast("H") if wide else values):
            raise _Odd("a quantisation table with zeros")
        part = part[1 + 64 * (1 + wide) :]


def _limit(part: bytes, tables: dict[int, _Code], blocks: dict[int, int], progressive: bool) -> float:
    """Zero bits in a row that a scan may have: without end where they can be a flat area."""
    count, first, low = part[0], part[1 + 2 * part[0]], part[3 + 2 * part[0]]
    if progressive and first == 0:
        return float("inf")  # of DC coefficients alone: zeros are a flat area, or a refinement by nothing
    flat, marked = 0, False
    for i in range(count):
        direct, other = tables[part[2 + 2 * i] >> 4], tables[0x10 | part[2 + 2 * i] & 15]
        many = blocks[part[1 + 2 * i]] if count > 1 else 1
        if other.symbol & 15:
            marked = True
            flat += many * (0 if progressive else direct.bits)
        else:
            flat += many * (direct.bits + other.bits)
    if not marked:
        return float("inf")
    return flat + RARE + (64 if progressive and low >> 4 else 0)  # refinements hold bits of other coefficients too


def _warning(data: bytes) -> str | None:
    """What libjpeg warns of. At an eighth of the size it reads all of the data and computes little."""
    if simplejpeg is None:
        return None
    try:
        colours = simplejpeg.decode_jpeg_header(data, strict=False)[2]
        colours = "CMYK" if colours in ("CMYK", "YCCK") else "GRAY"
        simplejpeg.decode_jpeg(data, colorspace=colours, min_factor=8, strict=True)
    except ValueError as error:
        text = str(error)
        if text.startswith(GRAVE) and "ICC" not in text and not _padded(data, text):
            return f"damaged: {text.removeprefix('Corrupt JPEG data: ')}"
    return None


def _padded(data: bytes, text: str) -> bool:
    """Whether the bytes that libjpeg found before the end of the picture are nothing but padding."""
    found: Any = re.search(r"(\d+) extraneous bytes before marker 0xd9", text)
    end = data.find(b"\xff\xd9") if found else -1
    return end > 0 and len(set(data[end - int(found[1]) : end])) == 1


# WebP


def _webp(data: bytes, pixels: int) -> str | None:
    """libwebp codes pictures of one colour in zeros too, but many pixels in each; lossless ones in anything."""
    if int.from_bytes(data[4:8], "little") + 8 > len(data):
        return "damaged: shorter than its header says"
    for kind, start, stop in _chunks(data, 12, len(data)):
        if kind != b"VP8 ":
            continue
        for place, length in _runs(data, start, stop):
            if length > 48 + pixels / FLAT:
                return f"damaged: {length:,} zero bytes at byte {place:,}, where no picture has them"
    return None


def _chunks(data: bytes, start: int, stop: int) -> Iterator[tuple[bytes, int, int]]:
    """Chunks of RIFF with the places of their contents, those within a frame of an animation too."""
    while start + 8 <= stop:
        kind, size = data[start : start + 4], int.from_bytes(data[start + 4 : start + 8], "little")
        inside, end = start + 8, min(start + 8 + size, stop)
        if kind == b"ANMF":
            yield from _chunks(data, inside + 16, end)
        else:
            yield kind, inside, end
        start += 8 + size + size % 2
