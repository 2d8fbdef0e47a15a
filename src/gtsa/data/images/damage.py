"""Finds holes in JPEG and WebP files. Decoders fill them without an error.

There are three signs of a hole. Zeros: a long run of zero bits stands for many equal coefficients in a row, which no
picture has. Warnings of libjpeg: data that end before the picture or after it; Pillow hides them, simplejpeg reports
them (pip install 'gtsa[jpeg]'). Tables that no encoder writes. A hole is not found if the decoder returns to the right
number of blocks after it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from gtsa.data.images.blobs import File, open_file

try:
    import simplejpeg
except ImportError:  # then libjpeg's warnings are hidden
    simplejpeg = None

SHORTEST = 8  # zero bytes of the shortest run that is checked
RARE = 72  # zero bits that stand for equal non-zero coefficients: a good code has this run once in 2**72 bits
FLAT = 5_000  # least number of equal pixels that libwebp stores in one zero byte (measured: 10,000)
MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
GRAVE = ("Corrupt JPEG data", "Premature end of JPEG")


def sees_warnings() -> bool:
    """Whether libjpeg's warnings are available."""
    return simplejpeg is not None


def find_damage(file: File, form: str, width: int, height: int) -> str | None:
    """Why an image that decodes is damaged; None if there is no sign. ``form``: Pillow's name of the format."""
    if form not in ("JPEG", "MPO", "WEBP"):
        return None
    with open_file(file) as opened:
        data = opened.read()
    if form == "WEBP":
        return _find_webp_hole(data, width * height)
    return _find_jpeg_hole(data) or _libjpeg_warning(data)


# JPEG


class _Code(NamedTuple):
    """The code of zero bits in a Huffman table: its length in bits, and its symbol."""

    length: int
    symbol: int

    @property
    def bits(self) -> int:
        """Bits of the symbol and the value that follows it."""
        return self.length + (self.symbol & 15)


class _Scan(NamedTuple):
    """Entropy-coded data from ``start`` to ``stop``, and the most zero bits in a row that a picture has there."""

    start: int
    stop: int
    limit: float


def _find_jpeg_hole(data: bytes) -> str | None:
    try:
        for scan in _scans(data):
            for position, length in _runs(data, scan.start, scan.stop):
                padding = (
                    data[position + length : position + length + 2] == b"\xff\xd9"
                )  # before the end of the picture
                if 8 * length > scan.limit and not padding:
                    return f"damaged: {length:,} zero bytes at byte {position:,}, where no picture has them"
    except _InvalidTable as reason:
        return f"damaged: {reason}"
    except (IndexError, KeyError):  # not a structure that we know: left to libjpeg
        return None
    return None


class _InvalidTable(Exception):
    """A table that no encoder writes."""


def _runs(data: bytes, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Position and length of the runs of zero bytes."""
    while (position := data.find(b"\0" * SHORTEST, start, stop)) >= 0:
        start = position
        step = 1 << 12
        while step:  # large steps, then smaller ones
            if data[start : start + step] == b"\0" * step and start + step <= stop:
                start += step
            else:
                step >>= 1
        yield position, start - position


def _scans(data: bytes) -> Iterator[_Scan]:
    """The scans of the first picture in the file."""
    tables: dict[int, _Code] = {}
    blocks: dict[int, int] = {}  # of each component in an interleaved unit
    progressive, position = False, 2
    while (marker := MARKER.search(data, position)) is not None:
        kind, position = data[marker.start() + 1], marker.end()
        if kind == 0xD9:
            return
        if kind == 0xD8 or kind == 0x01:
            continue
        stop = position + int.from_bytes(data[position : position + 2])
        part, position = data[position + 2 : stop], stop
        if kind == 0xC4:
            tables |= _read_huffman(part)
        elif kind == 0xDB:
            _check_quantisation(part)
        elif kind in (0xC0, 0xC1, 0xC2):
            progressive = kind == 0xC2
            blocks = {part[6 + 3 * i]: (part[7 + 3 * i] >> 4) * (part[7 + 3 * i] & 15) for i in range(part[5])}
        elif kind in (0xC9, 0xCA, 0xC3):  # arithmetic coding, lossless
            return
        elif kind == 0xDA:
            end = MARKER.search(data, position)
            end_at = end.start() if end else len(data)
            yield _Scan(position, end_at, _limit(part, tables, blocks, progressive))
            position = end_at


def _read_huffman(part: bytes) -> dict[int, _Code]:
    """The code of zero bits in each table: the first code of the shortest length."""
    codes: dict[int, _Code] = {}
    while len(part) > 17:
        counts = part[1:17]
        total = sum(counts)
        if total:
            length = next(i for i, count in enumerate(counts, 1) if count)
            codes[part[0]] = _Code(length, part[17])
        part = part[17 + total :]
    return codes


def _check_quantisation(part: bytes) -> None:
    while part:
        wide = part[0] >> 4
        values = part[1 : 1 + 64 * (1 + wide)]
        if len(values) == 64 * (1 + wide) and 0 in (memoryview(values).cast("H") if wide else values):
            raise _InvalidTable("a quantisation table with zeros")
        part = part[1 + 64 * (1 + wide) :]


def _limit(part: bytes, tables: dict[int, _Code], blocks: dict[int, int], progressive: bool) -> float:
    """The most zero bits in a row that a scan may have; infinite where they can be a flat area."""
    count, first, low = part[0], part[1 + 2 * part[0]], part[3 + 2 * part[0]]
    if progressive and first == 0:
        return float("inf")  # only DC coefficients: zeros are a flat area, or a refinement by 0
    flat, bounded = 0, False
    for i in range(count):
        direct, other = tables[part[2 + 2 * i] >> 4], tables[0x10 | part[2 + 2 * i] & 15]
        many = blocks[part[1 + 2 * i]] if count > 1 else 1
        if other.symbol & 15:
            bounded = True
            flat += many * (0 if progressive else direct.bits)
        else:
            flat += many * (direct.bits + other.bits)
    if not bounded:
        return float("inf")
    return flat + RARE + (64 if progressive and low >> 4 else 0)  # refinements also hold bits of other coefficients


def _libjpeg_warning(data: bytes) -> str | None:
    """libjpeg's warning, if any. At an eighth of the size it reads all data and computes little."""
    if simplejpeg is None:
        return None
    try:
        colours = simplejpeg.decode_jpeg_header(data, strict=False)[2]
        colours = "CMYK" if colours in ("CMYK", "YCCK") else "GRAY"
        simplejpeg.decode_jpeg(data, colorspace=colours, min_factor=8, strict=True)
    except ValueError as error:
        text = str(error)
        if text.startswith(GRAVE) and "ICC" not in text and not _is_padding(data, text):
            return f"damaged: {text.removeprefix('Corrupt JPEG data: ')}"
    return None


def _is_padding(data: bytes, text: str) -> bool:
    """Whether the extraneous bytes before the end of the picture are only padding."""
    match = re.search(r"(\d+) extraneous bytes before marker 0xd9", text)
    end = data.find(b"\xff\xd9")
    return match is not None and end > 0 and len(set(data[end - int(match[1]) : end])) == 1


# WebP


def _find_webp_hole(data: bytes, pixels: int) -> str | None:
    """libwebp also codes pictures of one colour as zeros, but with many pixels in each. Lossless data go unchecked."""
    if int.from_bytes(data[4:8], "little") + 8 > len(data):
        return "damaged: shorter than its header says"
    for kind, start, stop in _chunks(data, 12, len(data)):
        if kind != b"VP8 ":
            continue
        for position, length in _runs(data, start, stop):
            if length > 48 + pixels / FLAT:
                return f"damaged: {length:,} zero bytes at byte {position:,}, where no picture has them"
    return None


def _chunks(data: bytes, start: int, stop: int) -> Iterator[tuple[bytes, int, int]]:
    """RIFF chunks with the positions of their contents, also those within a frame of an animation."""
    while start + 8 <= stop:
        kind, size = data[start : start + 4], int.from_bytes(data[start + 4 : start + 8], "little")
        content, end = start + 8, min(start + 8 + size, stop)
        if kind == b"ANMF":
            yield from _chunks(data, content + 16, end)
        else:
            yield kind, content, end
        start += 8 + size + size % 2
