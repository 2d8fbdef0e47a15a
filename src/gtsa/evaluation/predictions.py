"""Predictions that the user asked to keep: a table of classes, masks as PNG, detections as COCO JSON, and pictures."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from gtsa.core.errors import UserError, escaped
from gtsa.core.files import store
from gtsa.data.labels import IGNORE, Labelled
from gtsa.evaluation.legend import legend

BEST = 5  # classes whose scores the table tells
LIKELY = 0.5  # from this probability on an image is said to show a class, where it can show several
SHOWN = 0.3  # from this score on a box is drawn
BEGUN = ".unfinished.json"  # in the folder of an evaluation that is at work, or was stopped: what it was asked
SIDE, LINE, GAP = 640, 22, 8  # px of a picture: longest side of a panel, height of a line of text, space between


def insist_on_place(folder: str, asked: Mapping[str, Any]) -> None:
    """Raises UserError where predictions would be mixed with what is there.

    Args:
        asked: of the evaluation. What the same one left when it was stopped is replaced.
    """
    place = Path(folder)
    with writing(folder):
        found = [p.name for p in place.iterdir() if p.name != BEGUN] if place.exists() else []
    if found and not _stopped(place / BEGUN, asked):
        raise UserError(
            f"--predictions {folder} is not empty ({escaped(sorted(found)[0])}{', ...' if len(found) > 1 else ''}): "
            "predictions of two evaluations are not mixed; give another folder, or remove it first"
        )


def _stopped(file: Path, asked: Mapping[str, Any]) -> bool:
    try:
        return bool(json.loads(file.read_bytes()) == asked)
    except (OSError, ValueError):
        return False


@contextmanager
def placed(folder: str | None, tasks: Iterable[str], asked: Mapping[str, Any]) -> Iterator[None]:
    """Marks the folder as that of an evaluation at work, until it is done; what it left when it was stopped goes."""
    if folder is None:
        yield
        return
    insist_on_place(folder, asked)
    place = Path(folder)
    with writing(folder):
        place.mkdir(parents=True, exist_ok=True)
        for old in (place / task for task in tasks):
            if old.is_dir() and not old.is_symlink():
                shutil.rmtree(old)
        store(place / BEGUN, (json.dumps(asked) + "\n").encode())
    yield
    with writing(folder):
        (place / BEGUN).unlink(missing_ok=True)


@contextmanager
def writing(folder: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"--predictions {folder} cannot be written: {error.strerror}; give another folder", 6) from None


class PredictionWriter:
    """Told of every prediction as (index, prediction); writes what was asked for below ``folder/task``.

    * Scores of classes, a tensor [C]: ``predictions.csv``.
    * A map of class places, a tensor [H, W]: ``masks/NAME.png``, 8 bits with a palette, 16 bits above 256 classes.
    * A list of COCO result dictionaries: ``detections.json``.
    * ``pictures/NAME.png`` of some images, evenly spread: prediction and truth side by side.

    NAME is the image's path without its suffix; what leads out of the folder is taken out of it.

    Args:
        folder: of --predictions; None: nothing is kept.
        pictures: how many images to draw.
        task: names the folder's part.
        data: the images that are judged.
    """

    def __init__(self, folder: str | None, pictures: int, task: str, data: Labelled) -> None:
        self.data, self.root = data, Path(folder).resolve() / task if folder else None
        if self.root:
            self._make(self.root.parent)
        self.places: Sequence[int] | None = None  # of a fold: which images of ``data`` it judges
        self.drawn = set(np.linspace(0, len(data) - 1, min(pictures, len(data))).round().astype(int).tolist())
        self.rows: dict[int, list[str]] = {}
        self.detections: dict[int, list[dict[str, Any]]] = {}
        self.names = names_of([data.name(i) for i in range(len(data))]) if folder else []

    def __call__(self, index: int, prediction: Any) -> None:
        if self.root is None:
            return
        place = index if self.places is None else self.places[index]
        if isinstance(prediction, list):
            self.detections[place] = prediction
        elif prediction.ndim == 1:
            self.rows[place] = self._row(place, prediction)
        else:
            self._store(f"masks/{self.names[place]}.png", _png(as_picture(prediction, len(self.data.classes))))
        if place in self.drawn:
            self._store(f"pictures/{self.names[place]}.png", _png(drawn(self.data, place, prediction)))

    def close(self) -> None:
        """Writes what all images together make."""
        if self.rows:
            best = min(BEST, len(self.data.classes))
            file = io.StringIO()
            table = csv.writer(file, lineterminator="\n")
            ranks = [f"{what} {rank}" for rank in range(1, best + 1) for what in ("class", "score")]
            table.writerow(["image", "truth", "prediction", *ranks])
            table.writerows(self.rows[place] for place in sorted(self.rows))
            self._store("predictions.csv", file.getvalue().encode("utf-8", "surrogateescape"))
        if self.detections:
            found = [entry for place in sorted(self.detections) for entry in self.detections[place]]
            self._store("detections.json", (json.dumps(found) + "\n").encode())

    def _row(self, place: int, scores: Tensor) -> list[str]:
        classes = self.data.classes
        values, best = scores.float().topk(min(BEST, len(classes)))
        ranks = [text for value, i in zip(values, best, strict=True) for text in (classes[i], f"{float(value):.6g}")]
        return [self.data.name(place), *told(self.data, place, scores), *ranks]

    def _store(self, name: str, data: bytes) -> None:
        assert self.root is not None
        place = self.root / name
        self._make(place.parent)
        with writing(str(self.root.parent)):
            store(place, data)

    def _make(self, folder: Path) -> None:
        if folder.resolve() != folder:  # a link that somebody planted
            raise UserError(f"{escaped(str(folder))} leads out of the folder of --predictions: remove the link", 8)
        with writing(str(self.root and self.root.parent)):
            folder.mkdir(parents=True, exist_ok=True)


def names_of(images: Iterable[str]) -> list[str]:
    """A relative path without suffix for each image, all different even where letters' case does not count."""
    paths = []
    for image in images:
        path = PurePath(image)
        parts = [part for part in path.parts if part not in (path.anchor, "..")]
        paths.append(PurePath(*parts or ["image"]))
    short = [str(path.with_suffix("") if path.stem.strip(".") else path) for path in paths]  # of ...png .. would remain
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


def told(data: Labelled, place: int, scores: Tensor) -> tuple[str, str]:
    """Truth and prediction of an image in words, for scores [C] of classes."""
    truth, classes = data.target(place), data.classes
    if data.kind == "multilabel":
        words = ["; ".join(classes[int(i)] for i in chosen.nonzero()[:, 0]) for chosen in (truth, scores >= LIKELY)]
        return words[0], words[1]
    return classes[truth], classes[int(scores.argmax())]


# Pictures


def palette(count: int = 256) -> np.ndarray:
    """Colours of class places as in PASCAL VOC, uint8 [count, 3]: a number's bits are dealt out to the channels."""
    numbers = np.arange(count)
    colours = np.zeros((count, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= ((numbers >> (3 * bit + channel)) & 1).astype(np.uint8) << (7 - bit)
    return colours


def as_picture(classes: Tensor, count: int) -> Image.Image:
    """A map of class places [H, W] as it is stored."""
    array = classes.cpu().numpy()
    if count > 256:
        return Image.fromarray(array.astype(np.uint16))
    picture = Image.fromarray(array.astype(np.uint8))
    picture.putpalette(palette().tobytes())
    return picture


def drawn(data: Labelled, place: int, prediction: Any) -> Image.Image:
    """Truth on the left, prediction on the right: class names as text, masks and boxes in the colours of the legend."""
    image, truth = Image.fromarray(data.read(place).permute(1, 2, 0).numpy()), data.target(place)
    if isinstance(prediction, list):
        title = f"prediction, scores from {SHOWN}"
        pair = [("truth", _boxed(image, _true(data, truth))), (title, _boxed(image, _found(data, prediction)))]
    elif prediction.ndim == 1:
        words = told(data, place, prediction)
        pair = [(f"{title}: {word}", image) for title, word in zip(("truth", "prediction"), words, strict=True)]
    else:
        pair = [("truth", _coloured(image, truth)), ("prediction", _coloured(image, prediction))]
    panels = [(title, _fitted(picture)) for title, picture in pair]
    width, height = panels[0][1].size
    width = max(width, 200)
    above = legend(_shown(data, truth, prediction), 2 * width + GAP)
    top = above.height
    sheet = Image.new("RGB", (2 * width + GAP, top + LINE + height), "white")
    sheet.paste(above, (0, 0))
    for column, (title, picture) in enumerate(panels):
        cell = Image.new("RGB", (width, LINE), "white")
        ImageDraw.Draw(cell).text((2, 3), escaped(title), "black", ImageFont.load_default(14))
        sheet.paste(cell, (column * (width + GAP), top))
        sheet.paste(picture, (column * (width + GAP), top + LINE))
    return sheet


def _shown(data: Labelled, truth: Any, prediction: Any) -> list[tuple[str, tuple[int, ...]]]:
    """Names and colours of the classes in a picture, those with most pixels or boxes first."""
    if isinstance(prediction, list):
        kinds = [kind for _, kind, _ in (*_true(data, truth), *_found(data, prediction))]
        counts, first = Counter(kinds), 1  # boxes have no black
    elif prediction.ndim == 1:
        return []
    else:
        places, pixels = np.unique(np.concatenate([truth.ravel(), prediction.cpu().ravel()]), return_counts=True)
        counts, first = Counter(dict(zip(places.tolist(), pixels.tolist(), strict=True))), 0
    colours = palette(len(data.classes) + 2)
    return [
        (data.classes[kind], tuple(colours[kind + first].tolist()))
        for kind, _ in counts.most_common()
        if kind != IGNORE
    ]


def _fitted(picture: Image.Image) -> Image.Image:
    picture = picture.copy()
    picture.thumbnail((SIDE, SIDE))
    return picture


def _coloured(image: Image.Image, classes: Tensor) -> Image.Image:
    """Half the image, half its classes; what nobody labelled stays as it is."""
    places, pixels = classes.cpu().numpy().astype(np.int64), np.asarray(image)
    mixed = (pixels.astype(np.uint16) + palette(int(places.max(initial=0)) + 1)[places]) // 2
    return Image.fromarray(np.where((places == IGNORE)[..., None], pixels, mixed).astype(np.uint8))


Box = tuple[list[float], int, str]  # x1, y1, x2, y2; place of the class; words


def _true(data: Labelled, truth: Any) -> list[Box]:
    classes = truth.classes.tolist()
    return [(box, kind, data.classes[kind]) for box, kind in zip(truth.boxes.tolist(), classes, strict=True)]


def _found(data: Labelled, prediction: list[dict[str, Any]]) -> list[Box]:
    found = []
    for entry in prediction:
        if entry["score"] >= SHOWN:
            x, y, width, height = entry["bbox"]
            kind = data.category_ids.index(entry["category_id"])
            found.append(([x, y, x + width, y + height], kind, f"{data.classes[kind]} {entry['score']:.2f}"))
    return found


def _boxed(image: Image.Image, boxes: list[Box]) -> Image.Image:
    picture = image.copy()
    draw, colours = ImageDraw.Draw(picture), palette(1 + max((kind for _, kind, _ in boxes), default=0) + 1)
    for (x1, y1, x2, y2), kind, words in boxes:
        colour = tuple(colours[kind + 1].tolist())  # the first one is black
        draw.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=colour, width=2)
        draw.text((x1 + 3, y1 + 2), escaped(words), colour, ImageFont.load_default(12))
    return picture


def _png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()
