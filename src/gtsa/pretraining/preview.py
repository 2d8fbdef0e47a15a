"""gtsa preview: a picture of the views of an image, as the model sees them."""

from __future__ import annotations

from pathlib import Path
from typing import Unpack

import torch

from gtsa.core.errors import UserError, escaped
from gtsa.core.seeds import Stream, generator
from gtsa.core.settings import Plan, validated, with_keywords
from gtsa.core.terminal import say
from gtsa.data import augment
from gtsa.data.pixels import BadImage
from gtsa.data.sources import open_source
from gtsa.models.backbone import IMAGENET
from gtsa.models.weight_sources import read_weights
from gtsa.models.weights import model_of
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
        data: folder, list file, or in Python any torch Dataset of images.
        out: PNG file to write.
        image: number of the image, in the order of the files.
        epoch: views differ from epoch to epoch.
        settings: as for ``gtsa pretrain``: model, seed, views, range16, data_root, include, exclude, follow_links.

    Raises:
        UserError: there is no such image, or it cannot be read (3).
    """
    resolved = Plan(validated(Pretrain, settings), {})
    plan.resolve_initial(resolved, _model_of_init(resolved.settings))
    plan.resolve_sizes(resolved)
    multicrop = resolved.settings.multicrop
    source = open_source(data, resolved.settings.selection)
    if epoch < 0:
        raise UserError(f"--epoch {epoch}: epochs are numbered from 0")
    if not len(source):
        raise UserError(f"{data}: no images; give a folder with some", 3)
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


def _model_of_init(settings: Pretrain) -> str | None:
    """The model of the initial weights, if it decides the patch size."""
    if not settings.init or settings.model != "auto":
        return None
    return model_of(read_weights(settings.init))[0]
