"""The picture of gtsa preview: an image, its views, and pooled targets."""

from __future__ import annotations

import colorsys
from collections.abc import Iterator

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from gtsa.core.drawing import GAP, Hue, label_boxes, new_sheet, to_image, write
from gtsa.core.types import Crops, Views
from gtsa.methods.parts.geometry import pool, regions, rotate_maps

EDGE = 3  # width of a box's line, px
TILE = 168  # side of a tile in the rows of targets, px
Rgb = tuple[float, ...]


def preview(image: Tensor, views: Views, augmented: Views, mean: Rgb, std: Rgb, cells: int = 6) -> Image.Image:
    """Draws an image, its crops, and pooled targets beside the student's cells.

    Args:
        image: uint8 [3, H, W].
        views: views as cut (a batch of one).
        augmented: the same views after colours, rotation and normalisation.
        mean, std: of the normalisation.
        cells: pooled cells per side in the rows of targets.
    """
    shift, scale = (torch.tensor(v)[:, None, None] for v in (mean, std))
    pixels = [(crops.pixels[0] * scale + shift).clamp(0, 1) for crops in augmented.groups]
    hues = make_hues(sum(crops.count for crops in views.groups))
    parts = [
        _draw_image(image, views, hues),
        _draw_views(pixels, views, hues),
        *(
            _draw_target(views, size, hues, cells if size == 0 else max(3, cells - 2))
            for size in range(len(views.groups))
        ),
    ]
    sheet = new_sheet(max(p.width for p in parts) + 2 * GAP, sum(p.height + GAP for p in parts) + GAP)
    y = GAP
    for part in parts:
        sheet.paste(part, (GAP, y))
        y += part.height + GAP
    return sheet


def _draw_image(image: Tensor, views: Views, hues: list[Hue]) -> Image.Image:
    """The image with the boxes of its crops, under a line of text."""
    picture = draw_boxes(image, views, hues, min(1.6, 900 / image.shape[-1], 620 / image.shape[-2]))
    sheet = new_sheet(max(picture.width, 900), picture.height + 26)
    write(sheet, (0, 2), "the image, and where its crops were cut (G global, L local)")
    sheet.paste(picture, (0, 26))
    return sheet


def draw_boxes(image: Tensor, views: Views, hues: list[Hue], zoom: float) -> Image.Image:
    """The image, ``zoom`` times as large, with the boxes of its crops."""
    picture = to_image(image.permute(1, 2, 0))
    picture = picture.resize((max(1, round(picture.width * zoom)), max(1, round(picture.height * zoom))))
    draw = ImageDraw.Draw(picture)
    labels = []
    for name, box, hue, size in list_crops(views, hues):
        x1, y1, x2, y2 = (value * zoom for value in box)
        draw.rectangle((x1, y1, x2 - 1, y2 - 1), outline=hue, width=4 if size == 0 else 2)
        labels.append((name, (x1, y1, x2, y2), hue))
    label_boxes(draw, labels)  # above all boxes
    return picture


def _draw_views(pixels: list[Tensor], views: Views, hues: list[Hue]) -> Image.Image:
    """The views as the student sees them."""
    names = [name for name, *_ in list_crops(views, hues)]
    rows, i, y = [], 0, 26
    for size, (tiles, crops) in enumerate(zip(pixels, views.groups, strict=True)):
        side = (200, 100)[size]
        across = 900 // (side + GAP)
        for n, tile in enumerate(tiles):
            corner = (n % across * (side + GAP), y + n // across * (side + 30))
            rows.append((tile, side, corner, f"{names[i]} rotated {90 * int(crops.rotations[0, n])}°", hues[i]))
            i += 1
        y += -(-len(tiles) // across) * (side + 30)
    sheet = new_sheet(900, y)
    write(sheet, (0, 2), "the views as the student sees them: colours augmented, rotated counter-clockwise")
    draw = ImageDraw.Draw(sheet)
    for tile, side, (x, y), name, hue in rows:
        sheet.paste(to_image(tile.permute(1, 2, 0)).resize((side, side)), (x, y))
        draw.rectangle((x, y, x + side - 1, y + side - 1), outline=hue, width=3)
        write(sheet, (x, y + side + 4), name)
    return sheet


def _draw_target(views: Views, size: int, hues: list[Hue], cells: int) -> Image.Image:
    """For one pair: the teacher's crop and the student's view with the shared region, and their pooled cells.

    Pixels stand for features here; pooling and rotation are those of the method.
    """
    view, seen = views.groups[size], views.global_crops
    candidates = [v for v in range(view.count) if size == 1 or v != 0]
    if not candidates:
        return new_sheet(900, 1)
    # the first view whose rotation differs from that of the teacher's first crop
    v, g = next((v for v in candidates if view.rotations[0, v] != seen.rotations[0, 0]), candidates[0]), 0
    in_view, in_seen = (boxes[0] for boxes in regions(view, seen))
    box_seen, box_view = in_seen[g, v], in_view[v, g]
    pixels_seen, pixels_view = rotated(seen)[0, g], rotated(view)[0, v]  # [S, S, 3] as each network gets it
    turns = view.rotations[0, v] - seen.rotations[0, g]
    pooled = pool(pixels_seen.double(), box_seen[None], cells)[0]
    student = pool(pixels_view.double(), box_view[None], cells)[0]
    names = f"G{g + 1}", f"{'G' if size == 0 else 'L'}{v + 1}"
    hue = hues[v if size == 0 else seen.count + v]
    tiles = [
        (f"teacher sees {names[0]}", boxed(pixels_seen, box_seen, hues[g], cells)),
        ("the shared region, pooled", _cells(pooled)),
        (f"target: rotated by {90 * (int(turns) % 4)}°", _cells(rotate_maps(pooled, turns))),
        ("student's cells", _cells(student)),
        (f"student sees {names[1]}", boxed(pixels_view, box_view, hue, cells)),
    ]
    return _row(f"{names[1]} against {names[0]}: the target is the same region, in the student's orientation", tiles)


def _row(title: str, tiles: list[tuple[str, Image.Image]]) -> Image.Image:
    """Tiles beside one another, with their captions."""
    sheet = new_sheet(900, TILE + 2 + 50)
    write(sheet, (0, 2), title)
    for i, (caption, tile) in enumerate(tiles):
        x = i * 180 + EDGE
        if tile.size == (TILE + 2 * EDGE, TILE + 2 * EDGE):  # it has a border, in which its box may lie
            sheet.paste(tile, (x - EDGE, 26 - EDGE))
        else:
            sheet.paste(tile.resize((TILE, TILE), Image.Resampling.NEAREST), (x, 26))
        write(sheet, (x, 198), caption)
    return sheet


def rotated(crops: Crops) -> Tensor:
    """uint8 crops after their rotation: [B, n, S, S, 3] in [0, 1]."""
    return rotate_maps(crops.pixels.permute(0, 1, 3, 4, 2).float() / 255, crops.rotations)


def boxed(pixels: Tensor, box: Tensor, hue: Hue, cells: int) -> Image.Image:
    """A crop with a box and its grid of cells. A border keeps the box outside its region even at the edges."""
    picture = new_sheet(TILE + 2 * EDGE, TILE + 2 * EDGE)
    picture.paste(to_image(pixels).resize((TILE, TILE)), (EDGE, EDGE))
    zoom = TILE / pixels.shape[0]
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


def list_crops(views: Views, hues: list[Hue]) -> Iterator[tuple[str, list[float], Hue, int]]:
    """(name, box in the image, hue, size) of every crop, global ones first."""
    i = 0
    for size, group in enumerate(views.groups):
        for n, box in enumerate(group.boxes[0].tolist()):
            yield f"{'GL'[size]}{n + 1}", box, hues[i], size
            i += 1


def make_hues(count: int) -> list[Hue]:
    colours = [colorsys.hsv_to_rgb(i / count, 0.9, 0.95) for i in range(count)]
    return [(int(255 * r), int(255 * g), int(255 * b)) for r, g, b in colours]
