"""How long does it take to list a data set, to read its headers, and to open it again on resume? And how much memory?

    python benchmarks/scan.py --images 10000 100000 --json runs/scan.json

A folder, a list file and tar shards of N tiny images are made in a temporary folder: hard links to a few files, in
folders of 1,000. Each is scanned in a process of its own as ``gtsa pretrain`` does it in a new run, and opened again as
``--resume`` does it. The files of a folder are in the cache of the system by then. The last line says how the time per
image of the largest set compares with that of the smallest.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

FOLDER = 1_000  # images a folder
LINKS = 30_000  # hard links to one file: file systems allow 65,000
SHARD = 10_000  # images a shard


def make(root: Path, images: int) -> dict[str, str]:
    """{kind: data}, each of ``images`` images."""
    content = encoded()
    folder, shards = root / "images", root / "shards"
    shards.mkdir()
    with open(root / "list.txt", "w") as listed:
        for first in range(0, images, FOLDER):
            part = folder / f"{first // FOLDER:06d}"
            part.mkdir(parents=True)
            for number in range(first, min(images, first + FOLDER)):
                name = part / f"{number:08d}.jpg"
                if number % LINKS == 0:
                    original = name
                    name.write_bytes(content)
                else:
                    os.link(original, name)
                listed.write(f"{name.relative_to(root)}\n")
    for first in range(0, images, SHARD):
        with open(shards / f"{first // SHARD:06d}.tar", "wb") as file:
            for number in range(first, min(images, first + SHARD)):
                member = tarfile.TarInfo(f"{number // FOLDER:06d}/{number:08d}.jpg")
                member.size = len(content)
                file.write(member.tobuf() + content + bytes(-len(content) % 512))
            file.write(bytes(1024))
    return {"folder": str(folder), "list": str(root / "list.txt"), "shards": str(shards)}


def encoded() -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(file, "JPEG", quality=50)
    return file.getvalue()


def measure(data: str, out: str, step: str) -> None:
    """In a process of its own: one step on the data; prints seconds, and peak MB beyond the imports."""
    from gtsa.core import terminal
    from gtsa.data.run_images import ImageSettings, RunImages, scan_images
    from gtsa.data.sources import Selection

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    terminal.say = print
    began, used = time.perf_counter(), time.process_time()
    if step == "scan":
        for name, text in scan_images(data, data, Selection(), 0.01).items():
            Path(out, name).write_text(text)
    else:
        RunImages(data, ImageSettings(out, 0, 100, 0.01, (0, 65535), None), print)
    seconds, cpu = time.perf_counter() - began, time.process_time() - used
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu, "peak_mb": peak / 1024, "imports_mb": before / 1024}))


def rows_of(images: int) -> list[dict[str, Any]]:
    rows = []
    with tempfile.TemporaryDirectory(prefix="gtsa-scan-") as root:
        for kind, data in make(Path(root), images).items():
            out = Path(root, f"run-{kind}")
            out.mkdir()
            for step in ("scan", "resume"):
                command = [sys.executable, __file__, "--measure", data, str(out), step]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                values = json.loads(done.stdout.splitlines()[-1])
                per_image = 1e6 * values["seconds"] / images
                rows.append({"images": images, "data": kind, "step": step, **values, "us_per_image": per_image})
                print(
                    f"{images:>9,}  {kind:7} {step:7} {values['seconds']:7.2f} s (CPU {values['cpu_seconds']:.2f})  "
                    f"{per_image:7.1f} us/image  "
                    f"{values['peak_mb']:6.0f} MB ({values['imports_mb']:.0f} of these are imports)",
                    flush=True,
                )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--json", type=Path, help="file to write the result to")
    parser.add_argument("--measure", nargs=3, metavar=("DATA", "OUT", "STEP"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        measure(*given.measure)
        return
    rows: list[dict[str, Any]] = []
    for images in given.images:
        rows += rows_of(images)
        report(rows, given.json)


def report(rows: list[dict[str, Any]], path: Path | None) -> None:
    """Writes the JSON so far, and prints the last line."""
    ratios = {}
    for kind, step in dict.fromkeys((str(row["data"]), str(row["step"])) for row in rows):
        per_image = [row["us_per_image"] for row in rows if (row["data"], row["step"]) == (kind, step)]
        ratios[f"{kind} {step}"] = per_image[-1] / per_image[0]
    result = {
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "rows": rows,
        "per_image_last_of_first": ratios,
    }
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
    print("time per image, largest of smallest: " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items()))


if __name__ == "__main__":
    main()
