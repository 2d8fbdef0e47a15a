"""gtsa preview: the views as the model sees them, on one picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gtsa.core.errors import UserError, escaped
from gtsa.core.seeds import Stream, generator
from gtsa.core.settings import Plan, validated
from gtsa.core.terminal import say
from gtsa.data import augment
from gtsa.data.multicrop import MultiCrop
from gtsa.data.pixels import BadImage
from gtsa.data.run_images import selection
from gtsa.data.sources import open_source
from gtsa.models import weights
from gtsa.models.backbone import IMAGENET
from gtsa.pretraining import plan, preview_picture
from gtsa.pretraining.settings import Pretrain


def preview(data: Any, out: str = "preview.png", image: int = 0, epoch: int = 0, **settings: Any) -> Path:
    """Draws one image with its crops, the crops as the student sees them, and pooled targets beside student's cells.

    The picture shows the very views that pretraining with the same settings would draw.

    Args:
        data: folder, list file, or in Python any torch Dataset of images.
        out: PNG file to write.
        image: number of the image, in the order of the files.
        epoch: views differ from epoch to epoch.
        settings: as for ``gtsa pretrain``: model, seed, views, range16, data_root, include, exclude, follow_links.

    Raises:
        UserError: there is no such image, or it cannot be read (3).
    """
    asked = validated(Pretrain, settings)
    ready = Plan(asked, {})
    plan.start(ready, weights.described(weights.find(asked.init))[0] if asked.init and asked.model == "auto" else None)
    plan.sizes(ready)
    multicrop = MultiCrop(**ready.settings.views.model_dump())
    source = open_source(data, **selection(asked))
    if epoch < 0:
        raise UserError(f"--epoch {epoch}: epochs are numbered from 0")
    if not len(source):
        raise UserError(f"{data}: no images; give a folder with some", 3)
    if not 0 <= image < len(source):
        raise UserError(f"--image {image}: {data} has {len(source)} images, numbered from 0", 3)
    try:
        pixels = source.read(image, multicrop.detail)
    except BadImage as reason:
        raise UserError(f"{escaped(source.name(image))}: {reason}; choose another with --image", 3) from None
    views = multicrop(pixels, generator(asked.seed, Stream.VIEWS, 0, image, epoch))
    finished = augment.apply(views, torch.device("cpu"), *IMAGENET)
    place = Path(out)
    try:
        preview_picture.preview(pixels, views, finished, *IMAGENET).save(place, format="PNG")
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror or error}", 6) from None
    say(f"{escaped(source.name(image))} -> {place}")
    return place
