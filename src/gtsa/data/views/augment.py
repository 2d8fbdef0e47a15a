"""Colour, rotation and normalisation of crops, on a CPU crop by crop, on a GPU in batches.

Each operation equals that of the same name in torchvision.transforms.v2.functional on float images in [0, 1]. Both ways
agree to 1e-4 of the range of values.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from gtsa.core.types import Crops, Views
from gtsa.data.views import augment_batch, augment_crop, device_cut


def apply(
    views: Views, device: torch.device, mean: tuple[float, ...], std: tuple[float, ...], colour: bool = True
) -> Views:
    """uint8 views -> float views on ``device`` after colour recipe, rotation and normalisation.

    Crops that are still to be cut are cut there. Views that are floats have been through all this already (in a
    worker); they are only moved.

    Args:
        views: crops as cut, with recipes and rotations on the host.
        mean, std: per channel, of pixels in [0, 1].
        colour: False skips the colour recipe (for metrics and pictures).
    """
    views = views if views.uncut is None else device_cut.cut(views, device)
    return views.each(partial(_finish, device=device, mean=mean, std=std, colour=colour))


def _finish(crops: Crops, device: torch.device, mean: tuple[float, ...], std: tuple[float, ...], colour: bool) -> Crops:
    if not crops.pixels.is_floating_point():
        way = augment_crop.finish if device.type == "cpu" else partial(augment_batch.finish, device=device)
        crops = replace(crops, pixels=way(crops, mean, std, colour))
    return Crops(
        crops.pixels.to(device, non_blocking=True),
        crops.boxes.to(device, non_blocking=True),
        crops.rotations.to(device, non_blocking=True),
        crops.colours,
    )
