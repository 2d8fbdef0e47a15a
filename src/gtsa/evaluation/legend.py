"""Which colour is which class, as a strip above a picture."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from gtsa.core.errors import escaped

SIDE, ROW, GAP, SIZE = 12, 20, 14, 13  # px: squares of colour, rows, space between entries, letters
LONGEST = 30  # letters of a name
MOST = 40  # entries; of more the rest is counted


def legend(entries: Sequence[tuple[str, tuple[int, ...]]], width: int) -> Image.Image:
    """Squares of colour with names, in as many rows as they take."""
    font = ImageFont.load_default(SIZE)
    named = [(escaped(name)[:LONGEST], colour) for name, colour in entries[:MOST]]
    if len(entries) > MOST:
        named.append((f"and {len(entries) - MOST} more", (255, 255, 255)))
    places, x, y = [], 4, 4
    for name, _ in named:
        long = SIDE + 4 + round(font.getlength(name))
        if x > 4 and x + long > width:
            x, y = 4, y + ROW
        places.append((x, y))
        x += long + GAP
    sheet = Image.new("RGB", (width, y + ROW if named else 0), "white")
    draw = ImageDraw.Draw(sheet)
    for (name, colour), (x, y) in zip(named, places, strict=True):
        draw.rectangle((x, y, x + SIDE - 1, y + SIDE - 1), fill=colour)
        draw.text((x + SIDE + 4, y - 2), name, "black", font)
    return sheet
