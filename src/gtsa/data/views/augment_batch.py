"""Colour, rotation and normalisation on a GPU: few operations, each on all crops of a size.

Of a crop's jitter, up to three blends (brightness, contrast, saturation) come before its change of hue, the others
after it. So every crop goes through the same passes: three blends, the hue, three blends, greyscale. A pass that a crop
does not need leaves it as it is. Recipes are read on the host, and the device never waits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gtsa.core.compilation import compilable
from gtsa.core.types import Colour, Crops
from gtsa.data.views.recipe import BRIGHT, LUMA, ORDERS, RADIUS

UNCHANGED = torch.tensor([1.0, 0.0, 0.0])


def finish(crops: Crops, mean: tuple[float, ...], std: tuple[float, ...], colour: bool, device: torch.device) -> Tensor:
    """The crops' pixels on ``device`` after colour recipe, rotation and normalisation: [B, n, 3, S, S] float32."""
    pixels = crops.pixels.to(device, non_blocking=True).flatten(0, 1).float() / 255
    if colour:
        pixels = recolour(pixels, crops.colours.flatten(0, 1))
    rotations = crops.rotations.flatten()
    chosen = rotations.argsort(stable=True).to(device, non_blocking=True)
    last: list[int] = torch.bincount(rotations, minlength=4).cumsum(0).tolist()
    for k in (1, 2, 3):
        part = chosen[last[k - 1] : last[k]]
        if len(part):
            pixels[part] = torch.rot90(pixels[part], k, (-2, -1))
    centre, scale = (torch.tensor(values, device=device)[:, None, None] for values in (mean, std))
    return ((pixels - centre) / scale).reshape(crops.pixels.shape)


def recolour(images: Tensor, recipes: Tensor) -> Tensor:
    """Colour jitter in each crop's own random order, then greyscale, then blur, then solarisation.

    Args:
        images: [N, 3, S, S] in [0, 1]; may be changed in place.
        recipes: [N, len(Colour)] on the host.
    """
    blends, shifts = passes(recipes)
    on_device = torch.cat([blends.flatten(1), shifts[:, None], recipes[:, [Colour.SIGMA, Colour.SOLARIZE]]], 1)
    on_device = on_device.to(images.device, non_blocking=True)[:, :, None, None, None]
    changes = (blends != UNCHANGED).flatten(2).any(-1).any(0).tolist()
    for number, changed in enumerate(changes):
        if number == 3 and shifts.any():
            images = hue_shifted(images, on_device[:, -3])
        if changed:
            images = blended(images, *on_device[:, 3 * number : 3 * number + 3].unbind(1))
    if (is_blurred := recipes[:, Colour.SIGMA] > 0).any():
        chosen = is_blurred.nonzero()[:, 0].to(images.device, non_blocking=True)
        images[chosen] = blurred(images[chosen], on_device[chosen, -2])
    if (recipes[:, Colour.SOLARIZE] > 0).any():
        images = torch.where((on_device[:, -1] > 0) & (images >= BRIGHT), 1 - images, images)
    return images


def passes(recipes: Tensor) -> tuple[Tensor, Tensor]:
    """What each pass does to each crop, from its recipe: blends [N, 7, 3] (see ``blended``), shifts of the hue [N].

    Blends 0 to 2 come before the change of hue, 3 to 5 after it. The last one is greyscale.
    """
    order = torch.tensor(ORDERS)[recipes[:, Colour.ORDER].long().clamp(min=0)]  # [N, 4] of Colour
    jittered, place = recipes[:, Colour.ORDER] >= 0, torch.arange(4)
    hue = (order == Colour.HUE).long().argmax(1, keepdim=True)  # the place of the hue among the four
    factor, is_blend = recipes.gather(1, order), jittered[:, None] & (order != Colour.HUE)
    rest = 1 - factor
    each = torch.stack([factor, rest * (order == Colour.SATURATION), rest * (order == Colour.CONTRAST)], -1)
    number = torch.where(place < hue, place, place - hue + 2)
    blends = UNCHANGED.repeat(len(recipes), 7, 1)
    blends[is_blend.nonzero()[:, 0], number[is_blend]] = each[is_blend]
    blends[recipes[:, Colour.GRAYSCALE] > 0, 6] = torch.tensor([0.0, 1.0, 0.0])
    return blends, recipes[:, Colour.HUE] * jittered


@compilable
def blended(images: Tensor, scale: Tensor, grey_scale: Tensor, mean_scale: Tensor) -> Tensor:
    """scale * images + grey_scale * their luma + mean_scale * its mean, clamped to [0, 1]; factors are [N, 1, 1, 1]."""
    luma = (images * torch.tensor(LUMA, device=images.device)[:, None, None]).sum(1, keepdim=True)
    grey = grey_scale * luma + mean_scale * luma.mean((-2, -1), keepdim=True)
    return torch.addcmul(grey, scale, images).clamp(0, 1)


@compilable
def hue_shifted(images: Tensor, shift: Tensor) -> Tensor:
    """Hue shifted by ``shift`` [N, 1, 1, 1] turns of the colour wheel, in HSV: as in ``augment_crop``."""
    red, green, blue = images.unbind(1)
    low, high = images.amin(1), images.amax(1)
    chroma = high - low
    angle = torch.copysign(green + blue - red - low + chroma, green - blue)
    angle = angle / chroma.clamp(min=torch.finfo(chroma.dtype).tiny) + 6 * shift[:, 0]
    angle = angle - 6 * (angle / 6).round()
    shares = torch.stack([2 - angle.abs(), angle.maximum(-2 - angle), (-angle).maximum(angle - 2)], 1).clamp(0, 1)
    return torch.addcmul(low[:, None], chroma[:, None], shares)


def blurred(images: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur, reflected at the border; each image has its own ``sigma`` [N, 1, 1, 1] in px."""
    radius = min(RADIUS, images.shape[-1] - 1)
    distance = torch.arange(-radius, radius + 1, device=images.device)
    kernel = torch.exp(-0.5 * (distance / sigma[:, :, 0]) ** 2)  # [N, 1, 2 radius + 1]
    kernel = (kernel / kernel.sum(-1, keepdim=True)).repeat_interleave(images.shape[1], 0)[:, :, None]
    n, c = images.shape[:2]
    x = F.pad(images, [radius] * 4, mode="reflect").reshape(1, n * c, *(s + 2 * radius for s in images.shape[-2:]))
    x = F.conv2d(x, kernel, groups=n * c)
    x = F.conv2d(x, kernel.transpose(-2, -1), groups=n * c)
    return x.reshape(n, c, *images.shape[-2:])
