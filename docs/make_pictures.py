"""Makes the pictures of the documentation from the embedded sample: python docs/make_pictures.py

Every picture is drawn by the code that trains, with a fixed seed, and stored with few colours to be small.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw

import gtsa
from gtsa.core.drawing import GAP, label, new_sheet, to_image, write
from gtsa.core.seeds import Stream, generator
from gtsa.core.types import Crops, Views
from gtsa.data import augment
from gtsa.data.multicrop import MultiCrop
from gtsa.data.sources import open_source
from gtsa.methods.parts.geometry import pool, regions, rotate_maps

OUT = Path(__file__).parent / "pictures"
SAMPLE = Path(gtsa.__file__).parent / "data/sample/images"
IMAGE, EPOCH = 20, 24  # a tile with trees and meadow, and an epoch in which the rotations differ
HUES = [(214, 40, 40), (29, 78, 216), (181, 66, 11), (11, 110, 79), (110, 20, 190), (11, 111, 134)]
NAMES = ["G1", "G2", "L1", "L2", "L3", "L4"]
UNIT = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))  # no normalisation: pixels stay pixels
CELLS = 6


def main() -> None:
    source = open_source(str(SAMPLE))
    image = source.read(IMAGE)
    views = MultiCrop(local_crops_number=4)(image, generator(0, Stream.VIEWS, 0, IMAGE, EPOCH))
    cut = augment.apply(upright(views), torch.device("cpu"), *UNIT, colour=False)
    augmented = augment.apply(views, torch.device("cpu"), *UNIT)
    save("life_boxes", boxes(image, views))
    save("life_crops", row(cut, "as cut: {name}"))
    save("life_augmented", row(augmented, "{name}: {degrees}°"))
    save("life_patches", patches(augmented))
    save("life_cells", cells(views, augmented))
    with contextlib.redirect_stdout(io.StringIO()):
        gtsa.preview(str(SAMPLE), str(OUT / "preview.png"), IMAGE, EPOCH)
    save("preview", Image.open(OUT / "preview.png"))


def save(name: str, picture: Image.Image) -> None:
    few = picture.convert("RGB").quantize(200, Image.Quantize.MAXCOVERAGE, kmeans=3, dither=Image.Dither.NONE)
    few.save(OUT / f"{name}.png", optimize=True)


def upright(views: Views) -> Views:
    return views.each(lambda c: Crops(c.pixels, c.boxes, torch.zeros_like(c.rotations), c.colours))


def crops_of(views: Views) -> list[torch.Tensor]:
    """Pixels [S, S, 3] of every crop, global ones first."""
    return [crop.permute(1, 2, 0).clamp(0, 1) for crops in views.groups for crop in crops.pixels[0]]


def rotations_of(views: Views) -> list[int]:
    return [int(k) for crops in views.groups for k in crops.rotations[0]]


def boxes(image: torch.Tensor, views: Views) -> Image.Image:
    picture = to_image(image.permute(1, 2, 0)).resize((512, 512), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(picture)
    zoom = 512 / image.shape[-1]
    corners = [[v * zoom for v in box] for crops in views.groups for box in crops.boxes[0].tolist()]
    for (x1, y1, x2, y2), hue, name in zip(corners, HUES, NAMES, strict=True):
        draw.rectangle((x1, y1, x2 - 1, y2 - 1), outline=hue, width=5 if name[0] == "G" else 3)
    for (x1, y1, x2, _), hue, name in zip(corners, HUES, NAMES, strict=True):
        label(draw, (x2 - 28 if name[0] == "G" else x1 + 6, y1 + 8), name, hue)
    return picture


def row(views: Views, caption: str) -> Image.Image:
    return tiles(
        [
            (caption.format(name=name, degrees=90 * k), to_image(pixels), 200 if name[0] == "G" else 110, hue)
            for name, pixels, k, hue in zip(NAMES, crops_of(views), rotations_of(views), HUES, strict=True)
        ]
    )


def patches(views: Views) -> Image.Image:
    """A global and a local view with the grid of their patches of 16 px."""
    sheet = []
    for name, pixels, hue in zip(NAMES, crops_of(views), HUES, strict=True):
        if name in ("G1", "L1"):
            count = pixels.shape[0] // 16
            picture = to_image(pixels).resize((26 * count, 26 * count), Image.Resampling.NEAREST)
            draw = ImageDraw.Draw(picture)
            for i in range(1, count):
                draw.line((26 * i, 0, 26 * i, picture.height), fill="white", width=2)
                draw.line((0, 26 * i, picture.width, 26 * i), fill="white", width=2)
            sheet.append((f"{name}: {count} x {count} patches", picture, picture.width, hue))
    return tiles(sheet)


def cells(views: Views, augmented: Views) -> Image.Image:
    """A local view against a global crop: the shared region in both, its cells, and the rotated target."""
    seen, view = views.global_crops, views.groups[1]
    in_view, in_seen = (found[0] for found in regions(view, seen))  # [V, G, 4], [G, V, 4]
    v = next((v for v in range(view.count) if view.rotations[0, v] != seen.rotations[0, 0]), 0)
    turned = upright_pixels(views)
    teacher, student = turned[0], turned[seen.count + v]
    turns = view.rotations[0, v] - seen.rotations[0, 0]
    pooled = pool(teacher.double(), in_seen[0, v][None], CELLS)[0]
    own = pool(student.double(), in_view[v, 0][None], CELLS)[0]
    return tiles(
        [
            ("teacher sees G1", framed(teacher, in_seen[0, v], HUES[0]), 168, HUES[0]),
            ("its cells of the region", grid(pooled), 168, None),
            (f"rotated by {90 * (int(turns) % 4)}°: target", grid(rotate_maps(pooled, turns)), 168, None),
            ("student's cells", grid(own), 168, None),
            (f"student sees {NAMES[2 + v]}", framed(student, in_view[v, 0], HUES[2 + v]), 168, HUES[2 + v]),
        ]
    )


def upright_pixels(views: Views) -> list[torch.Tensor]:
    """Pixels [S, S, 3] of every crop after its rotation, without colours, so that cells can be compared by eye."""
    return crops_of(augment.apply(views, torch.device("cpu"), *UNIT, colour=False))


def framed(pixels: torch.Tensor, box: torch.Tensor, hue: tuple[int, int, int]) -> Image.Image:
    picture = to_image(pixels).resize((336, 336), Image.Resampling.BICUBIC)
    x1, y1, x2, y2 = (float(value) * 336 / pixels.shape[0] for value in box)
    ImageDraw.Draw(picture).rectangle((x1, y1, x2 - 1, y2 - 1), outline=hue, width=8)
    return picture


def grid(values: torch.Tensor) -> Image.Image:
    return to_image(values.float()).resize((168, 168), Image.Resampling.NEAREST)


def tiles(parts: Sequence[tuple[str, Image.Image, int, tuple[int, int, int] | None]]) -> Image.Image:
    """Pictures beside one another, with a caption below each and a frame in its colour."""
    height = max(side for _, _, side, _ in parts)
    sheet = new_sheet(sum(side + GAP for _, _, side, _ in parts) - GAP + 8, height + 30)
    x = 4
    for caption, picture, side, hue in parts:
        sheet.paste(picture.resize((side, side)), (x, 4))
        if hue:
            ImageDraw.Draw(sheet).rectangle((x - 1, 3, x + side, side + 4), outline=hue, width=3)
        write(sheet, (x, side + 8), caption)
        x += side + GAP
    return sheet


if __name__ == "__main__":
    main()
