"""Images without labels, for evaluations that need none."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import ClassVar

from gtsa.data.labels import Kind, LabelFormat, Labelled, LabelOptions, Problems
from gtsa.data.labels._classes import digest
from gtsa.data.labels._files import report_ignored
from gtsa.data.sources import Source, kinds, open_source


class Unlabelled(LabelFormat):
    """A folder of images, a .txt file that lists them, or tar shards. LABELS are ignored."""

    needs: ClassVar[dict[Kind, str]] = {"none": "a folder of images"}

    @staticmethod
    def claims(images: str, labels: str | None, kind: Kind) -> bool:
        return kind == "none" and any(source.claims(images) for source in kinds())

    @staticmethod
    def read(images: str, labels: str, kind: Kind, options: LabelOptions) -> Labelled:
        source, problems = open_source(images), Problems(images)
        for folder, reason in source.unreadable:
            problems.add("folder that cannot be listed", folder, reason)
        names = [source.name(index) for index in range(len(source))]
        for index, name in enumerate(names):
            if (path := source.path(index)) is not None and not os.path.isfile(path):
                problems.add("image missing on disk", name, "there is no such file")
        report_ignored(source)
        if not names:
            problems.add("no images", images, "put images there, nested or not")
        problems.raise_if_any()
        return unlabelled(source, range(len(names)))


def unlabelled(source: Source, indices: Sequence[int]) -> Labelled:
    """Images of a source without labels."""
    names = [source.name(index) for index in range(len(source))]
    return Labelled(source, indices, [None] * len(names), "none", (), digest(names))
