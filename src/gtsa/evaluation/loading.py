"""Images on their way to a network: reading, resizing, batches, normalisation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from gtsa.core.errors import UserError, escaped, from_worker
from gtsa.data.batches.loader import StepSampler
from gtsa.data.images.pixels import BadImage
from gtsa.data.labels import Labelled
from gtsa.evaluation.context import EvalContext
from gtsa.models.backbone import Encoder

Item = TypeVar("Item")
Batch = TypeVar("Batch")


def read(data: Labelled, index: int) -> Tensor:
    """Image ``index`` as uint8 [3, H, W]. Raises UserError (3), with the image's name, if it cannot be read."""
    try:
        return data.read(index)
    except BadImage as reason:
        where = "folder" if data.kind == "none" else "labels"
        raise UserError(
            f"{escaped(data.name(index))}: {reason}; an evaluation needs all of its images: repair this one, or remove "
            f"it from the {where}",
            3,
        ) from None


def resized(pixels: Tensor, height: int, width: int) -> Tensor:
    """uint8 [3, H, W] -> uint8 [3, height, width], bicubic with antialiasing."""
    if pixels.shape[-2:] == (height, width):
        return pixels
    return F.interpolate(pixels[None], (height, width), mode="bicubic", antialias=True)[0]


def central_crop(pixels: Tensor, resize: int, crop: int) -> Tensor:
    """The usual view for classification: short side resized to ``resize``, then the central ``crop`` px square."""
    height, width = pixels.shape[-2:]
    scale = resize / min(height, width)
    pixels = resized(pixels, max(resize, round(height * scale)), max(resize, round(width * scale)))
    top, left = ((side - crop) // 2 for side in pixels.shape[-2:])
    return pixels[:, top : top + crop, left : left + crop]


def normalised(pixels: Tensor, backbone: Encoder, device: torch.device) -> Tensor:
    """uint8 pixels, or floats in [0, 1], [..., 3, H, W] -> floats as the backbone was trained on, on ``device``."""
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in backbone.normalisation)
    pixels = pixels.to(device, non_blocking=True)
    if pixels.dtype == torch.uint8:
        pixels = pixels.float() / 255
    return (pixels - mean) / std


def batches(dataset: Dataset[Item], context: EvalContext, collate: Callable[[list[Item]], Batch]) -> Iterator[Batch]:
    """All items of a dataset in order, in batches for a frozen backbone.

    Raises:
        UserError: an image cannot be read; the message has its name (3).
    """
    try:
        yield from _loader(dataset, context, collate, batch_size=context.batch_size)
    except UserError as error:
        raise from_worker(error) from None


def batches_of(
    dataset: Dataset[Item], draws: Iterable[Sequence[int]], context: EvalContext, collate: Callable[[list[Item]], Batch]
) -> Iterable[Batch]:
    """The items of each draw in a batch, in order, the same for any number of workers."""
    return _loader(dataset, context, collate, batch_sampler=draws)


def training_batches(
    dataset: Dataset[Item], draws: StepSampler, context: EvalContext, collate: Callable[[list[Item]], Batch]
) -> Iterable[Batch]:
    """The batches of ``draws`` in order, the same for any number of workers. The training loop unwraps their errors."""
    return _loader(dataset, context, collate, batch_sampler=draws)


def _loader(
    dataset: Dataset[Item],
    context: EvalContext,
    collate: Callable[[list[Item]], Batch],
    batch_size: int = 1,
    batch_sampler: Any = None,
) -> Iterable[Batch]:
    """The only DataLoader of evaluations."""
    return DataLoader(
        dataset,
        batch_size=batch_size,
        batch_sampler=batch_sampler,
        num_workers=context.workers,
        collate_fn=collate,
        pin_memory=context.device.type == "cuda",
        generator=torch.Generator().manual_seed(0),  # iter() would draw from the global one
        timeout=600 if context.workers else 0,
    )
