"""Patch tokens as colours, for pictures of feature maps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from gtsa.core.drawing import GAP, new_sheet, to_image, write
from gtsa.evaluation.loading import normalised
from gtsa.models.backbone import Encoder

SHIFTS = 2  # shifted grids per side of dense maps: a map has a vector for every half patch
LIGHTNESS, CHROMA = (0.30, 0.92), 0.14  # ranges of the colours in OKLab

# OKLab to linear sRGB (B. Ottosson, 2020)
_TO_LMS = torch.tensor(
    [[1, 0.3963377774, 0.2158037573], [1, -0.1055613458, -0.0638541728], [1, -0.0894841775, -1.2914855480]]
)
_TO_RGB = torch.tensor(
    [
        [4.0767416621, -3.3077115913, 0.2309699292],
        [-1.2684380046, 2.6097574011, -0.3413193965],
        [-0.0041960863, -0.7034186147, 1.7076147010],
    ]
)


@torch.no_grad()
def patch_maps(backbone: Encoder, images: Tensor, shifts: int = 1) -> Tensor:
    """Patch tokens [n, shifts h, shifts w, D] of images [n, 3, s, s] in [0, 1], h = w = s / patch.

    Args:
        shifts: the network sees every image ``shifts``² times, each time with its grid of patches moved by a further
            1 / ``shifts`` of a patch; images are mirrored at their borders for this. 1: the image as it is.
    """
    parameter = next(backbone.parameters())
    training = backbone.training
    backbone.eval()
    n, _, height, width = images.shape
    patch = backbone.patch_size
    maps = torch.empty(n, height // patch, shifts, width // patch, shifts, backbone.embed_dim)
    padded = F.pad(images, [patch // 2] * 4, mode="reflect") if shifts > 1 else images
    margin = patch // 2 if shifts > 1 else 0
    offsets = [margin + round(((k + 0.5) / shifts - 0.5) * patch) for k in range(shifts)]
    for row, top in enumerate(offsets):
        for column, left in enumerate(offsets):
            shifted = padded[..., top : top + height, left : left + width]
            pixels = normalised(shifted, backbone, parameter.device).to(parameter.dtype)
            maps[:, :, row, :, column] = backbone(pixels).patches.float().cpu()
    backbone.train(training)
    return maps.flatten(3, 4).flatten(1, 2)


def feature_colours(
    networks: Sequence[Tensor], images: Tensor, side: int, smooth: bool = True, common: bool = True
) -> list[Tensor]:
    """Patch maps [n, h, w, D] of each network as colours [n, side, side, 3] in [0, 1], on one scale for all networks.

    The directions of the tokens are centred for each network, and their principal components are those of all networks
    together. The first component is the lightness, the next two are the hue. Because the scale is common, a network
    whose patches differ less has duller colours. The sign of a component is arbitrary; here the first one is lighter
    where ``images`` are brighter. Not ``smooth``: every vector is a square. Not
    ``common``: every network has a scale of its own.
    """
    directions = [F.normalize(maps.double(), dim=-1) for maps in networks]
    centred = [maps - maps.mean((0, 1, 2)) for maps in directions]
    flat = torch.cat([maps.flatten(0, 2) for maps in centred])
    _, basis = torch.linalg.eigh(flat.T @ flat)  # ascending
    basis = basis[:, -3:].flip(1)
    brightness = (
        F.adaptive_avg_pool2d(images.mean(1, keepdim=True), (networks[-1].shape[1], networks[-1].shape[2]))
        .flatten()
        .double()
    )
    last = centred[-1].flatten(0, 2) @ basis
    basis = basis * torch.where((brightness - brightness.mean()) @ last < 0, -1.0, 1.0)
    components = [maps @ basis for maps in centred]
    scales = [scale_of(c.flatten(0, 2)) for c in components]
    if common:
        scales = [scale_of(torch.cat([c.flatten(0, 2) for c in components]))] * len(components)
    scaled = [(c / scale).float().permute(0, 3, 1, 2) for c, scale in zip(components, scales, strict=True)]
    mode = "bicubic" if smooth else "nearest"
    return [paint(F.interpolate(c, (side, side), mode=mode).permute(0, 2, 3, 1)) for c in scaled]


def scale_of(components: Tensor) -> Tensor:
    """The value [3] that nearly all absolute values of each component [n, 3] are below."""
    return components.abs().quantile(0.98, dim=0).clamp(min=1e-12)


def paint(components: Tensor) -> Tensor:
    """Three components [..., 3], mostly in [-1, 1], as colours [..., 3] in [0, 1]: lightness and two axes of hue."""
    light, a, b = components.tanh().unbind(-1)
    low, high = LIGHTNESS
    lab = torch.stack([low + (high - low) * (light + 1) / 2, CHROMA * a, CHROMA * b], dim=-1)
    linear = ((lab @ _TO_LMS.T) ** 3 @ _TO_RGB.T).clamp(0, 1)
    return torch.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear.clamp(min=1e-9) ** (1 / 2.4) - 0.055)


def strip(images: Tensor, start: Tensor, now: Tensor, step: int, size: int = 224) -> Image.Image:
    """Images [n, 3, s, s] on top, then their patch maps [n, h, w, D] as colours, at step 0 and at ``step``."""
    at_start, at_step = feature_colours([start, now], images, size)
    rows = [("image", resized(images, size)), ("step 0", at_start), (f"step {step}", at_step)]
    left = 80
    sheet = new_sheet(left + len(images) * (size + GAP), len(rows) * (size + GAP) + GAP)
    for r, (title, pictures) in enumerate(rows):
        write(sheet, (GAP, GAP + r * (size + GAP) + size // 2), title)
        for c, picture in enumerate(pictures):
            sheet.paste(to_image(picture), (left + c * (size + GAP), GAP + r * (size + GAP)))
    return sheet


def maps_strip(images: Tensor, maps: Tensor, size: int = 160) -> Image.Image:
    """Images [n, 3, s, s] on top, their patch maps [n, h, w, D] as colours below."""
    rows = [resized(images, size), *feature_colours([maps], images, size)]
    sheet = new_sheet(len(images) * (size + 4), 2 * (size + 4))
    for r, pictures in enumerate(rows):
        for c, picture in enumerate(pictures):
            sheet.paste(to_image(picture), (c * (size + 4), r * (size + 4)))
    return sheet


def centred_directions(maps: Tensor) -> Tensor:
    """Unit vectors of patch maps [n, h, w, D] after the mean direction over all of them is subtracted.

    All patches of a network share a large part of their direction, which hides how they differ.
    """
    directions = F.normalize(maps.float(), dim=-1)
    return F.normalize(directions - directions.mean((0, 1, 2)), dim=-1)


def resized(images: Tensor, side: int) -> Tensor:
    """Images [n, 3, s, s] in [0, 1] as pictures [n, side, side, 3] in [0, 1]."""
    return F.interpolate(images, (side, side), mode="bilinear", antialias=True).permute(0, 2, 3, 1).clamp(0, 1)
