"""Evaluations of every pixel: from what a network makes of patches to classes of pixels, counted image by image.

Shapes: N images, C classes, h x w cells of a map, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from gtsa.core.errors import UserError
from gtsa.data.labels import IGNORE, Labelled
from gtsa.evaluation.evaluator import PerImage
from gtsa.evaluation.features import EvalContext, batches, normalised, read, resized
from gtsa.models.backbone import Encoder

Scorer = Callable[[Tensor], Tensor]  # normalised pixels [N, 3, H, W], whole patches -> scores [N, C, h, w]


class Scene(NamedTuple):
    """An image as the network is to see it, and its mask."""

    pixels: Tensor  # uint8 [3, h, w]
    truth: Tensor  # int64 [H, W] of class places and IGNORE, of the image's own size


class Scenes(Dataset[Scene]):
    """The images of ``data`` as squares of ``size`` px; 0: of their own size."""

    def __init__(self, data: Labelled, size: int) -> None:
        self.data, self.size = data, size

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Scene:
        pixels = read(self.data, index)
        return Scene(resized(pixels, self.size, self.size) if self.size else pixels, self.data.target(index))


def resized_mask(mask: Tensor, height: int, width: int) -> Tensor:
    """int64 [H, W] -> int64 [height, width]: every pixel takes the class at its centre."""
    return F.interpolate(mask[None, None].double(), (height, width), mode="nearest-exact")[0, 0].long()


@torch.no_grad()
def patches(backbone: Encoder, pixels: Tensor, lab: EvalContext) -> Tensor:
    """Patch tokens of the frozen backbone: normalised pixels [N, 3, H, W] -> [N, h, w, D] float32."""
    with lab.fabric.autocast():
        return backbone(pixels).patches.float()  # type: ignore[no-any-return]


def padded(pixels: Tensor, patch: int) -> Tensor:
    """Images [N, 3, H, W] with their last row and column repeated until there are whole patches."""
    return F.pad(pixels, (0, -pixels.shape[-1] % patch, 0, -pixels.shape[-2] % patch), mode="replicate")


def slid(score: Scorer, pixels: Tensor, window: int, stride: int) -> Tensor:
    """Scores of overlapping windows, averaged where they overlap: [N, C, h, w], as of the whole image.

    Args:
        pixels: [N, 3, H, W], whole patches.
        window, stride: px, whole patches. The last window of a row or column ends with the image.
    """
    sides = pixels.shape[-2:]
    height, width = (min(window, side) for side in sides)
    rows, columns = (
        sorted({*range(0, side - seen, stride), side - seen}) for side, seen in zip(sides, (height, width), strict=True)
    )
    total, count = torch.zeros(1), torch.zeros(1)
    for top, left in product(rows, columns):
        scores = score(pixels[..., top : top + height, left : left + width]).float()
        h, w = scores.shape[-2:]
        if not top and not left:
            total = scores.new_zeros(*scores.shape[:2], sides[0] * h // height, sides[1] * w // width)
            count = torch.zeros_like(total[:1, :1])
        y, x = top * h // height, left * w // width
        total[..., y : y + h, x : x + w] += scores
        count[..., y : y + h, x : x + w] += 1
    return total / count


def upsampled(scores: Tensor, seen: Sequence[int], size: Sequence[int], patch: int) -> Tensor:
    """Scores [C, h, w] of an image that the network saw at ``seen`` px, padded to whole patches -> [C, *size]."""
    full = [-(-side // patch) * patch * wanted // side for side, wanted in zip(seen, size, strict=True)]
    scores = F.interpolate(scores[None].float(), full, mode="bilinear", align_corners=False)[0]
    return scores[:, : size[0], : size[1]]


@torch.no_grad()
def judged(
    score: Scorer, backbone: Encoder, data: Labelled, lab: EvalContext, size: int, window: int = 0, stride: int = 0
) -> PerImage:
    """Pixel counts of every image, each pixel taken for the class of its highest score.

    Args:
        size: side of the square that images are brought to, whole patches; 0: their own size, padded.
        window, stride: of sliding inference, px, whole patches; stride 0: whole images.
    """
    found, index = [], 0
    for scenes in _alike(data, lab, size):
        seen = normalised(torch.stack([scene.pixels for scene in scenes]), backbone, lab.device)
        whole = padded(seen, backbone.patch_size)
        scores = slid(score, whole, window, stride) if stride else score(whole)
        for scene, each in zip(scenes, scores, strict=True):
            classes = upsampled(each, seen.shape[-2:], scene.truth.shape, backbone.patch_size).argmax(0).cpu()
            found.append(counts(classes, scene.truth, len(data.classes)))
            lab.on_prediction(index, as_map(classes, len(data.classes)))
            index += 1
    return stacked(found)


def _alike(data: Labelled, lab: EvalContext, size: int) -> Iterator[list[Scene]]:
    """The scenes in order, those together that follow one another and have one size."""
    for batch in batches(Scenes(data, size), lab, list):
        for _, group in groupby(batch, key=lambda scene: scene.pixels.shape):
            yield list(group)


def as_map(classes: Tensor, count: int) -> Tensor:
    """Class places [H, W] as a prediction is kept: uint8, or int32 where there are more than 256 classes."""
    return classes.to(torch.uint8 if count <= 256 else torch.int32)


def counts(classes: Tensor, truth: Tensor, count: int) -> dict[str, Tensor]:
    """Pixels of each of ``count`` classes that are rightly taken for it, taken for it, and of it: int64 [C] each.

    Pixels that nobody labelled count for nothing.
    """
    known = truth != IGNORE
    classes, truth = classes[known], truth[known]
    kinds = {"hit": truth[classes == truth], "predicted": classes, "true": truth}
    return {name: torch.bincount(values, minlength=count) for name, values in kinds.items()}


def stacked(found: Sequence[dict[str, Tensor]]) -> PerImage:
    """Counts of several images as per_image: {"hit", "predicted", "true": [images, C]}."""
    return {name: torch.stack([each[name] for each in found]) for name in found[0]}


def metrics(per_image: PerImage) -> dict[str, float]:
    """mIoU, mAcc and aAcc in per cent, of pixel counts [images, C], or [images, repeats, C] and then their mean.

    Pixels of all images are put together first. The mean IoU is over classes that occur in truth or prediction, the
    mean accuracy over those that occur in the truth (as MMSegmentation and the papers that use it count).

    Raises:
        UserError: nobody labelled a pixel of these images (3).
    """
    hit, predicted, true = (per_image[name].sum(0).double() for name in ("hit", "predicted", "true"))
    if not true.any():
        raise UserError("no pixel of the masks to judge by is labelled: all of them are ignored; see --ignore", 3)
    shares = {"mIoU": hit / (predicted + true - hit), "mAcc": hit / true, "aAcc": hit.sum(-1) / true.sum(-1)}
    return {name: 100 * float(share.nanmean()) for name, share in shares.items()}


def per_class(per_image: PerImage) -> dict[str, list[float]]:
    """Intersection over union of each class in per cent, of pixel counts as in ``metrics``."""
    hit, predicted, true = (per_image[name].sum(0).double() for name in ("hit", "predicted", "true"))
    share = hit / (predicted + true - hit)
    return {"IoU": (100 * (share.nanmean(0) if share.ndim > 1 else share)).tolist()}
