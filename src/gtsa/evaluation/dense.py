"""Evaluation of pixels: from scores of patches to classes of pixels, counted image by image.

Shapes: N images, C classes, h x w cells of a map, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, product
from typing import Generic, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from gtsa.core.errors import UserError
from gtsa.data.labels import IGNORE, Labelled
from gtsa.evaluation.context import EvalContext
from gtsa.evaluation.evaluator import PerImage
from gtsa.evaluation.loading import batches, normalised, read, resized
from gtsa.models.backbone import Encoder

Scorer = Callable[[Tensor], Tensor]  # normalised pixels [N, 3, H, W], whole patches -> scores [N, C, h, w]
Truth = TypeVar("Truth")
COUNTS = ("hit", "predicted", "true", "reported")  # of per_image; the last one if some classes are left out of means


class Scene(NamedTuple, Generic[Truth]):
    """An image at the size that the network gets, and its labels: a mask, or boxes."""

    pixels: Tensor  # uint8 [3, h, w]
    truth: Truth  # a mask: int64 [H, W] of class ids and IGNORE, of the image file's size


class Scenes(Dataset[Scene[Truth]], Generic[Truth]):
    """The images of ``data`` as squares of ``size`` px; 0: of their own size."""

    def __init__(self, data: Labelled, size: int) -> None:
        self.data, self.size = data, size

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Scene[Truth]:
        pixels = read(self.data, index)
        return Scene(resized(pixels, self.size, self.size) if self.size else pixels, self.data.target(index))


def normalised_scenes(scenes: Sequence[Scene[Truth]], backbone: Encoder, context: EvalContext) -> Tensor:
    """Pixels of scenes of one size as a normalised batch, on the device."""
    return normalised(torch.stack([scene.pixels for scene in scenes]), backbone, context.device)


def scenes_by_size(data: Labelled, context: EvalContext, size: int) -> Iterator[list[Scene[Tensor]]]:
    """The scenes in order, in groups of consecutive scenes of equal size."""
    for batch in batches(Scenes[Tensor](data, size), context, list):
        for _, group in groupby(batch, key=lambda scene: scene.pixels.shape):
            yield list(group)


def resized_mask(mask: Tensor, height: int, width: int) -> Tensor:
    """int64 [H, W] -> int64 [height, width]: every pixel takes the class at its centre."""
    return F.interpolate(mask[None, None].double(), (height, width), mode="nearest-exact")[0, 0].long()


@torch.no_grad()
def patch_tokens(backbone: Encoder, pixels: Tensor, context: EvalContext) -> Tensor:
    """Patch tokens of the frozen backbone: normalised pixels [N, 3, H, W] -> [N, h, w, D] float32.

    With a cache of the context the network sees no image twice.
    """

    def compute(images: Tensor) -> Tensor:
        with context.fabric.autocast():
            return backbone(images).patches.float()  # type: ignore[no-any-return]

    return context.cache(compute, pixels) if context.cache else compute(pixels)


def padded(pixels: Tensor, patch: int) -> Tensor:
    """Images [N, 3, H, W] padded to whole patches by repeating their last row and column."""
    return F.pad(pixels, (0, -pixels.shape[-1] % patch, 0, -pixels.shape[-2] % patch), mode="replicate")


def score_windows(score: Scorer, pixels: Tensor, window: int, stride: int) -> Tensor:
    """Sliding inference: scores of overlapping windows, averaged where they overlap: [N, C, h, w] of the whole image.

    Args:
        pixels: [N, 3, H, W], whole patches.
        window, stride: px, whole patches. The last window of a row or column ends at the image's border.
    """
    sides = pixels.shape[-2:]
    height, width = (min(window, side) for side in sides)
    rows, columns = (
        sorted({*range(0, side - covered, stride), side - covered})
        for side, covered in zip(sides, (height, width), strict=True)
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


def upsampled(scores: Tensor, input_size: Sequence[int], size: Sequence[int], patch: int) -> Tensor:
    """Scores [C, h, w] of an image of ``input_size`` px, padded to whole patches -> [C, *size]."""
    full = [-(-side // patch) * patch * target // side for side, target in zip(input_size, size, strict=True)]
    scores = F.interpolate(scores[None].float(), full, mode="bilinear", align_corners=False)[0]
    return scores[:, : size[0], : size[1]]


@torch.no_grad()
def classify_pixels(
    score: Scorer, backbone: Encoder, data: Labelled, context: EvalContext, size: int, window: int = 0, stride: int = 0
) -> PerImage:
    """Pixel counts of every image; each pixel takes the class of its highest score.

    Args:
        size: side of the square that images are resized to, whole patches; 0: their own size, padded.
        window, stride: of sliding inference, px, whole patches; stride 0: whole images.
    """
    counts, index = [], 0
    for scenes in scenes_by_size(data, context, size):
        pixels = normalised_scenes(scenes, backbone, context)
        whole = padded(pixels, backbone.patch_size)
        batch_scores = score_windows(score, whole, window, stride) if stride else score(whole)
        for scene, scores in zip(scenes, batch_scores, strict=True):
            classes = upsampled(scores, pixels.shape[-2:], scene.truth.shape, backbone.patch_size).argmax(0).cpu()
            counts.append(count_pixels(classes, scene.truth, len(data.classes)))
            context.on_prediction(index, as_map(classes, len(data.classes)))
            index += 1
    return stack_counts(counts, data)


def as_map(classes: Tensor, count: int) -> Tensor:
    """Class ids [H, W] as a prediction is stored: uint8, or int32 for more than 256 classes."""
    return classes.to(torch.uint8 if count <= 256 else torch.int32)


def count_pixels(classes: Tensor, truth: Tensor, count: int) -> dict[str, Tensor]:
    """Labelled pixels of each of ``count`` classes: correctly predicted, predicted, and true, int64 [C] each."""
    known = truth != IGNORE
    classes, truth = classes[known], truth[known]
    ids = {"hit": truth[classes == truth], "predicted": classes, "true": truth}
    return {name: torch.bincount(values, minlength=count) for name, values in ids.items()}


def stack_counts(counts: Sequence[dict[str, Tensor]], data: Labelled | None = None) -> PerImage:
    """Counts of all images as per_image: {"hit", "predicted", "true": [images, C] or [images, repeats, C]}.

    If the labels of ``data`` name classes to report, "reported" says which they are, bool of the same shape.
    """
    stacked = {name: torch.stack([image[name] for image in counts]) for name in counts[0]}
    if data is not None and data.report_classes:
        reported = torch.tensor([name in data.report_classes for name in data.classes])
        stacked["reported"] = reported.expand_as(stacked["true"])
    return stacked


def stack_repeats(repeats: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Counts [C] or [images, C] of several predictions: [repeats, C] or [images, repeats, C]."""
    return {name: torch.stack([each[name] for each in repeats], dim=-2) for name in repeats[0]}


def metrics(per_image: PerImage) -> dict[str, float]:
    """mIoU, mAcc and aAcc in per cent, from pixel counts [images, C], or from [images, repeats, C] and then their mean.

    The pixels of all images are summed first. The mean IoU is over classes that occur in truth or prediction, the mean
    accuracy over those that occur in the truth (as in MMSegmentation and the papers that use it). Both are over the
    classes to report, if the labels name some.

    Raises:
        UserError: no pixel of these images is labelled (3).
    """
    hit, predicted, true = (per_image[name].sum(0).double() for name in ("hit", "predicted", "true"))
    if not true.any():
        raise UserError("no pixel of the evaluation masks is labelled: all of them are ignored; see --ignore", 3)
    of_classes = {"mIoU": hit / (predicted + true - hit), "mAcc": hit / true}
    if "reported" in per_image:
        of_classes = {name: share.where(per_image["reported"][0], torch.nan) for name, share in of_classes.items()}
    shares = {**of_classes, "aAcc": hit.sum(-1) / true.sum(-1)}
    return {name: 100 * float(share.nanmean()) for name, share in shares.items()}


def per_class(per_image: PerImage) -> dict[str, list[float]]:
    """Intersection over union of each class in per cent, from pixel counts as in ``metrics``."""
    hit, predicted, true = (per_image[name].sum(0).double() for name in ("hit", "predicted", "true"))
    share = hit / (predicted + true - hit)
    return {"IoU": (100 * (share.nanmean(0) if share.ndim > 1 else share)).tolist()}
