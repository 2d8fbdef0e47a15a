"""Pictures of predictions: truth and prediction side by side, in the colours of a legend."""

from __future__ import annotations

from collections import Counter

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from gtsa.core.errors import escaped
from gtsa.data.labels import IGNORE, Boxes, Labelled
from gtsa.evaluation.context import DetectedObject, Prediction
from gtsa.evaluation.legend import legend

LIKELY = 0.5  # smallest probability of a predicted class of multilabel images
SHOWN = 0.3  # smallest score of a box that is drawn
SIDE, LINE, GAP = 640, 22, 8  # px of a picture: longest side of a panel, height of a line of text, space between
LabelledBox = tuple[list[float], int, str]  # x1, y1, x2, y2; class id; text


def describe(data: Labelled, index: int, scores: Tensor) -> tuple[str, str]:
    """Class names of the truth and of the prediction of an image, from class scores [C]."""
    truth, classes = data.target(index), data.classes
    if data.kind == "multilabel":
        names = ["; ".join(classes[int(i)] for i in chosen.nonzero()[:, 0]) for chosen in (truth, scores >= LIKELY)]
        return names[0], names[1]
    return classes[truth], classes[int(scores.argmax())]


def palette(count: int = 256) -> np.ndarray:
    """Colours of class ids as in PASCAL VOC, uint8 [count, 3]: the bits of an id are spread over the channels."""
    ids = np.arange(count)
    colours = np.zeros((count, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= ((ids >> (3 * bit + channel)) & 1).astype(np.uint8) << (7 - bit)
    return colours


def to_palette_image(classes: Tensor, count: int) -> Image.Image:
    """A map of class ids [H, W] as it is stored: 8 bits with a palette, or 16 bits for more than 256 classes."""
    array = classes.cpu().numpy()
    if count > 256:
        return Image.fromarray(array.astype(np.uint16))
    picture = Image.fromarray(array.astype(np.uint8))
    picture.putpalette(palette().tobytes())
    return picture


def draw_prediction(data: Labelled, index: int, prediction: Prediction) -> Image.Image:
    """Truth on the left, prediction on the right: class names as text, masks and boxes in the colours of the legend."""
    image, truth = Image.fromarray(data.read(index).permute(1, 2, 0).numpy()), data.target(index)
    entries: list[tuple[str, tuple[int, ...]]] = []
    if isinstance(prediction, list):
        boxes = _true_boxes(data, truth), _predicted_boxes(data, prediction)
        titles = "truth", f"prediction, scores from {SHOWN}"
        pair = [(title, _with_boxes(image, part)) for title, part in zip(titles, boxes, strict=True)]
        entries = _legend_entries(data, Counter(class_id for part in boxes for _, class_id, _ in part), 1)
    elif prediction.ndim == 1:
        names = describe(data, index, prediction)
        pair = [(f"{title}: {name}", image) for title, name in zip(("truth", "prediction"), names, strict=True)]
    else:
        pair = [("truth", _with_classes(image, truth)), ("prediction", _with_classes(image, prediction))]
        values, pixels = np.unique(np.concatenate([truth.ravel(), prediction.cpu().ravel()]), return_counts=True)
        entries = _legend_entries(data, Counter(dict(zip(values.tolist(), pixels.tolist(), strict=True))), 0)
    return _side_by_side(pair, entries)


def _side_by_side(pair: list[tuple[str, Image.Image]], entries: list[tuple[str, tuple[int, ...]]]) -> Image.Image:
    """Two pictures with their titles, below a legend."""
    panels = [(title, _shrunk(picture)) for title, picture in pair]
    width, height = panels[0][1].size
    width = max(width, 200)
    header = legend(entries, 2 * width + GAP)
    top = header.height
    sheet = Image.new("RGB", (2 * width + GAP, top + LINE + height), "white")
    sheet.paste(header, (0, 0))
    for column, (title, picture) in enumerate(panels):
        cell = Image.new("RGB", (width, LINE), "white")
        ImageDraw.Draw(cell).text((2, 3), escaped(title), "black", ImageFont.load_default(14))
        sheet.paste(cell, (column * (width + GAP), top))
        sheet.paste(picture, (column * (width + GAP), top + LINE))
    return sheet


def _legend_entries(data: Labelled, counts: Counter[int], first: int) -> list[tuple[str, tuple[int, ...]]]:
    """Names and colours of the classes in a picture, those with most pixels or boxes first.

    Args:
        first: index in the palette of the first class: 0 for masks, 1 for boxes, which are never black.
    """
    colours = palette(len(data.classes) + 2)
    return [
        (data.classes[class_id], tuple(colours[class_id + first].tolist()))
        for class_id, _ in counts.most_common()
        if class_id != IGNORE
    ]


def _shrunk(picture: Image.Image) -> Image.Image:
    picture = picture.copy()
    picture.thumbnail((SIDE, SIDE))
    return picture


def _with_classes(image: Image.Image, classes: Tensor) -> Image.Image:
    """The image blended with the colours of its classes, half and half; unlabelled pixels keep their colour."""
    ids, pixels = classes.cpu().numpy().astype(np.int64), np.asarray(image)
    blended = (pixels.astype(np.uint16) + palette(int(ids.max(initial=0)) + 1)[ids]) // 2
    return Image.fromarray(np.where((ids == IGNORE)[..., None], pixels, blended).astype(np.uint8))


def _true_boxes(data: Labelled, truth: Boxes) -> list[LabelledBox]:
    ids = truth.classes.tolist()
    return [(box, class_id, data.classes[class_id]) for box, class_id in zip(truth.boxes.tolist(), ids, strict=True)]


def _predicted_boxes(data: Labelled, prediction: list[DetectedObject]) -> list[LabelledBox]:
    boxes = []
    for entry in prediction:
        if entry["score"] >= SHOWN:
            x, y, width, height = entry["bbox"]
            class_id = data.category_ids.index(entry["category_id"])
            boxes.append(([x, y, x + width, y + height], class_id, f"{data.classes[class_id]} {entry['score']:.2f}"))
    return boxes


def _with_boxes(image: Image.Image, boxes: list[LabelledBox]) -> Image.Image:
    picture = image.copy()
    draw, colours = ImageDraw.Draw(picture), palette(1 + max((class_id for _, class_id, _ in boxes), default=0) + 1)
    for (x1, y1, x2, y2), class_id, text in boxes:
        colour = tuple(colours[class_id + 1].tolist())  # the first one is black
        draw.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=colour, width=2)
        draw.text((x1 + 3, y1 + 2), escaped(text), colour, ImageFont.load_default(12))
    return picture
