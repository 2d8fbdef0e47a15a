"""Images without labels, for evaluations that need none."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from gtsa.data.labels import Kind, Labelled, Problems
from gtsa.data.labels._classes import digest
from gtsa.data.labels._files import passed_over
from gtsa.data.sources import Source, open_source
from gtsa.data.sources.folder import Folder
from gtsa.data.sources.list_file import Listing


class Plain:
    """A folder of images, or a .txt file that lists them. What else is given as labels is not looked at."""

    @staticmethod
    def claims(images: str, labels: str | None, kind: Kind) -> bool:
        return kind == "none" and (Folder.claims(images) or Listing.claims(images))

    @staticmethod
    def read(images: str, labels: str | None, kind: Kind, **_: Any) -> Labelled:
        source, problems = open_source(images), Problems(images)
        for folder, reason in source.unreadable:
            problems.add("folder that cannot be listed", folder, reason)
        names = [source.name(index) for index in range(len(source))]
        for index, name in enumerate(names):
            if not os.path.isfile(source.path(index) or ""):
                problems.add("image missing on disk", name, "there is no such file")
        passed_over(source)
        if not names:
            problems.add("no images", images, "put images there, nested or not")
        problems.insist()
        return unlabelled(source, range(len(names)))


def unlabelled(source: Source, places: Sequence[int]) -> Labelled:
    """These images of a source, of which nothing is known."""
    names = [source.name(index) for index in range(len(source))]
    return Labelled(source, places, [None] * len(names), "none", (), digest(names))
