"""What is noticed about images that can all be read, and hardly was meant so: masks among them, images nearly black."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from gtsa.core.errors import escaped
from gtsa.data import decoding
from gtsa.data.pixels import BadImage, Range
from gtsa.data.sources import Source

SAMPLE = 16  # images of a kind that are looked into
SOME = 0.1  # share of images that is worth a word
FEW = 40  # values at most in what may be a mask
SINGLE = ("1", "L", "P", "I;16", "I;16B", "I")
EXACT = ("PNG", "BMP", "TIFF")  # formats that keep numbers
FULL = 65535


class Noted:
    """Told of every usable image; finds what to remark on."""

    def __init__(self, source: Source, range16: Range) -> None:
        self.source, self.range16 = source, range16
        self.single: list[int] = []
        self.deep: list[int] = []
        self.count = 0

    def add(self, index: int, found: decoding.Header) -> None:
        self.count += 1
        if found.format in EXACT and found.mode in SINGLE:
            self.single.append(index)
        if found.depth > 8 and found.format != "item" and not found.mode.startswith("F"):
            self.deep.append(index)

    def remarks(self) -> list[str]:
        return [line for line in (self._masks(), self._dark()) if line]

    def _masks(self) -> str:
        """Single-channel images of few values are masks, more often than not."""
        if len(self.single) < max(2, SOME * self.count):
            return ""
        counts = [len(np.unique(values)) for values in self._values(self.single)]
        few = [count for count in counts if count <= FEW]
        if not few or len(few) < 0.75 * len(counts):
            return ""
        share = f"{len(self.single):,} of {self.count:,} images ({100 * len(self.single) / self.count:.0f} %)"
        return (
            f"{share} are single-channel, with {max(few)} values or fewer in those looked at: masks? "
            f"Leave them out with --exclude {self._pattern()}"
        )

    def _pattern(self) -> str:
        """Something that most of the single-channel files have in common, e.g. their folder; quoted for a shell."""
        names = [self.source.name(index) for index in self.single]
        parts = Counter(part for name in names for part in set(name.split("/")[:-1]))
        others = len(names) - (parts.most_common(1)[0][1] if parts else 0)
        if parts and others <= 0.1 * len(names):
            singles = set(self.single)
            top = [part for part, count in parts.most_common() if len(names) - count <= 0.1 * len(names)]
            rest = [self.source.name(i).split("/")[:-1] for i in range(len(self.source)) if i not in singles]
            for part in top:  # not a folder that holds the other images too
                if not any(part in folders for folders in rest):
                    return "'" + escaped(part).replace("'", "'\\''") + "'"
        return "PATTERN, e.g. '*_mask.png'"

    def _dark(self) -> str:
        """Values of 16 bits that fill a small part of the range that becomes black to white."""
        found = []
        for values in self._values(self.deep):
            scale = 257 if values.dtype == np.uint8 else 1  # colour PNGs, of which Pillow keeps the upper half
            found.append((int(values.min()) * scale, int(values.max()) * scale))
        if not found:
            return ""
        low, high = min(pair[0] for pair in found), max(pair[1] for pair in found)
        black, white = self.range16
        told = f"16-bit images: values from {low:,} to {high:,} in {len(found):,} of {len(self.deep):,}"
        if 0 < high <= black + (white - black) / 4:
            bits = max(8, math.ceil(math.log2(high + 1)))
            return (
                f"{told}, of {black:g} to {white:g}: nearly black; give --range16 0 {2**bits - 1}"
                f"{'' if bits < 16 else ' or less'}"
            )
        if self.range16 != (0, FULL) and high > white:
            return f"{told}, above the {white:g} of --range16: what is more is white"
        return ""

    def _values(self, indices: Sequence[int]) -> list[np.ndarray]:
        """Of some of the images, spread evenly."""
        spread = np.linspace(0, len(indices) - 1, min(SAMPLE, len(indices))).round().astype(int)
        found = []
        for place in spread:
            path = self.source.path(indices[place])
            try:
                if path is not None:
                    found.append(decoding.values(path))
            except BadImage:  # of a scan that decodes nothing
                continue
        return found
