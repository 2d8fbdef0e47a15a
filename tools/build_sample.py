"""Rebuild the sample data set that ships inside the package, ``src/gtsa/data/sample/``.

What: four aerial images of forest (NEON, 10 cm a pixel) with tree crowns boxed by hand, as 40 m tiles and COCO JSON.
Why: the tests, the quick start and the smoke runs need real images with real labels, and no network.
From: the PyPI package deepforest 2.1.0, which carries the images and the labels. It is read, never imported.
Licence: the images are NEON data (CC0 1.0), the labels are part of deepforest (MIT, (c) 2019 Ben Weinstein);
``src/gtsa/data/sample/NOTICE.md`` says more. That file is written by hand: this script leaves it alone.

How, with Pillow as the only dependency::

    python tools/build_sample.py [WHEEL_OR_INSTALLED_PACKAGE_FOLDER]

The same Pillow gives the same bytes; another JPEG encoder may differ in the last bits.
"""

from __future__ import annotations

import json
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from PIL import Image

SAMPLE = Path(__file__).resolve().parents[1] / "src" / "gtsa" / "data" / "sample"
SOURCES = ("2019_YELL_2_528000_4978000_image_crop2", "2019_YELL_2_541000_4977000_image_crop", "OSBS_029", "SOAP_061")
LABELS = {"Tree", "Alive", "Dead"}  # SOAP_061 tells living from dead trees: both are trees here
CUT, STORED = 400, 256  # side of a tile in px: as cut from the source, and as stored
JPEG: dict[str, Any] = {"quality": 90, "subsampling": 0, "optimize": True}  # baseline; full colour: crowns are small
INFO = {
    "description": "GTSA sample: tree crowns boxed by hand (license 2) in NEON aerial images, see NOTICE.md",
    "version": "1",
    "contributor": "National Ecological Observatory Network (images); Weecology, Ben Weinstein (annotations)",
}
LICENSES = [
    {"id": 1, "name": "CC0 1.0", "url": "https://creativecommons.org/publicdomain/zero/1.0/"},
    {"id": 2, "name": "MIT, Copyright (c) 2019, Ben Weinstein", "url": "https://opensource.org/license/mit"},
]


class Box(NamedTuple):
    """A box in pixels; right and bottom are where it ends."""

    left: int
    top: int
    right: int
    bottom: int

    def centre_in(self, tile: Box) -> bool:
        """Whether the centre is in the tile: every point is in one tile at most, so no box is counted twice."""
        x, y = (self.left + self.right) / 2, (self.top + self.bottom) / 2
        return tile.left <= x < tile.right and tile.top <= y < tile.bottom

    def seen_from(self, tile: Box) -> list[float]:
        """COCO's [x, y, width, height] in px of the stored tile, cut off at its border."""
        left, right = max(self.left, tile.left), min(self.right, tile.right)
        top, bottom = max(self.top, tile.top), min(self.bottom, tile.bottom)
        return [round(v * STORED / CUT, 2) for v in (left - tile.left, top - tile.top, right - left, bottom - top)]


def data_folder(where: str | None) -> Path | zipfile.Path:
    """The data folder of the deepforest package, in a wheel or as installed."""
    if where is None:
        spec = find_spec("deepforest")
        if spec is None or not spec.submodule_search_locations:
            sys.exit("deepforest is not installed: name its wheel, or the folder of the package")
        where = spec.submodule_search_locations[0]
    package = zipfile.Path(where, "deepforest/") if zipfile.is_zipfile(where) else Path(where)
    if not (package / "data").is_dir():
        sys.exit(f"no deepforest package here: {where}")
    return package / "data"


def read(data: Path | zipfile.Path, source: str) -> tuple[Image.Image, list[Box]]:
    """One source image and its boxes, checked against each other."""
    with (data / f"{source}.png").open("rb") as file:
        image = Image.open(file).convert("RGB")
    root = ElementTree.fromstring((data / f"{source}.xml").read_bytes())
    size = tuple(int(root.findtext(f"size/{side}", "0")) for side in ("width", "height"))
    if image.size != size:
        sys.exit(f"{source}: the image is {image.size}, its labels are for {size}")
    boxes = []
    for thing in root.iter("object"):
        box = Box(*(int(thing.findtext(f"bndbox/{edge}", "-1")) for edge in ("xmin", "ymin", "xmax", "ymax")))
        inside = 0 <= box.left < box.right <= image.width and 0 <= box.top < box.bottom <= image.height
        if not inside or box in boxes or thing.findtext("name") not in LABELS:
            sys.exit(f"{source}: box out of the image, given twice or of an unknown label: {box}")
        boxes.append(box)
    return image, boxes


def main(where: str | None = None) -> None:
    """Write the tiles and ``instances.json``, and print the account of the boxes."""
    data, folder = data_folder(where), SAMPLE / "images"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.jpg"):
        old.unlink()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for source in SOURCES:
        image, boxes = read(data, source)
        rows, columns = image.height // CUT, image.width // CUT
        before = len(annotations)
        for row, column in ((row, column) for row in range(rows) for column in range(columns)):
            tile = Box(column * CUT, row * CUT, (column + 1) * CUT, (row + 1) * CUT)
            name, number = f"{source}_{row}_{column}.jpg", len(images) + 1
            pixels = image.crop(tile).resize((STORED, STORED), Image.Resampling.LANCZOS)
            Image.frombytes("RGB", pixels.size, pixels.tobytes()).save(folder / name, **JPEG)  # pixels, no metadata
            images.append({"id": number, "file_name": name, "width": STORED, "height": STORED, "license": 1})
            for x, y, width, height in (box.seen_from(tile) for box in boxes if box.centre_in(tile)):
                annotation = {"id": len(annotations) + 1, "image_id": number, "category_id": 1, "iscrowd": 0}
                annotations.append(annotation | {"bbox": [x, y, width, height], "area": round(width * height, 4)})
        border = Box(0, 0, columns * CUT, rows * CUT)
        kept, outside = len(annotations) - before, sum(not box.centre_in(border) for box in boxes)
        if kept + outside != len(boxes):
            sys.exit(f"{source}: {len(boxes)} boxes read, but {kept} kept and {outside} outside the tiles")
        print(f"{source}: {rows * columns} tiles, {len(boxes)} boxes = {kept} kept + {outside} outside the tiles")
    categories = [{"id": 1, "name": "tree"}]
    coco = {"info": INFO, "licenses": LICENSES, "images": images, "annotations": annotations, "categories": categories}
    (SAMPLE / "instances.json").write_text(json.dumps(coco, separators=(",", ":")) + "\n", encoding="utf-8")
    size = sum(file.stat().st_size for file in SAMPLE.rglob("*") if file.is_file())
    print(f"in all: {len(images)} tiles, {len(annotations)} boxes, {size / 1e6:.2f} MB")


if __name__ == "__main__":
    if len(sys.argv) > 2 or sys.argv[1:2] in (["-h"], ["--help"]):
        sys.exit(__doc__)
    main(*sys.argv[1:])
