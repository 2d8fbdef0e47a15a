"""Remarks on readable images that look like a mistake: masks among the images, images nearly black."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from gtsa.core.errors import escaped
from gtsa.data.images import decoding
from gtsa.data.images.blobs import loaded
from gtsa.data.images.pixels import BadImage, Range
from gtsa.data.sources import Source

SAMPLE = 16  # images of a kind whose values are read
SOME = 0.1  # share of images that is worth a remark
FEW = 40  # a mask has at most this many values
SINGLE = ("1", "L", "P", "I;16", "I;16B", "I")
EXACT = ("PNG", "BMP", "TIFF")  # formats that keep numbers
FULL = 65535


class RemarkCollector:
    """Collects the headers of all usable images, and derives remarks."""

    def __init__(self, source: Source, range16: Range) -> None:
        self.source, self.range16 = source, range16
        self.single: list[int] = []
        self.deep: list[int] = []
        self.count = 0

    def add(self, index: int, header: decoding.Header) -> None:
        self.count += 1
        if header.format in EXACT and header.mode in SINGLE:
            self.single.append(index)
        if header.depth > 8 and header.format != "item" and not header.mode.startswith("F"):
            self.deep.append(index)

    def remarks(self) -> list[str]:
        return [line for line in (self._remark_on_masks(), self._remark_on_range()) if line]

    def _remark_on_masks(self) -> str:
        """Single-channel images with few values are probably masks."""
        if len(self.single) < max(2, SOME * self.count):
            return ""
        counts = [len(np.unique(values)) for values in self._read_sample(self.single)]
        few = [count for count in counts if count <= FEW]
        if not few or len(few) < 0.75 * len(counts):
            return ""
        share = f"{len(self.single):,} of {self.count:,} images ({100 * len(self.single) / self.count:.0f} %)"
        return (
            f"{share} are single-channel, with {max(few)} values or fewer in the sample: masks? "
            f"Leave them out with --exclude {self._common_pattern()}"
        )

    def _common_pattern(self) -> str:
        """A pattern for most of the single-channel files, e.g. their folder; quoted for a shell."""
        names = [self.source.name(index) for index in self.single]
        parts = Counter(part for name in names for part in set(name.split("/")[:-1]))
        others = len(names) - (parts.most_common(1)[0][1] if parts else 0)
        if parts and others <= 0.1 * len(names):
            singles = set(self.single)
            top = [part for part, count in parts.most_common() if len(names) - count <= 0.1 * len(names)]
            rest = [self.source.name(i).split("/")[:-1] for i in range(len(self.source)) if i not in singles]
            for part in top:  # not a folder that also holds other images
                if not any(part in folders for folders in rest):
                    return "'" + escaped(part).replace("'", "'\\''") + "'"
        return "PATTERN, e.g. '*_mask.png'"

    def _remark_on_range(self) -> str:
        """16-bit values that fill a small part of --range16, or exceed it."""
        extremes = []
        for values in self._read_sample(self.deep):
            scale = 257 if values.dtype == np.uint8 else 1  # colour PNGs: Pillow keeps the upper 8 bits
            extremes.append((int(values.min()) * scale, int(values.max()) * scale))
        if not extremes:
            return ""
        low, high = min(pair[0] for pair in extremes), max(pair[1] for pair in extremes)
        black, white = self.range16
        summary = f"16-bit images: values from {low:,} to {high:,} in {len(extremes):,} of {len(self.deep):,}"
        if 0 < high <= black + (white - black) / 4:
            bits = max(8, math.ceil(math.log2(high + 1)))
            return (
                f"{summary}, of {black:g} to {white:g}: nearly black; give --range16 0 {2**bits - 1}"
                f"{'' if bits < 16 else ' or less'}"
            )
        if self.range16 != (0, FULL) and high > white:
            return f"{summary}, above the {white:g} of --range16: larger values become white"
        return ""

    def _read_sample(self, indices: Sequence[int]) -> list[np.ndarray]:
        """The values of SAMPLE images, spread evenly."""
        spread = np.linspace(0, len(indices) - 1, min(SAMPLE, len(indices))).round().astype(int)
        arrays = []
        for position in spread:
            try:
                if (file := self.source.file(indices[position])) is not None:
                    arrays.append(decoding.read_values(loaded(file)))
            except BadImage:  # possible where the scan reads headers only
                continue
        return arrays
