"""Colour, rotation and normalisation on a CPU: one crop after the other, so that it stays in the processor's cache.

Brightness, contrast, saturation and greyscale are all ``scale * x + grey_scale * grey(x) + offset``. They are composed
as three numbers. Clamping, blur and a change of hue commute with scale and offset, so pixels change only there, and
where luma is mixed in. Each operation computes the same for any number of threads, so the views do not depend on the
number of workers.
"""

from __future__ import annotations

import threading

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gtsa.core.types import Colour, Crops
from gtsa.data.views.recipe import BRIGHT, LUMA, ORDERS, RADIUS

TAIL = 4  # standard deviations; all taps beyond weigh less than 1e-4
BAND = 2**15  # pixels whose hue is computed at a time
BLURRED = 2**15  # pixels of all planes that are blurred at a time
TINY = 1e-30  # a smaller scale: all values are the offset
WHITE = sum(LUMA)  # luma of 1
SIGN = np.int32(-(2**31))  # the bit of a float's sign

_workspaces = threading.local()
Plane = NDArray[np.float32]


def finish(
    crops: Crops, mean: tuple[float, ...], std: tuple[float, ...], colour: bool = True, out: Tensor | None = None
) -> Tensor:
    """Pixels of crops after colour recipe, rotation and normalisation: [B, n, 3, S, S] float32; in ``out`` if given."""
    out = torch.empty(crops.pixels.shape) if out is None else out
    crop = _workspace(crops.side)
    inputs = crops.pixels.flatten(0, 1), crops.rotations.flatten().tolist(), crops.colours.flatten(0, 1).tolist()
    for pixels, rotation, recipe, target in zip(*inputs, out.flatten(0, 1).numpy(), strict=True):
        crop.load(pixels, rotation)
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
        self.colours = torch.empty(3, side, side)
        self.values: Plane = self.colours.numpy()  # after greyscale: one plane
        self.greys: Plane = np.empty((2, side, side), np.float32)
        self.hues: Plane = np.empty((7, min(BAND, side**2)), np.float32)
        self.at_once = min(3, max(1, BLURRED // side**2))
        self.lines: Plane = np.empty((3, self.at_once * side * (side + 2 * RADIUS)), np.float32)

    def load(self, pixels: Tensor, rotation: int) -> None:
        """Starts with ``pixels`` [3, S, S] uint8, rotated by quarter-turns."""
        self.values = self.colours.numpy()
        array = (pixels.flip(-2, -1) if rotation == 2 else pixels).numpy()
        if rotation % 2:
            array = array.transpose(0, 2, 1)
            array = array[:, ::-1] if rotation == 1 else array[:, :, ::-1]
        np.copyto(self.values, array)
        self.scale, self.grey_scale, self.offset = 1 / 255, 0.0, 0.0
        self.luma: float | None = None  # mean of grey(values), once it is known

    def store(self, out: Plane, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        """Writes the crop to ``out``, normalised."""
        self._mix()
        for channel, plane in enumerate(out):
            np.multiply(self.values[channel % len(self.values)], self.scale / std[channel], out=plane)
            plane += (self.offset - mean[channel]) / std[channel]

    def recolour(self, recipe: list[float]) -> None:
        """Colour jitter in the crop's own random order, then greyscale, then blur, then solarisation."""
        if recipe[Colour.ORDER] >= 0:
            for operation in ORDERS[int(recipe[Colour.ORDER])]:
                _JITTER[operation](self, recipe[operation])
        if recipe[Colour.GRAYSCALE] > 0:
            self.grey()
        if recipe[Colour.SIGMA] > 0:
            self.blur(recipe[Colour.SIGMA])
        if recipe[Colour.SOLARIZE] > 0:
            self.solarise()

    def brighten(self, factor: float) -> None:
        """Blended with black."""
        self._compose(factor, 0.0, 0.0)
        if factor > 1:
            self._clamp()

    def contrast(self, factor: float) -> None:
        """Blended with the mean luma."""
        if self.luma is None:
            sums = np.add.reduce(self.values.reshape(3, -1), 1)
            self.luma = sum(weight * float(value) for weight, value in zip(LUMA, sums, strict=True)) / self.side**2
        mean = (self.scale + WHITE * self.grey_scale) * self.luma + WHITE * self.offset
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
        self._mix()
        values = self.values.reshape(3, -1)
        for first in range(0, self.side**2, BAND):
            band = values[:, first : first + BAND]
            _shift_hue(band, self.hues[:, : band.shape[1]], shift)
        self.luma = None

    def grey(self) -> None:
        """Greyscale: one plane is left."""
        self._compose(0.0, 1.0, 0.0)
        self.values = self._luma(self.grey_scale)[None]
        self.scale, self.grey_scale = 1.0, 0.0

    def blur(self, sigma: float) -> None:
        """Gaussian blur, reflected at the border; ``sigma`` in px."""
        radius = min(RADIUS, self.side - 1, int(np.ceil(TAIL * sigma)))
        weights = np.exp(-0.5 * (np.arange(radius + 1) / sigma) ** 2)
        weights /= weights[0] + 2 * weights[1:].sum()
        for first in range(0, len(self.values), self.at_once):
            _blur(self.values[first : first + self.at_once], self.lines, weights.tolist())

    def solarise(self) -> None:
        """Values from 128 / 255 upwards are inverted."""
        self._mix()
        self.values *= self.scale
        self.values += self.offset
        self.scale, self.offset = 1.0, 0.0
        np.copyto(self.values, 1 - self.values, where=self.values >= np.float32(BRIGHT))

    def _compose(self, scale: float, grey_scale: float, offset: float) -> None:
        """Composes ``scale * x + grey_scale * grey(x) + offset`` with what is to be computed."""
        of_grey = self.scale + WHITE * self.grey_scale  # grey(x) = of_grey * grey(values) + WHITE * self.offset
        self.offset = scale * self.offset + grey_scale * WHITE * self.offset + offset
        self.scale, self.grey_scale = scale * self.scale, scale * self.grey_scale + grey_scale * of_grey

    def _mix(self) -> None:
        """Mixes luma into ``values``; scale and offset are left."""
        if self.grey_scale:
            grey = self._luma(self.grey_scale)
            self.values *= self.scale
            self.values += grey
            self.scale, self.grey_scale, self.luma = 1.0, 0.0, None

    def _clamp(self) -> None:
        self._mix()
        if self.scale > TINY:
            self.colours.clamp_(-self.offset / self.scale, (1 - self.offset) / self.scale)
            self.luma = None
        else:
            self.offset = min(max(self.offset, 0.0), 1.0)

    def _luma(self, scale: float) -> Plane:
        """Luma of ``values`` times ``scale``, in the first of ``greys``."""
        grey: Plane = self.greys[0]
        other = self.greys[1]
        np.multiply(self.values[0], scale * LUMA[0], out=grey)
        for channel in (1, 2):
            grey += np.multiply(self.values[channel], scale * LUMA[channel], out=other)
        return grey


def _blur(planes: Plane, lines: Plane, weights: list[float]) -> None:
    """Convolves ``planes`` [C, S, S] in place with a symmetric kernel along both axes.

    Args:
        lines: memory for three padded copies.
        weights: the kernel, from its centre outwards.
    """
    (count, side, _), radius = planes.shape, len(weights) - 1
    wide = side + 2 * radius
    padded, out, pair = lines[:, : count * side * wide]
    rows = padded.reshape(count, side, wide)
    rows[..., radius : radius + side] = planes
    rows[..., :radius] = planes[..., radius:0:-1]
    rows[..., radius + side :] = planes[..., -2 : -radius - 2 : -1]
    _convolve(padded, out, pair, weights, 1)
    columns = padded.reshape(count, wide, side)
    columns[:, radius : radius + side] = out.reshape(count, side, wide)[..., :side]
    columns[:, :radius] = columns[:, 2 * radius : radius : -1]
    columns[:, radius + side :] = columns[:, radius + side - 2 : side - 2 : -1]
    _convolve(padded, out, pair, weights, side)
    planes[:] = out.reshape(count, wide, side)[:, :side]


def _convolve(line: Plane, out: Plane, pair: Plane, weights: list[float], step: int) -> None:
    """Convolves a line with taps that are ``step`` apart; ``out`` begins where the kernel is inside."""
    centre = (len(weights) - 1) * step
    length = len(line) - 2 * centre
    out, pair = out[:length], pair[:length]
    np.multiply(line[centre : centre + length], weights[0], out=out)
    for distance, weight in enumerate(weights[1:], 1):
        before, after = centre - distance * step, centre + distance * step
        np.add(line[before : before + length], line[after : after + length], out=pair)
        pair *= weight
        out += pair


def _shift_hue(values: Plane, planes: Plane, shift: float) -> None:
    """Shifts the hue of ``values`` [3, n] in place; ``planes`` is memory for seven.

    A third of a turn passes the channels on: red becomes green. The rest is at most a sixth. There a channel of hue
    angle ``a`` (0 where it is largest, from -3 to 3) is low + chroma * clamp(2 - |a|, 0, 1), where 2 - |a| is
    (2 * channel - mid - low) / chroma, and a sixth of a turn adds 1 to ``a``. The sign of red's angle is that of
    green - blue. Where the sum leaves -3 to 3 or its sign changes, the clamped value stays the same.
    """
    thirds = round(3 * shift)
    rest = 6 * shift - 2 * thirds
    red, green, blue = values
    low, mid, high, change, *_ = planes
    new = planes[4:]
    np.minimum(green, blue, out=low)
    np.maximum(green, blue, out=high)
    np.maximum(low, red, out=mid)
    np.minimum(mid, high, out=mid)
    np.minimum(low, red, out=low)
    np.maximum(high, red, out=high)
    np.subtract(high, low, out=change)
    change *= abs(rest)
    for plane, first, second in zip(new, (green, blue, red), (blue, red, green), strict=True):
        np.subtract(*((first, second) if rest > 0 else (second, first)), out=plane)
    signs = new.view(np.int32)
    signs &= SIGN
    signs |= change.view(np.int32)  # np.copysign takes eight times as long
    new += mid
    np.subtract(values, new, out=new)
    new += values
    np.maximum(new, low, out=new)
    for channel in range(3):
        np.minimum(new[channel], high, out=values[(channel + thirds) % 3])


_JITTER = {
    Colour.BRIGHTNESS: _Crop.brighten,
    Colour.CONTRAST: _Crop.contrast,
    Colour.SATURATION: _Crop.saturate,
    Colour.HUE: _Crop.shift_hue,
}
