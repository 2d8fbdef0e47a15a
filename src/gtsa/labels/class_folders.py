"""One folder a class: IMAGES/cat/1.jpg. Nested deeper, the first folder is the class."""

from __future__ import annotations

import hashlib
import os
from typing import Any

from gtsa.labels import Kind, Labelled, Problems
from gtsa.sources.folder import Folder


class ClassFolders:
    """Images whose first folder is their class."""

    @staticmethod
    def claims(images: str, labels: str | None, kind: Kind) -> bool:
        return kind == "classes" and labels is None and os.path.isdir(images)

    @staticmethod
    def read(images: str, labels: str | None, kind: Kind, **_: Any) -> Labelled:
        source, problems = Folder(images), Problems(images)
        parts = [os.path.normpath(name).split(os.sep) for name in source.files]
        folders = {entry.name for entry in os.scandir(images) if entry.is_dir() and not entry.name.startswith(".")}
        classes = tuple(sorted(folders))
        counts = dict.fromkeys(classes, 0)
        for name, part in zip(source.files, parts, strict=True):
            if len(part) < 2:
                problems.add("image outside a class folder", name, "move it into the folder of its class")
            else:
                counts[part[0]] += 1
        for name, count in counts.items():
            if not count:
                problems.add("class folder without images", name, "remove the folder, or put images there")
        if len(classes) < 2:
            problems.add("too few classes", images, f"there are {len(classes)} class folders; at least two are needed")
        problems.insist()
        targets = [classes.index(part[0]) for part in parts]
        digest = hashlib.sha256("\n".join(source.files).encode("utf-8", "surrogateescape")).hexdigest()
        return Labelled(source, range(len(source)), targets, kind, classes, digest)
