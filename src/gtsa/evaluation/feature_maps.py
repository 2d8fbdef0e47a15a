"""Patch tokens as colours, for pictures of feature maps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from gtsa.core.drawing import GAP, new_sheet, to_image, write
from gtsa.evaluation.loading import normalised
from gtsa.models.backbone import Encoder


@torch.no_grad()
def patch_maps(backbone: Encoder, images: Tensor) -> Tensor:
    """Patch tokens [n, h, w, D] of images [n, 3, s, s] in [0, 1]."""
    parameter = next(backbone.parameters())
    training = backbone.training
    backbone.eval()
    pixels = normalised(images, backbone, parameter.device).to(parameter.dtype)
    maps: Tensor = backbone(pixels).patches.float().cpu()
    backbone.train(training)
    return maps


def feature_colours(maps: Tensor, images: Tensor) -> Tensor:
    """The first three principal components of patch maps [n, h, w, D] as colours [n, h, w, 3] in [0, 1].

    The sign of a component is arbitrary. Here components are larger in brighter patches of ``images``.
    """
    flat = maps.flatten(0, 2).double()
    flat = flat - flat.mean(0)
    _, _, directions = torch.linalg.svd(flat, full_matrices=False)
    components = flat @ directions[:3].T
    brightness = F.adaptive_avg_pool2d(images.mean(1, keepdim=True), (maps.shape[1], maps.shape[2])).flatten().double()
    components = components * torch.where((brightness - brightness.mean()) @ components < 0, -1.0, 1.0)
    low, high = components.quantile(0.02, dim=0), components.quantile(0.98, dim=0)
    colours: Tensor = ((components - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    return colours.reshape(*maps.shape[:3], 3).float()


def strip(images: Tensor, start: Tensor, now: Tensor, step: int, size: int = 192) -> Image.Image:
    """Images [n, 3, s, s] on top, then their patch maps [n, h, w, D] as colours, at step 0 and at ``step``."""
    rows = [
        ("image", images.permute(0, 2, 3, 1), Image.Resampling.BILINEAR),
        ("step 0", feature_colours(start, images), Image.Resampling.NEAREST),
        (f"step {step}", feature_colours(now, images), Image.Resampling.NEAREST),
    ]
    left = 80
    sheet = new_sheet(left + len(images) * (size + GAP), len(rows) * (size + GAP) + GAP)
    for r, (title, pictures, resample) in enumerate(rows):
        write(sheet, (GAP, GAP + r * (size + GAP) + size // 2), title)
        for c, picture in enumerate(pictures):
            tile = to_image(picture).resize((size, size), resample)
            sheet.paste(tile, (left + c * (size + GAP), GAP + r * (size + GAP)))
    return sheet


def maps_strip(images: Tensor, maps: Tensor, size: int = 128) -> Image.Image:
    """Images [n, 3, s, s] on top, their patch maps [n, h, w, D] as colours below."""
    rows = [
        (images.permute(0, 2, 3, 1), Image.Resampling.BILINEAR),
        (feature_colours(maps, images), Image.Resampling.NEAREST),
    ]
    sheet = new_sheet(len(images) * (size + 4), 2 * (size + 4))
    for r, (pictures, resample) in enumerate(rows):
        for c, picture in enumerate(pictures):
            sheet.paste(to_image(picture).resize((size, size), resample), (c * (size + 4), r * (size + 4)))
    return sheet
