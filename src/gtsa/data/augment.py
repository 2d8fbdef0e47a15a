"""Colour, rotation and normalisation of a batch of crops, on the training device.

Recipes are read on the host. So an operation runs only on the crops that need it, and the device never waits. Each
operation equals that of the same name in torchvision.transforms.v2.functional on float images in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations

import torch
import torch.nn.functional as F
from torch import Tensor

from gtsa.core.types import Colour, Crops, Views

ORDERS = torch.tensor(list(permutations(range(4))))  # [24, 4] of Colour.BRIGHTNESS ... Colour.HUE
RADIUS = 6  # of the blur kernel, px: three standard deviations at the largest published sigma


def apply(
    views: Views, device: torch.device, mean: tuple[float, ...], std: tuple[float, ...], colour: bool = True
) -> Views:
    """uint8 views from the workers -> float views on ``device`` after colour recipe, rotation and normalisation.

    Args:
        views: crops as cut, with recipes and rotations on the host.
        mean, std: per channel, of pixels in [0, 1].
        colour: False skips the colour recipe (for metrics and pictures).
    """
    return views.each(lambda crops: _finish(crops, device, mean, std, colour))


def _finish(crops: Crops, device: torch.device, mean: tuple[float, ...], std: tuple[float, ...], colour: bool) -> Crops:
    pixels = crops.pixels.to(device, non_blocking=True).flatten(0, 1).float() / 255
    if colour:
        pixels = recolour(pixels, crops.colours.flatten(0, 1))
    rotations = crops.rotations.flatten()
    for k in (1, 2, 3):
        chosen = (rotations == k).nonzero()[:, 0].to(device)
        pixels[chosen] = torch.rot90(pixels[chosen], k, (-2, -1))
    centre, scale = (torch.tensor(values, device=device)[:, None, None] for values in (mean, std))
    pixels = (pixels - centre) / scale
    return Crops(
        pixels.reshape(crops.pixels.shape),
        crops.boxes.to(device, non_blocking=True),
        crops.rotations.to(device, non_blocking=True),
        crops.colours,
    )


def recolour(images: Tensor, recipes: Tensor) -> Tensor:
    """Colour jitter in each crop's own random order, then greyscale, then blur, then solarisation.

    Args:
        images: [N, 3, S, S] in [0, 1], changed in place.
        recipes: [N, len(Colour)] on the host.
    """
    order = recipes[:, Colour.ORDER].long()
    jittered = order >= 0
    for position in range(4):
        next_operation = ORDERS[order.clamp(min=0), position]
        for column, operation in _JITTER.items():
            _on(images, jittered & (next_operation == column), operation, recipes[:, column])
    _on(images, recipes[:, Colour.GRAYSCALE] > 0, lambda x, _: grey(x).expand_as(x), recipes[:, Colour.GRAYSCALE])
    _on(images, recipes[:, Colour.SIGMA] > 0, blurred, recipes[:, Colour.SIGMA])
    _on(images, recipes[:, Colour.SOLARIZE] > 0, lambda x, _: solarised(x), recipes[:, Colour.SOLARIZE])
    return images


def _on(images: Tensor, mask: Tensor, operation: Callable[[Tensor, Tensor], Tensor], amounts: Tensor) -> None:
    """Applies an operation to the images in ``mask``, in place."""
    if mask.any():
        chosen = mask.nonzero()[:, 0].to(images.device)
        images[chosen] = operation(images[chosen], amounts[mask].to(images.device)[:, None, None, None])


def grey(images: Tensor) -> Tensor:
    """Luma of [N, 3, S, S] -> [N, 1, S, S] (ITU-R BT.601)."""
    weights = torch.tensor([0.2989, 0.587, 0.114], device=images.device)[:, None, None]
    return (images * weights).sum(1, keepdim=True)


def brightened(images: Tensor, factor: Tensor) -> Tensor:
    """Blended with black."""
    return (images * factor).clamp(0, 1)


def contrasted(images: Tensor, factor: Tensor) -> Tensor:
    """Blended with the mean luma of each image."""
    return torch.lerp(grey(images).mean((-2, -1), keepdim=True), images, factor).clamp(0, 1)


def saturated(images: Tensor, factor: Tensor) -> Tensor:
    """Blended with the greyscale image."""
    return torch.lerp(grey(images), images, factor).clamp(0, 1)


def hue_shifted(images: Tensor, shift: Tensor) -> Tensor:
    """Hue shifted by ``shift`` turns of the colour wheel, in HSV."""
    red, green, blue = images.unbind(1)
    value, low = images.amax(1), images.amin(1)
    chroma = value - low
    safe = torch.where(chroma == 0, torch.ones_like(chroma), chroma)
    sector = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    hue = sector + 6 * shift[:, 0]
    channels = []
    for offset in (5, 3, 1):  # red, green, blue: value - chroma * clamp(min(k, 4 - k), 0, 1), k = (n + hue) mod 6
        k = torch.remainder(offset + hue, 6)
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels, dim=1)


def blurred(images: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur, reflected at the border; each image has its own ``sigma`` in px."""
    radius = min(RADIUS, images.shape[-1] - 1)
    distance = torch.arange(-radius, radius + 1, device=images.device)
    kernel = torch.exp(-0.5 * (distance / sigma[:, :, 0]) ** 2)  # [N, 1, 2 radius + 1]
    kernel = (kernel / kernel.sum(-1, keepdim=True)).repeat_interleave(images.shape[1], 0)[:, :, None]
    n, c = images.shape[:2]
    x = F.pad(images, [radius] * 4, mode="reflect").reshape(1, n * c, *(s + 2 * radius for s in images.shape[-2:]))
    x = F.conv2d(x, kernel, groups=n * c)
    x = F.conv2d(x, kernel.transpose(-2, -1), groups=n * c)
    return x.reshape(n, c, *images.shape[-2:])


def solarised(images: Tensor) -> Tensor:
    """Values from 128 / 255 upwards are inverted."""
    return torch.where(images >= 128 / 255, 1 - images, images)


_JITTER = {
    Colour.BRIGHTNESS: brightened,
    Colour.CONTRAST: contrasted,
    Colour.SATURATION: saturated,
    Colour.HUE: hue_shifted,
}
