"""From one image to its views: box, rotation and colour recipe of each crop, and its uint8 pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import Generator
from torch import Tensor

from gtsa.core.types import Colour, Crops, Views

Box = tuple[int, int, int, int]
TRIES = 100  # per crop; afterwards a crop is constructed that meets all conditions


@dataclass(frozen=True)
class MultiCrop:
    """Draws and cuts the views of one image (GTSA, section 3.1 and the published settings).

    Attributes:
        global_crops_number: global crops of an image, for student and teacher; at least one, and two views in all.
        local_crops_number: local crops of an image, for the student only.
        global_crops_size: side of a global crop, px. auto: 224, in whole patches.
        local_crops_size: side of a local crop, px. auto: 96, in whole patches.
        global_crops_scale: range of a global crop's area, as a fraction of the image's area.
        local_crops_scale: range of a local crop's area, as a fraction of the image's area.
        aspect: range of the aspect ratio (width / height), drawn log-uniformly.
        global_overlap: a global crop overlaps every earlier global crop by more than this fraction of the image's area;
            0: it may lie anywhere.
        local_overlap: a local crop overlaps every global crop by more than this fraction of the image's area; 0: it may
            lie anywhere.
        local_inside: local crops lie inside the region that all global crops share.
        clean_global: global crops keep the colours of the image: no jitter, greyscale, blur or solarisation.
        rotations: rotate every crop by a random number of quarter-turns, 0 to 3.
        hflip: probability of a horizontal flip.
        color_jitter: probability of colour jitter.
        grayscale: probability of greyscale.
        gaussian_blur: probabilities of Gaussian blur: of the first global crop, of the other global crops, and of local
            crops.
        solarize: probabilities of solarisation (the brighter half of the values is inverted), as for gaussian_blur.
        brightness: brightness jitter x: factor drawn from 1 - x to 1 + x.
        contrast: contrast jitter x: factor drawn from 1 - x to 1 + x.
        saturation: saturation jitter x: factor drawn from 1 - x to 1 + x.
        hue: hue jitter x: shift drawn from -x to x, in turns of the colour wheel; at most 0.5.
        sigma: range of the blur's standard deviation, px.
    """

    global_crops_number: int = 2
    local_crops_number: int = 8
    global_crops_size: int = 224
    local_crops_size: int = 96
    global_crops_scale: tuple[float, float] = (0.3, 1.0)
    local_crops_scale: tuple[float, float] = (0.1, 0.3)
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    global_overlap: float = 0.02
    local_overlap: float = 0.01
    local_inside: bool = False
    clean_global: bool = False
    rotations: bool = True
    hflip: float = 0.0
    color_jitter: float = 0.8
    brightness: float = 0.8
    contrast: float = 0.8
    saturation: float = 0.8
    hue: float = 0.2
    grayscale: float = 0.2
    gaussian_blur: tuple[float, float, float] = (0.2, 0.2, 0.2)
    sigma: tuple[float, float] = (0.1, 2.0)
    solarize: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def __call__(self, image: Tensor, rng: Generator, out: Sequence[Tensor] | None = None) -> Views:
        """Views (B = 1) of ``image`` [3, H, W] uint8; every draw comes from ``rng``.

        Args:
            out: memory for the pixels of each size; None: new memory.
        """
        drawn = self.draw(image.shape[-1], image.shape[-2], rng)
        groups = []
        for crops, mirrored, pixels in zip(*drawn, self.memory(1) if out is None else out, strict=True):
            for box, target in zip(crops.boxes[0].long().tolist(), pixels[0], strict=True):
                target.copy_(resized(image, box, *target.shape[-2:]))
            if self.hflip > 0:
                pixels[mirrored] = pixels[mirrored].flip(-1)
            groups.append(replace(crops, pixels=pixels))
        return Views.of(groups)

    def draw(self, width: int, height: int, rng: Generator) -> tuple[list[Crops], list[Tensor]]:
        """Crops of an image by size, still without pixels [1, n, 0, S, S], and which are mirrored: [1, n] each."""
        boxes = self.boxes(width, height, rng)
        kinds = [0] + [1] * (len(boxes[0]) - 1), [2] * len(boxes[1])  # the first global crop, other ones, local ones
        crops, mirrored = [], []
        for places, kind, (n, side) in zip(boxes, kinds, self.shapes, strict=False):
            rotations = (rng.random(n) * 4).astype(np.int64) * self.rotations
            recipes = torch.from_numpy(self._draw_recipes(kind, rng))
            flips = rng.random(n) < self.hflip if self.hflip > 0 else np.zeros(n, bool)
            pixels = torch.empty(1, n, 0, side, side, dtype=torch.uint8)
            place = torch.tensor(places, dtype=torch.float64)
            crops.append(Crops(pixels, place[None], torch.from_numpy(rotations)[None], recipes[None]))
            mirrored.append(torch.from_numpy(flips)[None])
        return crops, mirrored

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Number and side of an image's crops: of the global ones, and of the local ones if any."""
        shapes = [
            (self.global_crops_number, self.global_crops_size),
            (self.local_crops_number, self.local_crops_size),
        ]
        return shapes[: 2 if self.local_crops_number else 1]

    def memory(self, images: int) -> list[Tensor]:
        """Memory for uint8 crops, by size: [images, n, 3, S, S]."""
        return [torch.empty(images, n, 3, side, side, dtype=torch.uint8) for n, side in self.shapes]

    def boxes(self, width: int, height: int, rng: Generator) -> tuple[list[Box], list[Box]]:
        """Boxes of the global and of the local crops in an image of ``width`` x ``height`` px."""
        frame = (0, 0, width, height)
        boxes: list[Box] = []
        for _ in range(self.global_crops_number):
            boxes.append(self._draw_box(frame, frame, self.global_crops_scale, self.global_overlap, tuple(boxes), rng))
        earlier, inner = tuple(boxes), _common(frame, boxes) if self.local_inside else frame
        local_boxes = [
            self._draw_box(frame, inner, self.local_crops_scale, self.local_overlap, earlier, rng)
            for _ in range(self.local_crops_number)
        ]
        return boxes, local_boxes

    def detail(self, width: int, height: int) -> float:
        """The smallest scale of an image at which no crop has to be enlarged; at most 1."""
        narrowest = min(self.aspect[0], 1 / self.aspect[1])
        shares = self.global_crops_scale, self.local_crops_scale
        return min(
            1.0,
            max(
                side / min(width, height, math.sqrt(width * height * share[0] * narrowest))
                for (_, side), share in zip(self.shapes, shares, strict=False)
            ),
        )

    def _draw_box(
        self, image: Box, inner: Box, share: tuple[float, float], least: float, earlier: tuple[Box, ...], rng: Generator
    ) -> Box:
        """A box in ``inner``, of a share of the image's area, with more than ``least`` of it in each earlier box."""
        width, height = inner[2] - inner[0], inner[3] - inner[1]
        area = image[2] * image[3]
        for _ in range(TRIES):
            size = area * _uniform(rng, *share)
            ratio = math.exp(_uniform(rng, math.log(self.aspect[0]), math.log(self.aspect[1])))
            w, h = round(math.sqrt(size * ratio)), round(math.sqrt(size / ratio))
            offset = rng.random(2)
            if 0 < w <= width and 0 < h <= height:
                x, y = inner[0] + int(offset[0] * (width - w + 1)), inner[1] + int(offset[1] * (height - h + 1))
                box = (x, y, x + w, y + h)
                if least <= 0 or all(_shared_area(box, other) > least * area for other in earlier):
                    return box
        if inner != image and all(_shared_area(inner, other) > least * area for other in earlier):
            return inner
        return _construct_box(image[2], image[3], _uniform(rng, *share), least, earlier, rng)

    def _draw_recipes(self, kinds: list[int], rng: Generator) -> np.ndarray:
        """Colour recipes of crops of these kinds: [crops, len(Colour)] float32."""
        draws = rng.random((len(kinds), 9))
        recipe = np.zeros((len(kinds), len(Colour)), dtype=np.float32)
        for column, strength in (
            (Colour.BRIGHTNESS, self.brightness),
            (Colour.CONTRAST, self.contrast),
            (Colour.SATURATION, self.saturation),
        ):
            recipe[:, column] = max(0.0, 1 - strength) + draws[:, column] * (1 + strength - max(0.0, 1 - strength))
        recipe[:, Colour.HUE] = (2 * draws[:, Colour.HUE] - 1) * self.hue
        recipe[:, Colour.ORDER] = np.where(draws[:, 5] < self.color_jitter, (draws[:, 4] * 24).astype(int), -1)
        recipe[:, Colour.GRAYSCALE] = draws[:, 6] < self.grayscale
        sigma = self.sigma[0] + draws[:, 8] * (self.sigma[1] - self.sigma[0])
        recipe[:, Colour.SIGMA] = np.where(draws[:, 7] < np.take(self.gaussian_blur, kinds), sigma, 0)
        if any(self.solarize):
            recipe[:, Colour.SOLARIZE] = rng.random(len(kinds)) < np.take(self.solarize, kinds)
        if self.clean_global:
            clean = np.array(kinds) < 2
            recipe[clean, Colour.ORDER] = -1
            recipe[clean, Colour.GRAYSCALE :] = 0
        return recipe


def _uniform(rng: Generator, low: float, high: float) -> float:
    return low + (high - low) * rng.random()


def _common(image: Box, boxes: Sequence[Box]) -> Box:
    """The region that all boxes share, or the image if there is none."""
    x1, y1 = max(b[0] for b in boxes), max(b[1] for b in boxes)
    x2, y2 = min(b[2] for b in boxes), min(b[3] for b in boxes)
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else image


def _shared_area(a: Box, b: Box) -> int:
    """Area that two boxes share, px."""
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))


def _construct_box(
    width: int, height: int, share: float, least: float, earlier: tuple[Box, ...], rng: Generator
) -> Box:
    """A crop with the given share of the area that meets the overlap conditions; its aspect is free.

    It has the shape of the region that all earlier global crops share, and contains that region or lies in it. Boxes
    that overlap in pairs have a common region (Helly), but with three or more it can be small. Then only the whole
    image is certain to overlap enough with each.
    """
    x1, y1 = max((b[0] for b in earlier), default=0), max((b[1] for b in earlier), default=0)
    x2, y2 = min((b[2] for b in earlier), default=width), min((b[3] for b in earlier), default=height)
    w, h = max(1, x2 - x1), max(1, y2 - y1)
    grow = math.sqrt(share * width * height / (w * h))
    crop_w = min(width, w * grow)
    crop_h = min(height, share * width * height / crop_w)
    crop_w = min(width, share * width * height / crop_h)
    side_x, side_y = max(1, round(crop_w)), max(1, round(crop_h))
    left = _draw_start(x1, x2, side_x, width, rng)
    top = _draw_start(y1, y2, side_y, height, rng)
    box = (left, top, left + side_x, top + side_y)
    if all(_shared_area(box, other) > least * width * height for other in earlier):
        return box
    return (0, 0, width, height)


def _draw_start(low: int, high: int, side: int, length: int, rng: Generator) -> int:
    """A start in [0, length - side] so that [start, start + side) contains [low, high) or lies in it."""
    first, last = sorted((low, high - side))
    first, last = max(0, first), min(length - side, last)
    return first + int(rng.random() * (max(0, last - first) + 1))


def resized(image: Tensor, box: Box, height: int, width: int) -> Tensor:
    """The box of ``image`` [3, H, W] as uint8 [3, height, width]: bilinear with antialiasing."""
    x1, y1, x2, y2 = box
    cut = image[None, :, y1:y2, x1:x2]
    return F.interpolate(cut, (height, width), mode="bilinear", antialias=True, align_corners=False)[0]
