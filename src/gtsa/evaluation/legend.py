"""Which colour is which class, as a strip above a picture."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from gtsa.core.errors import escaped

SIDE, ROW, GAP, SIZE = 12, 20, 14, 13  # px: squares of colour, rows, space between entries, letters
LONGEST = 30  # letters of a name
MOST = 40  # entries; the others are counted


def legend(entries: Sequence[tuple[str, tuple[int, ...]]], width: int) -> Image.Image:
    """Squares of colour with names, in as many rows as they need."""
    font = ImageFont.load_default(SIZE)
    shown = [(escaped(name)[:LONGEST], colour) for name, colour in entries[:MOST]]
    if len(entries) > MOST:
        shown.append((f"and {len(entries) - MOST} more", (255, 255, 255)))
    positions, x, y = [], 4, 4
    for name, _ in shown:
        length = SIDE + 4 + round(font.getlength(name))
        if x > 4 and x + length > width:
            x, y = 4, y + ROW
        positions.append((x, y))
        x += length + GAP
    sheet = Image.new("RGB", (width, y + ROW if shown else 0), "white")
    draw = ImageDraw.Draw(sheet)
    for (name, colour), (x, y) in zip(shown, positions, strict=True):
        draw.rectangle((x, y, x + SIDE - 1, y + SIDE - 1), fill=colour)
        draw.text((x + SIDE + 4, y - 2), name, "black", font)
    return sheet
