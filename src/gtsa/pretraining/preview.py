"""gtsa preview: a picture of the views of an image, as the model sees them."""

from __future__ import annotations

from pathlib import Path
from typing import Unpack

import torch

from gtsa.core.errors import UserError, escaped
from gtsa.core.seeds import Stream, generator
from gtsa.core.settings import Plan, is_auto, validated, with_keywords
from gtsa.core.terminal import say
from gtsa.data.images.pixels import BadImage, Range
from gtsa.data.scan import open_images
from gtsa.data.views import augment
from gtsa.models.backbone import IMAGENET
from gtsa.models.transform import FULL_RANGE
from gtsa.models.weight_sources import read_weights
from gtsa.models.weights import facts_of
from gtsa.pretraining import plan, preview_picture
from gtsa.pretraining.arguments import RunArguments
from gtsa.pretraining.settings import Pretrain


@with_keywords(Pretrain, skip=("data",))
def preview(
    data: object, out: str = "preview.png", image: int = 0, epoch: int = 0, **settings: Unpack[RunArguments]
) -> Path:
    """Draws an image with its crops, the crops as the student sees them, and pooled targets beside the student's cells.

    The views are those that pretraining with the same settings draws.

    Args:
        data: folder, list file, tar shards, or in Python any torch Dataset of images.
        out: PNG file to write.
        image: number of the image, in the order of the files.
        epoch: views differ from epoch to epoch.
        settings: as for ``gtsa pretrain``: model, seed, views, range16, data_root, include, exclude, follow_links.

    Raises:
        UserError: there is no such image, or it cannot be read (3).
    """
    resolved = Plan(validated(Pretrain, settings), {})
    plan.resolve_initial(resolved, *_facts_of_init(resolved.settings))
    plan.resolve_sizes(resolved)
    multicrop = resolved.settings.multicrop
    if epoch < 0:
        raise UserError(f"--epoch {epoch}: epochs are numbered from 0")
    source = open_images(data, resolved.settings.selection)
    if not 0 <= image < len(source):
        raise UserError(f"--image {image}: {data} has {len(source)} images, numbered from 0", 3)
    try:
        pixels = source.read(image, multicrop.detail)
    except BadImage as reason:
        raise UserError(f"{escaped(source.name(image))}: {reason}; choose another image with --image", 3) from None
    views = multicrop(pixels, generator(resolved.settings.seed, Stream.VIEWS, 0, image, epoch))
    finished = augment.apply(views, torch.device("cpu"), *IMAGENET)
    path = Path(out)
    try:
        preview_picture.preview(pixels, views, finished, *IMAGENET).save(path, format="PNG")
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror or error}", 6) from None
    say(f"{escaped(source.name(image))} -> {path}")
    return path


def _facts_of_init(settings: Pretrain) -> tuple[str | None, Range, int]:
    """Model, range of 16-bit images and patch size of the initial weights."""
    if not settings.init:
        return None, FULL_RANGE, 0
    return facts_of(read_weights(settings.init), None if is_auto(settings.model) else settings.model)
