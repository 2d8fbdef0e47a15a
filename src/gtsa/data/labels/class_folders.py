"""One folder a class: IMAGES/cat/1.jpg. The first folder of a path is the class."""

from __future__ import annotations

import os
from typing import ClassVar

from gtsa.data.labels import Kind, LabelFormat, Labelled, LabelOptions, Problems
from gtsa.data.labels._classes import label_images, read_class_names
from gtsa.data.labels._files import report_ignored
from gtsa.data.sources.folder import Folder


class ClassFolders(LabelFormat):
    """Images whose first folder is their class.

    The classes are the folders, or the list of ``classes`` where train and val do not both have all folders.
    """

    needs: ClassVar[dict[Kind, str]] = {"classes": "class folders"}

    @staticmethod
    def claims(images: str, labels: str | None, kind: Kind) -> bool:
        return kind == "classes" and labels is None and os.path.isdir(images)

    @staticmethod
    def read(images: str, labels: str, kind: Kind, options: LabelOptions) -> Labelled:
        source, problems = Folder(images), Problems(images)
        for folder, reason in source.unreadable:
            problems.add("folder that cannot be listed", folder, reason)
        problems.raise_if_any()
        report_ignored(source)
        counts = dict.fromkeys(sorted(_list_folders(images)), 0)
        class_of: list[str | None] = []
        for name in source.files:
            folder, inside, _rest = name.partition(os.sep)
            if inside:
                counts[folder] += 1
                class_of.append(folder)
            else:
                problems.add("image outside a class folder", name, "move it into the folder of its class")
                class_of.append(None)
        for folder, count in counts.items():
            if count == 0:
                problems.add("class folder without images", folder, "remove the folder, or put images there")
            elif count == 1:
                problems.add("class folder with one image", folder, "add images of this class, or remove the folder")
        return label_images(source, class_of, read_class_names(options.classes) or tuple(counts), kind, problems)


def _list_folders(images: str) -> list[str]:
    return [
        name for name in os.listdir(images) if not name.startswith(".") and os.path.isdir(os.path.join(images, name))
    ]
