"""One folder a class: IMAGES/cat/1.jpg. Nested deeper, the first folder is the class."""

from __future__ import annotations

import os
from typing import Any

from gtsa.data.labels import Kind, Labelled, Problems
from gtsa.data.labels._classes import listed, one_each
from gtsa.data.labels._files import passed_over
from gtsa.data.sources.folder import Folder


class ClassFolders:
    """Images whose first folder is their class.

    The classes are the folders that there are, or the list of ``classes``, where train and val do not have them all.
    """

    @staticmethod
    def claims(images: str, labels: str | None, kind: Kind) -> bool:
        return kind == "classes" and labels is None and os.path.isdir(images)

    @staticmethod
    def read(images: str, labels: str | None, kind: Kind, classes: str | None = None, **_: Any) -> Labelled:
        source, problems = Folder(images), Problems(images)
        for folder, reason in source.unreadable:
            problems.add("folder that cannot be listed", folder, reason)
        problems.insist()
        passed_over(source)
        counts = dict.fromkeys(sorted(_folders(images)), 0)
        found: list[str | None] = []
        for name in source.files:
            folder, inside, _rest = name.partition(os.sep)
            if inside:
                counts[folder] += 1
                found.append(folder)
            else:
                problems.add("image outside a class folder", name, "move it into the folder of its class")
                found.append(None)
        for folder, count in counts.items():
            if count == 0:
                problems.add("class folder without images", folder, "remove the folder, or put images there")
            elif count == 1:
                problems.add("class folder with one image", folder, "add images of this class, or remove the folder")
        return one_each(source, found, listed(classes) or tuple(counts), kind, problems)


def _folders(images: str) -> list[str]:
    return [
        name for name in os.listdir(images) if not name.startswith(".") and os.path.isdir(os.path.join(images, name))
    ]
