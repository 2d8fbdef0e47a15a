"""Predictions on disk: a table of classes, masks as PNG, detections as COCO JSON, and pictures."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePath

import numpy as np
from PIL import Image
from torch import Tensor

from gtsa.core.errors import UserError, escaped
from gtsa.core.files import read_json, store
from gtsa.data.labels import Labelled
from gtsa.evaluation.context import DetectedObject, Prediction
from gtsa.evaluation.prediction_pictures import describe, draw_prediction, to_palette_image

BEST = 5  # classes whose scores are in the table
UNFINISHED = ".unfinished.json"  # in the folder of an evaluation that runs, or was stopped: its settings


def check_folder(folder: str, requested: Mapping[str, object]) -> None:
    """Raises UserError if predictions would be mixed with other files.

    Args:
        requested: settings of the evaluation. Files of the same evaluation, stopped before its end, are replaced.
    """
    path = Path(folder)
    with writing(folder):
        names = [p.name for p in path.iterdir() if p.name != UNFINISHED] if path.exists() else []
    if names and read_json(path / UNFINISHED) != requested:
        raise UserError(
            f"--predictions {folder} is not empty ({escaped(sorted(names)[0])}{', ...' if len(names) > 1 else ''}): "
            "predictions of two evaluations are not mixed; give another folder, or remove this one first"
        )


@contextmanager
def mark_unfinished(folder: str | None, tasks: Iterable[str], requested: Mapping[str, object]) -> Iterator[None]:
    """Marks the folder as unfinished until the block ends, and first removes predictions of a stopped evaluation."""
    if folder is None:
        yield
        return
    check_folder(folder, requested)
    path = Path(folder)
    with writing(folder):
        path.mkdir(parents=True, exist_ok=True)
        for old in (path / task for task in tasks):
            if old.is_dir() and not old.is_symlink():
                shutil.rmtree(old)
        store(path / UNFINISHED, (json.dumps(requested) + "\n").encode())
    yield
    with writing(folder):
        (path / UNFINISHED).unlink(missing_ok=True)


@contextmanager
def writing(folder: str) -> Iterator[None]:
    """Errors of the disk as UserError (6)."""
    try:
        yield
    except OSError as error:
        raise UserError(f"--predictions {folder} cannot be written: {error.strerror}; give another folder", 6) from None


class PredictionWriter:
    """Called with every (index, prediction); writes them into ``folder/task``.

    * Scores of classes, a tensor [C]: ``predictions.csv``.
    * A map of class ids, a tensor [H, W]: ``masks/NAME.png``, 8 bits with a palette, 16 bits above 256 classes.
    * A list of COCO result dictionaries: ``detections.json``.
    * ``pictures/NAME.png`` of some images, evenly spread: prediction and truth side by side.

    NAME is the image's path without its suffix and without parts that lead out of the folder.

    Args:
        folder: of --predictions; None: nothing is written.
        pictures: number of images to draw.
        task: name of the subfolder.
        data: the evaluation images.

    Attributes:
        indices: of a fold: the index in ``data`` of each of its images.
    """

    def __init__(self, folder: str | None, pictures: int, task: str, data: Labelled) -> None:
        self.data, self.root = data, Path(folder).resolve() / task if folder else None
        if self.root:
            self._make(self.root.parent)
        self.indices: Sequence[int] | None = None
        self.pictured = set(np.linspace(0, len(data) - 1, min(pictures, len(data))).round().astype(int).tolist())
        self.rows: dict[int, list[str]] = {}
        self.detections: dict[int, list[DetectedObject]] = {}
        self.names = unique_names([data.name(i) for i in range(len(data))]) if folder else []

    def __call__(self, index: int, prediction: Prediction) -> None:
        if self.root is None:
            return
        image = index if self.indices is None else self.indices[index]
        if isinstance(prediction, list):
            self.detections[image] = prediction
        elif prediction.ndim == 1:
            self.rows[image] = self._row(image, prediction)
        else:
            self._store(f"masks/{self.names[image]}.png", _png(to_palette_image(prediction, len(self.data.classes))))
        if image in self.pictured:
            self._store(f"pictures/{self.names[image]}.png", _png(draw_prediction(self.data, image, prediction)))

    def close(self) -> None:
        """Writes the files that hold all images."""
        if self.rows:
            best = min(BEST, len(self.data.classes))
            file = io.StringIO()
            table = csv.writer(file, lineterminator="\n")
            ranks = [f"{column} {rank}" for rank in range(1, best + 1) for column in ("class", "score")]
            table.writerow(["image", "truth", "prediction", *ranks])
            table.writerows(self.rows[image] for image in sorted(self.rows))
            self._store("predictions.csv", file.getvalue().encode("utf-8", "surrogateescape"))
        if self.detections:
            detections = [entry for image in sorted(self.detections) for entry in self.detections[image]]
            self._store("detections.json", (json.dumps(detections) + "\n").encode())

    def _row(self, image: int, scores: Tensor) -> list[str]:
        classes = self.data.classes
        values, best = scores.float().topk(min(BEST, len(classes)))
        ranks = [text for value, i in zip(values, best, strict=True) for text in (classes[i], f"{float(value):.6g}")]
        return [self.data.name(image), *describe(self.data, image, scores), *ranks]

    def _store(self, name: str, data: bytes) -> None:
        assert self.root is not None
        path = self.root / name
        self._make(path.parent)
        with writing(str(self.root.parent)):
            store(path, data)

    def _make(self, folder: Path) -> None:
        if folder.resolve() != folder:  # a planted link
            raise UserError(f"{escaped(str(folder))} leads out of the folder of --predictions: remove the link", 8)
        with writing(str(self.root and self.root.parent)):
            folder.mkdir(parents=True, exist_ok=True)


def unique_names(images: Iterable[str]) -> list[str]:
    """A relative path without suffix for each image, all different even if upper and lower case count as equal."""
    paths = []
    for image in images:
        path = PurePath(image)
        parts = [part for part in path.parts if part not in (path.anchor, "..")]
        paths.append(PurePath(*parts or ["image"]))
    short = [str(path.with_suffix("") if path.stem.strip(".") else path) for path in paths]  # ...png would become ..
    stems = Counter(name.lower() for name in short)
    names: list[str] = []
    taken: set[str] = set()
    for path, stem in zip(paths, short, strict=True):
        first = name = stem if stems[stem.lower()] == 1 else str(path)
        number = 1
        while name.lower() in taken:
            number += 1
            name = f"{first}.{number}"
        taken.add(name.lower())
        names.append(name)
    return names


def _png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()
