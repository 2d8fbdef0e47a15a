"""Pictures that show what the method does, and what the network sees."""

from __future__ import annotations

import colorsys

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from gtsa.core.drawing import GAP, Hue, label, new_sheet, to_image, write
from gtsa.core.types import Crops, Views
from gtsa.methods.gtsa import regions
from gtsa.methods.parts.geometry import pool, rotate_maps

EDGE = 3  # px of a box's line


# What the network sees


# What the method does


def preview(image: Tensor, views: Views, finished: Views, mean: tuple, std: tuple, cells: int = 6) -> Image.Image:
    """One image, its crops, and the pooled target beside the student's cells.

    Args:
        image: uint8 [3, H, W].
        views: as cut (batch of one); finished: the same after colours, rotation and normalisation.
        cells: pooled cells a side in the lower rows.
    """
    centre, scale = (torch.tensor(v)[:, None, None] for v in (mean, std))
    seen = [(crops.pixels[0] * scale + centre).clamp(0, 1) for crops in finished.groups]
    hues = _hues(sum(crops.count for crops in views.groups))
    parts = [
        _scene(image, views, hues),
        _as_seen(seen, views, hues),
        *(_target(views, size, hues, cells if size == 0 else max(3, cells - 2)) for size in range(len(views.groups))),
    ]
    sheet = new_sheet(max(p.width for p in parts) + 2 * GAP, sum(p.height + GAP for p in parts) + GAP)
    y = GAP
    for part in parts:
        sheet.paste(part, (GAP, y))
        y += part.height + GAP
    return sheet


def _scene(image: Tensor, views: Views, hues: list[Hue]) -> Image.Image:
    picture = to_image(image.permute(1, 2, 0))
    zoom = min(1.6, 900 / picture.width, 620 / picture.height)
    picture = picture.resize((max(1, round(picture.width * zoom)), max(1, round(picture.height * zoom))))
    sheet = new_sheet(max(picture.width, 900), picture.height + 26)
    write(sheet, (0, 2), "the image, and where its crops were cut (G global, L local)")
    sheet.paste(picture, (0, 26))
    draw = ImageDraw.Draw(sheet)
    for _, box, hue, size in _crops(views, hues):
        x1, y1, x2, y2 = (value * zoom for value in box)
        draw.rectangle((x1, y1 + 26, x2 - 1, y2 + 25), outline=hue, width=4 if size == 0 else 2)
    for name, box, hue, size in _crops(views, hues):  # over all boxes; global ones on the right, out of the others' way
        x1, y1, x2, _ = (value * zoom for value in box)
        label(draw, (x2 - 26 if size == 0 else x1 + 4, y1 + 30), name, hue)
    return sheet


def _as_seen(seen: list[Tensor], views: Views, hues: list[Hue]) -> Image.Image:
    names = [name for name, *_ in _crops(views, hues)]
    rows, i, y = [], 0, 26
    for size, (tiles, crops) in enumerate(zip(seen, views.groups, strict=True)):
        side = (200, 100)[size]
        across = 900 // (side + GAP)
        for n, tile in enumerate(tiles):
            place = (n % across * (side + GAP), y + n // across * (side + 30))
            rows.append((tile, side, place, f"{names[i]} turned {90 * int(crops.rotations[0, n])}°", hues[i]))
            i += 1
        y += -(-len(tiles) // across) * (side + 30)
    sheet = new_sheet(900, y)
    write(sheet, (0, 2), "the views as the student sees them: coloured, and turned counter-clockwise")
    draw = ImageDraw.Draw(sheet)
    for tile, side, (x, y), name, hue in rows:
        sheet.paste(to_image(tile.permute(1, 2, 0)).resize((side, side)), (x, y))
        draw.rectangle((x, y, x + side - 1, y + side - 1), outline=hue, width=3)
        write(sheet, (x, y + side + 4), name)
    return sheet


def _target(views: Views, size: int, hues: list[Hue], cells: int) -> Image.Image:
    """For the first pair of a size: teacher's crop and student's view with the shared region, and their pooled cells.

    Pixels stand for features here; pooling and rotation are the method's own.
    """
    view, seen = views.groups[size], views.global_crops
    offset = 0 if size == 0 else seen.count
    others = [v for v in range(view.count) if size == 1 or v != 0]
    if not others:
        return new_sheet(900, 1)
    v, g = next((v for v in others if view.rotations[0, v] != seen.rotations[0, 0]), others[0]), 0
    mine, theirs = regions(view, seen)
    upright = _turned(seen)[0, g], _turned(view)[0, v]  # [S, S, 3] as each network gets it, colours left out
    box_t, box_v = theirs[0, g, v], mine[0, v, g]
    target = pool(upright[0].double(), box_t[None], cells)[0]
    turned = rotate_maps(target, view.rotations[0, v] - seen.rotations[0, g])
    student = pool(upright[1].double(), box_v[None], cells)[0]
    k = int(view.rotations[0, v] - seen.rotations[0, g]) % 4
    names = f"G{g + 1}", f"{'G' if size == 0 else 'L'}{v + 1}"
    tiles = [
        (f"teacher sees {names[0]}", _boxed(upright[0], box_t, hues[g], cells)),
        ("the shared region, pooled", _cells(target)),
        (f"target: turned by {90 * k}°", _cells(turned)),
        ("student's cells", _cells(student)),
        (f"student sees {names[1]}", _boxed(upright[1], box_v, hues[offset + v], cells)),
    ]
    sheet = new_sheet(900, 170 + 50)
    write(sheet, (0, 2), f"{names[1]} against {names[0]}: the target is the same region, in the student's orientation")
    for i, (title, tile) in enumerate(tiles):
        x = i * 180 + EDGE
        if tile.size == (168 + 2 * EDGE, 168 + 2 * EDGE):  # with a box, which may go all around
            sheet.paste(tile, (x - EDGE, 26 - EDGE))
        else:
            sheet.paste(tile.resize((168, 168), Image.Resampling.NEAREST), (x, 26))
        write(sheet, (x, 198), title)
    return sheet


def _turned(crops: Crops) -> Tensor:
    """uint8 crops, turned: [B, n, S, S, 3] in [0, 1]."""
    return rotate_maps(crops.pixels.permute(0, 1, 3, 4, 2).float() / 255, crops.rotations)


def _boxed(pixels: Tensor, box: Tensor, hue: Hue, cells: int) -> Image.Image:
    """A crop with a border, so that the box lies around its region even at the edges."""
    picture = new_sheet(168 + 2 * EDGE, 168 + 2 * EDGE)
    picture.paste(to_image(pixels).resize((168, 168)), (EDGE, EDGE))
    zoom = 168 / pixels.shape[0]
    x1, y1, x2, y2 = (EDGE + round(float(v) * zoom) for v in box)
    draw = ImageDraw.Draw(picture)
    for i in range(1, cells):
        x, y = x1 + (x2 - x1) * i / cells, y1 + (y2 - y1) * i / cells
        draw.line((x, y1, x, y2), fill=(255, 255, 255), width=1)
        draw.line((x1, y, x2, y), fill=(255, 255, 255), width=1)
    draw.rectangle((x1 - EDGE, y1 - EDGE, x2 + EDGE - 1, y2 + EDGE - 1), outline=hue, width=EDGE)
    return picture


def _cells(cells: Tensor) -> Image.Image:
    return to_image(cells.float())


def _crops(views: Views, hues: list[Hue]):  # type: ignore[no-untyped-def]
    """(name, box in the image, hue, size) of every crop, global ones first."""
    i = 0
    for size, group in enumerate(views.groups):
        for n, box in enumerate(group.boxes[0].tolist()):
            yield f"{'GL'[size]}{n + 1}", box, hues[i], size
            i += 1


def _hues(count: int) -> list[Hue]:
    colours = [colorsys.hsv_to_rgb(i / count, 0.9, 0.95) for i in range(count)]
    return [(int(255 * r), int(255 * g), int(255 * b)) for r, g, b in colours]
