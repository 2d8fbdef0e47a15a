"""Colour, rotation and normalisation on a CPU: one crop after the other, so that it stays in the processor's cache.

Brightness, contrast, saturation and greyscale are all ``scale * x + grey_scale * grey(x) + offset``. They are composed
as three numbers, and are computed only before values are clamped or the hue changes. A Gaussian blur commutes with
them. NumPy computes the same for any number of threads, so the views do not depend on the number of workers.
"""

from __future__ import annotations

import math
import threading

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gtsa.core.types import Colour, Crops
from gtsa.data.recipe import BRIGHT, LUMA, ORDERS, RADIUS

TAIL = 4  # standard deviations; all taps beyond weigh less than 1e-4
BAND = 2**14  # pixels of a plane whose hue is computed at a time
TINY = np.finfo(np.float32).tiny

_workspaces = threading.local()
Plane = NDArray[np.float32]


def finish(
    crops: Crops, mean: tuple[float, ...], std: tuple[float, ...], colour: bool = True, out: Tensor | None = None
) -> Tensor:
    """Pixels of crops after colour recipe, rotation and normalisation: [B, n, 3, S, S] float32; in ``out`` if given."""
    out = torch.empty(crops.pixels.shape) if out is None else out
    crop = _workspace(crops.side)
    inputs = (
        crops.pixels.flatten(0, 1).numpy(),
        crops.rotations.flatten().tolist(),
        crops.colours.flatten(0, 1).tolist(),
    )
    for pixels, rotation, recipe, target in zip(*inputs, out.flatten(0, 1).numpy(), strict=True):
        crop.load(np.rot90(pixels, rotation, (-2, -1)))
        if colour:
            crop.recolour(recipe)
        crop.store(target, mean, std)
    return out


def _workspace(side: int) -> _Crop:
    """Memory for crops of this size, which a thread keeps: new memory would cost as much time as its use."""
    crop: _Crop | None = getattr(_workspaces, str(side), None)
    if crop is None:
        crop = _Crop(side)
        setattr(_workspaces, str(side), crop)
    return crop


class _Crop:
    """A crop in work: scale * values + grey_scale * grey(values) + offset is in [0, 1]."""

    def __init__(self, side: int) -> None:
        self.side = side
        self.values: Plane = np.empty((3, side, side), np.float32)
        self.planes: Plane = np.empty((4, side, side), np.float32)
        self.padded: Plane = np.empty(3 * side * (side + 2 * RADIUS), np.float32)
        self.pair: Plane = np.empty((3, side, side), np.float32)

    def load(self, pixels: NDArray[np.uint8]) -> None:
        np.copyto(self.values, pixels)
        self.scale, self.grey_scale, self.offset = 1 / 255, 0.0, 0.0
        self.luma: float | None = None  # mean of grey(values), once it is known

    def store(self, out: Plane, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        """Writes the crop to ``out``, normalised."""
        centre, width = (np.array(each, np.float32)[:, None, None] for each in (mean, std))
        grey = self._grey() if self.grey_scale else None
        np.multiply(self.values, self.scale / width, out=out)
        out += (self.offset - centre) / width
        if grey is not None:
            for channel in range(3):
                out[channel] += np.multiply(grey, self.grey_scale / std[channel], out=self.planes[1])

    def recolour(self, recipe: list[float]) -> None:
        """Colour jitter in the crop's own random order, then greyscale, then blur, then solarisation."""
        if recipe[Colour.ORDER] >= 0:
            for operation in ORDERS[int(recipe[Colour.ORDER])]:
                _JITTER[operation](self, recipe[operation])
        if recipe[Colour.GRAYSCALE] > 0:
            self._compose(0.0, 1.0, 0.0)
        if recipe[Colour.SIGMA] > 0:
            self.blur(recipe[Colour.SIGMA])
        if recipe[Colour.SOLARIZE] > 0:
            self.solarise()

    def brighten(self, factor: float) -> None:
        """Blended with black."""
        self._compose(factor, 0.0, 0.0)
        if factor > 1:
            self._compute()
            np.minimum(self.values, 1, out=self.values)

    def contrast(self, factor: float) -> None:
        """Blended with the mean luma."""
        if self.luma is None:
            means = self.values.reshape(3, -1).mean(1)
            self.luma = sum(weight * float(value) for weight, value in zip(LUMA, means, strict=True))
        mean = (self.scale + sum(LUMA) * self.grey_scale) * self.luma + sum(LUMA) * self.offset
        self._compose(factor, 0.0, (1 - factor) * mean)
        if factor > 1:
            self._clamp()

    def saturate(self, factor: float) -> None:
        """Blended with the greyscale crop."""
        self._compose(factor, 1 - factor, 0.0)
        if factor > 1:
            self._clamp()

    def shift_hue(self, shift: float) -> None:
        """Hue shifted by ``shift`` turns of the colour wheel, in HSV."""
        self._compute()
        rows = max(1, BAND // self.side)
        for first in range(0, self.side, rows):
            band = slice(first, first + rows)
            _shift_hue(self.values[:, band], self.planes[:, band], shift)

    def blur(self, sigma: float) -> None:
        """Gaussian blur, reflected at the border; ``sigma`` in px."""
        radius = min(RADIUS, self.side - 1, int(np.ceil(TAIL * sigma)))
        weights = np.exp(-0.5 * (np.arange(radius + 1) / sigma) ** 2)
        weights /= weights[0] + 2 * weights[1:].sum()
        for axis in (1, 2):
            self._convolve(weights.tolist(), axis)
        self.luma = None

    def solarise(self) -> None:
        """Values from 128 / 255 upwards are inverted."""
        self._compute()
        np.copyto(self.values, 1 - self.values, where=self.values >= np.float32(BRIGHT))

    def _compose(self, scale: float, grey_scale: float, offset: float) -> None:
        """Composes ``scale * x + grey_scale * grey(x) + offset`` with what is to be computed."""
        of_grey = self.scale + sum(LUMA) * self.grey_scale  # grey(x) = of_grey * grey(values) + sum(LUMA) * self.offset
        self.offset = scale * self.offset + grey_scale * sum(LUMA) * self.offset + offset
        self.scale, self.grey_scale = scale * self.scale, scale * self.grey_scale + grey_scale * of_grey

    def _compute(self) -> None:
        """Brings ``values`` up to date."""
        if (self.scale, self.grey_scale, self.offset) == (1.0, 0.0, 0.0):
            return
        if self.grey_scale:
            grey = self._grey()
            grey *= self.grey_scale
            grey += self.offset
            self.values *= self.scale
            self.values += grey
        else:
            self.values *= self.scale
            if self.offset:
                self.values += self.offset
        self.scale, self.grey_scale, self.offset, self.luma = 1.0, 0.0, 0.0, None

    def _clamp(self) -> None:
        self._compute()
        np.clip(self.values, 0, 1, out=self.values)

    def _grey(self) -> Plane:
        """Luma of ``values``, in the first of ``planes``."""
        grey: Plane = self.planes[0]
        other = self.planes[1]
        np.multiply(self.values[0], LUMA[0], out=grey)
        for channel in (1, 2):
            grey += np.multiply(self.values[channel], LUMA[channel], out=other)
        return grey

    def _convolve(self, weights: list[float], axis: int) -> None:
        """Convolves ``values`` along an axis with a symmetric kernel, given from its centre outwards."""
        radius, side = len(weights) - 1, self.side
        swapped = (0, axis, 3 - axis)
        shape = (3, *(side + 2 * radius * (i == axis) for i in (1, 2)))
        padded = self.padded[: math.prod(shape)].reshape(shape)
        lines, values = padded.transpose(swapped), self.values.transpose(swapped)  # the axis is the second one
        lines[:, radius : radius + side] = values
        lines[:, :radius] = values[:, radius:0:-1]
        lines[:, radius + side :] = values[:, -2 : -radius - 2 : -1]
        pair = self.pair.transpose(swapped)
        np.multiply(values, weights[0], out=values)
        for distance in range(1, radius + 1):
            before, after = (lines[:, radius + d : radius + d + side] for d in (-distance, distance))
            np.add(before, after, out=pair)
            pair *= weights[distance]
            values += pair


def _shift_hue(values: Plane, planes: Plane, shift: float) -> None:
    """Shifts the hue of ``values`` [3, h, w] in [0, 1] in place.

    With chroma = high - low, the size of the angle from red is 1 + (green + blue - red - low) / chroma, in sixths of a
    turn; its sign is that of green - blue. A channel at a distance ``a`` from the new angle is low + chroma *
    clamp(2 - a, 0, 1).
    """
    red, green, blue = values
    low, chroma, angle, other = planes
    np.add(green, blue, out=angle)
    angle -= red
    np.minimum(green, blue, out=low)
    np.minimum(low, red, out=low)
    np.maximum(green, blue, out=chroma)
    np.maximum(chroma, red, out=chroma)
    chroma -= low
    angle -= low
    angle += chroma
    np.subtract(green, blue, out=other)
    np.copysign(angle, other, out=angle)
    chroma += TINY
    angle /= chroma
    angle += 6 * shift
    np.multiply(angle, 1 / 6, out=other)
    np.rint(other, out=other)
    other *= 6
    angle -= other  # from -3 to 3
    np.absolute(angle, out=other)
    np.subtract(2, other, out=red)
    np.subtract(-2, angle, out=other)  # at 2 and -2: clamp(2 - a, 0, 1) is clamp(max(angle, -2 - angle), 0, 1)
    np.maximum(other, angle, out=green)
    np.subtract(angle, 2, out=other)
    np.negative(angle, out=angle)
    np.maximum(other, angle, out=blue)
    np.clip(values, 0, 1, out=values)
    values *= chroma
    values += low


_JITTER = {
    Colour.BRIGHTNESS: _Crop.brighten,
    Colour.CONTRAST: _Crop.contrast,
    Colour.SATURATION: _Crop.saturate,
    Colour.HUE: _Crop.shift_hue,
}
