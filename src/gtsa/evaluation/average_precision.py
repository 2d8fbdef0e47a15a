"""COCO's dictionaries of annotations and detections, and its average precision."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval.core import mask as rle
from torch import Tensor

from gtsa.evaluation.context import RunLengths

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")  # in the order of COCO's summary


class Annotation(TypedDict):
    """An object as COCO's annotation, px of the image file."""

    category_id: int
    bbox: list[float]  # x, y, width, height
    area: float
    iscrowd: int
    segmentation: NotRequired[RunLengths]


def to_xywh(box: Tensor) -> list[float]:
    """x1, y1, x2, y2 -> x, y, width, height, as COCO writes boxes."""
    x1, y1, x2, y2 = box.double().tolist()
    return [x1, y1, x2 - x1, y2 - y1]


def pasted(mask: Tensor, box: Tensor, size: tuple[int, int]) -> Tensor:
    """Probabilities [m, m] in a box -> bool [H, W]: pixels whose centres have more than a half, bilinearly."""
    whole = torch.zeros(size, dtype=torch.bool)
    x1, y1, x2, y2 = box.tolist()
    top, left = max(0, math.floor(y1)), max(0, math.floor(x1))
    bottom, right = min(size[0], math.ceil(y2)), min(size[1], math.ceil(x2))
    if bottom > top and right > left:
        y = (torch.arange(top, bottom) + 0.5 - y1) / max(y2 - y1, 1e-6) * 2 - 1
        x = (torch.arange(left, right) + 0.5 - x1) / max(x2 - x1, 1e-6) * 2 - 1
        grid = torch.stack([x.expand(len(y), -1), y[:, None].expand(-1, len(x))], dim=-1)
        inside = F.grid_sample(mask[None, None], grid[None], align_corners=False, padding_mode="border")[0, 0]
        whole[top:bottom, left:right] = inside > 0.5
    return whole


def to_run_lengths(mask: Tensor) -> RunLengths:
    """bool [H, W] -> COCO's run lengths, as in JSON files."""
    runs = rle.encode(np.asfortranarray(mask.byte().numpy()))
    return {"size": list(mask.shape), "counts": runs["counts"].decode()}


def average_precision(
    truth: Sequence[Sequence[Mapping[str, Any]]], detections: Sequence[Sequence[Mapping[str, Any]]], kind: str
) -> dict[str, float]:
    """COCO's AP in per cent, over ten IoU from 0.5 to 0.95, with at most a hundred detections per image.

    A metric of a kind of objects that does not occur (large ones, say) is left out.

    Args:
        truth, detections: annotations and result dictionaries of each image; an image's index here is its id, so that
            an image may occur more than once.
        kind: ``bbox`` or ``segm``.
    """
    field = {"bbox": "bbox", "segm": "segmentation"}[kind]
    if not any(field in entry for image in truth for entry in image):
        return {}
    evaluation = COCOeval_faster(_coco(truth, kind), _coco(detections, kind), kind)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return {name: 100 * float(value) for name, value in zip(METRICS, evaluation.stats, strict=False) if value >= 0}


def _coco(images: Sequence[Sequence[Mapping[str, Any]]], kind: str) -> COCO:
    field = "segmentation" if kind == "segm" else "bbox"
    numbered = [(number, entry) for number, entries in enumerate(images, 1) for entry in entries]
    annotations = [
        {
            "id": annotation_id,  # from 1 on: 0 would count as no match
            "image_id": number,
            "category_id": entry["category_id"],
            field: entry[field],
            "iscrowd": entry.get("iscrowd", 0),
            "area": entry["area"] if "area" in entry else _area(entry[field]),
            "score": entry.get("score", 1.0),
        }
        for annotation_id, (number, entry) in enumerate(numbered, 1)
    ]
    sizes = {number: entry[field]["size"] if kind == "segm" else (0, 0) for number, entry in numbered}
    return COCO(
        {
            "images": [
                {"id": n, "height": sizes.get(n, (0, 0))[0], "width": sizes.get(n, (0, 0))[1]}
                for n in range(1, len(images) + 1)
            ],
            "annotations": annotations,
            "categories": [{"id": c, "name": str(c)} for c in sorted({a["category_id"] for a in annotations})],
        }
    )


def _area(shape: list[float] | RunLengths) -> float:
    """Area of a detection's box or mask. COCO assigns unmatched detections to a size by it."""
    return float(shape[2] * shape[3]) if isinstance(shape, list) else float(rle.area(shape))
