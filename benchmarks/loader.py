"""How long do the views of an image take on one core, beside decoding it and beside plain torchvision transforms?

    OMP_NUM_THREADS=1 python benchmarks/loader.py --json runs/loader.json

Images are mosaics of the sample, 640 x 480 px JPEGs of quality 90. The parts run in turns in one process. Times are of
the processor, medians an image. Ratios are medians of those within a turn, and of the fastest turns. ``plain`` are
Pillow and torchvision's transforms with the same crops and probabilities, one crop after the other, as most training
code has them.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import PIL
import torch
import torchvision
from PIL import Image, features
from torch import Tensor
from torchvision import transforms

import gtsa
from gtsa.data.batches.image_memory import ImageMemory
from gtsa.data.batches.jpeg_cache import JpegCache
from gtsa.data.batches.loader import StepSampler, ViewSet, loader
from gtsa.data.images.decoding import decode
from gtsa.data.sources import open_source
from gtsa.data.views import augment_batch, augment_crop
from gtsa.data.views.multicrop import MultiCrop

SAMPLE = Path(gtsa.__file__).parent / "data" / "sample" / "images"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
VIEWS = MultiCrop()
WORKER = "complete views of a worker process"
OTHERS = ((640, 480, "png"), (1000, 750, "jpg"), (1000, 750, "png"), (2000, 1500, "jpg"), (4000, 3000, "jpg"))
LONG = 4  # epochs of a loader, so that its start counts little


def write_mosaics(folder: Path, count: int) -> list[Path]:
    """Photographs of 640 x 480 px, each of six squares of the sample."""
    tiles = [np.asarray(Image.open(file).convert("RGB")) for file in sorted(SAMPLE.iterdir())]
    paths = []
    for number in range(count):
        chosen = [tiles[i] for i in np.random.default_rng(number).choice(len(tiles), 6, replace=False)]
        rows = [np.concatenate(chosen[first : first + 3], 1) for first in (0, 3)]
        paths.append(folder / f"{number}.jpg")
        Image.fromarray(np.concatenate(rows)[:480, :640]).save(paths[-1], quality=90)
    return paths


def plain_transforms() -> list[tuple[int, Callable[[Image.Image], Tensor]]]:
    """Number of crops, and the transform of each: as they are written with torchvision's first API."""

    def of(side: int, share: tuple[float, float]) -> Callable[[Image.Image], Tensor]:
        jitter = transforms.ColorJitter(VIEWS.brightness, VIEWS.contrast, VIEWS.saturation, VIEWS.hue)
        return transforms.Compose([
            transforms.RandomResizedCrop(side, share, VIEWS.aspect),
            transforms.RandomApply([jitter], VIEWS.color_jitter),
            transforms.RandomGrayscale(VIEWS.grayscale),
            transforms.RandomApply([transforms.GaussianBlur(13, VIEWS.sigma)], VIEWS.gaussian_blur[0]),
            transforms.ToTensor(),
            lambda x: torch.rot90(x, int(torch.randint(4, ())), (-2, -1)),
            transforms.Normalize(MEAN, STD),
        ])  # fmt: skip

    return [
        (VIEWS.global_crops_number, of(VIEWS.global_crops_size, VIEWS.global_crops_scale)),
        (VIEWS.local_crops_number, of(VIEWS.local_crops_size, VIEWS.local_crops_scale)),
    ]


def parts_of(paths: list[Path]) -> dict[str, Callable[[], object]]:
    """What is timed: each does its work on all images."""
    images = [decode(path, VIEWS.detail) for path in paths]
    cut = [VIEWS(image, np.random.default_rng(number)) for number, image in enumerate(images)]
    source, plain = open_source(str(paths[0].parent)), plain_transforms()
    kept = ImageMemory(len(paths), 3 * 640 * 480 * len(paths))
    cache = JpegCache(source, str(paths[0].parent.parent / "cache"), VIEWS)
    sets = {
        "views as cut": ViewSet(source, range(len(paths)), VIEWS, 0),
        "complete views": ViewSet(source, range(len(paths)), VIEWS, 0, normalisation=(MEAN, STD)),
        "complete views, decoded images in memory": ViewSet(
            source, range(len(paths)), VIEWS, 0, normalisation=(MEAN, STD), memory=kept
        ),
    }

    def plain_views() -> None:
        torch.manual_seed(0)
        for path in paths:
            image = Image.open(path).convert("RGB")
            for count, transform in plain:
                torch.stack([transform(image) for _ in range(count)])

    def by_simplejpeg(index: int) -> object:
        return decode(paths[index], VIEWS.detail, decoder="simplejpeg")

    def load(name: str, workers: int = 0) -> None:
        """Batches of 8 images, as a trainer gets them."""
        for _ in loader(sets[name], StepSampler(len(paths), 8, LONG * len(paths) // 8), workers):
            pass

    def one_by_one(read: Callable[[int], object]) -> Callable[[], None]:
        """As a worker does it: an image is gone before the next one is read."""

        def work() -> None:
            for index in range(len(paths)):
                read(index)

        return work

    return {
        "Pillow's decoder": one_by_one(lambda index: np.asarray(Image.open(paths[index]))),
        "decoding": one_by_one(lambda index: decode(paths[index], VIEWS.detail)),
        **({"decoding by simplejpeg": one_by_one(by_simplejpeg)} if importlib.util.find_spec("simplejpeg") else {}),
        "decoding from the cache": one_by_one(lambda index: cache.read(index, VIEWS.detail)),
        "cutting": lambda: [VIEWS(image, np.random.default_rng(n)) for n, image in enumerate(images)],
        "augmenting by crop": lambda: [augment_crop.finish(crops, MEAN, STD) for v in cut for crops in v.groups],
        "augmenting in batches": lambda: [
            augment_batch.finish(crops, MEAN, STD, True, torch.device("cpu")) for v in cut for crops in v.groups
        ],
        **{name: partial(load, name) for name in sets},
        WORKER: lambda: load("complete views", 1),
        "plain": plain_views,
    }


RATIOS = {
    "views as cut / decoding": ("views as cut", "decoding"),
    "decoding / by simplejpeg": ("decoding", "decoding by simplejpeg"),
    "decoding / from the cache": ("decoding", "decoding from the cache"),
    "complete views / decoding": ("complete views", "decoding"),
    "plain / complete views": ("plain", "complete views"),
    "plain / complete views, decoded images in memory": ("plain", "complete views, decoded images in memory"),
    "augmenting in batches / by crop": ("augmenting in batches", "augmenting by crop"),
    "a worker's complete views / complete views": (WORKER, "complete views"),
}


def measure_cache(repeats: int) -> dict[str, float]:
    """Time of decoding a file for its views over that of reading it from the cache, for other sizes and formats."""
    ratios = {}
    with tempfile.TemporaryDirectory() as folder:
        photographs = Path(folder) / "photographs"
        photographs.mkdir()
        for number, path in enumerate(write_mosaics(photographs, len(OTHERS))):
            width, height, suffix = OTHERS[number]
            image = Image.open(path).resize((width, height), Image.Resampling.BICUBIC)
            path.unlink()
            image.save(photographs / f"{number}.{suffix}", quality=90)
        source = open_source(str(photographs))
        cache = JpegCache(source, str(Path(folder) / "cache"), VIEWS)
        for index, (width, height, suffix) in enumerate(OTHERS):
            turns = []
            for _ in range(repeats + 1):
                began = processor_seconds()
                source.read(index, VIEWS.detail)
                half = processor_seconds()
                cache.read(index, VIEWS.detail)
                turns.append((half - began) / (processor_seconds() - half))
            ratios[f"{width} x {height} {suffix}"] = statistics.median(turns[1:])
    return ratios


def processor_seconds() -> float:
    """Of this process and of the workers that have ended. Busy neighbours count little in it."""
    workers = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + workers.ru_utime + workers.ru_stime


def measure(images: int, repeats: int) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as folder:
        photographs = Path(folder) / "photographs"
        photographs.mkdir()
        parts = parts_of(write_mosaics(photographs, images))
        for work in parts.values():
            work()
        turns: list[dict[str, float]] = []
        for _ in range(repeats):
            turns.append({})
            for name, work in parts.items():
                began = processor_seconds()
                work()
                turns[-1][name] = (processor_seconds() - began) / images / (LONG if "views" in name else 1)
    typical = {name: statistics.median(turn[name] for turn in turns) for name in parts}
    least = {name: min(turn[name] for turn in turns) for name in parts}
    pairs = {name: pair for name, pair in RATIOS.items() if set(pair) <= set(parts)}
    return {
        "milliseconds_an_image": {name: 1e3 * seconds for name, seconds in typical.items()},
        "milliseconds_an_image_least": {name: 1e3 * seconds for name, seconds in least.items()},
        "images_per_second": {name: 1 / seconds for name, seconds in typical.items()},
        "ratios": {name: statistics.median(turn[a] / turn[b] for turn in turns) for name, (a, b) in pairs.items()},
        "ratios_of_least": {name: least[a] / least[b] for name, (a, b) in pairs.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write the result to")
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=9)
    given = parser.parse_args()
    torch.set_num_threads(1)
    result = {
        "command": "OMP_NUM_THREADS=1 python benchmarks/loader.py",
        "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores, one used",
        "versions": {
            "gtsa": gtsa.__version__, "python": platform.python_version(), "torch": torch.__version__,
            "torchvision": torchvision.__version__, "pillow": PIL.__version__, "numpy": np.__version__,
            "libjpeg_turbo": features.version("libjpeg_turbo"),
        },
        **measure(given.images, given.repeats),
        "decoding_over_cache": measure_cache(given.repeats),
    }  # fmt: skip
    for name, value in result["milliseconds_an_image"].items():
        print(f"{value:7.2f} ms  {1e3 / value:6.1f} images/s  {name}")
    print("ratios of medians, of the fastest turns")
    for name, value in result["ratios"].items():
        print(f"{value:7.2f}  {result['ratios_of_least'][name]:7.2f}  {name}")
    print("decoding / from the cache")
    for name, value in result["decoding_over_cache"].items():
        print(f"{value:7.2f}     {name}")
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
