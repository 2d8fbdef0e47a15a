"""How long a click in gtsa explore takes: requests to its server, from this machine, one after the other.

python benchmarks/explore.py --json benchmarks/results/explore.json

The network is an untrained ViT-S/16 and images have 224 px. The features that are searched are random unit vectors, 196
an image, in a real cache on disk: a search takes as long for any values. The pictures are those of the sample. A click
is the map of the chosen image (look), then the page of nearest images with their maps (gallery).
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import platform
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlencode

import starlette
import torch
import torch.nn.functional as F
import uvicorn

import gtsa
from gtsa.data.sources import open_source
from gtsa.evaluation.explore.extraction import BATCH, Extraction
from gtsa.evaluation.explore.gallery import Images, Network
from gtsa.evaluation.explore.server import Explorer
from gtsa.evaluation.feature_cache import FeatureCache, FileDigests
from gtsa.models.backbone import Backbone

SAMPLE = Path(gtsa.__file__).parent / "data" / "sample" / "images"
GRID, SHARD, CLICKS = (14, 14), 128, 60


class Copies(Images):
    """The images of the sample again and again, each with features of its own."""

    def __init__(self, count: int, folder: Path) -> None:
        super().__init__(open_source(str(SAMPLE)), FileDigests(folder / "files.json"), "")
        self.tiles = len(self.names)
        self.names = [f"{number:05d}/{self.names[number % self.tiles]}" for number in range(count)]

    def digest(self, index: int) -> str:
        return f"{index:032d}"

    def read(self, index: int, side: int | None) -> torch.Tensor:
        return super().read(index % self.tiles, side)


def filled(network: Network, count: int) -> None:
    """Random unit vectors for every image."""
    for first in range(0, count, SHARD):
        numbers = range(first, min(count, first + SHARD))
        rows = F.normalize(torch.randn(len(numbers), *GRID, network.backbone.embed_dim), dim=-1).half()
        network.cache.add({network.images.digest(n): patches for n, patches in zip(numbers, rows, strict=True)})


def quantiles(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    p95 = ordered[min(len(ordered) - 1, round(0.95 * len(ordered)))]
    return {"median_ms": round(1e3 * statistics.median(ordered), 1), "p95_ms": round(1e3 * p95, 1)}


def measure(count: int, folder: Path, backbone: Backbone) -> dict[str, object]:
    images = Copies(count, folder)
    began = time.perf_counter()
    network = Network(images, backbone, "random", FeatureCache(folder / str(count)), 224, torch.device("cpu"))
    filled(network, count)
    size = sum(file.stat().st_size for file in network.cache.folder.iterdir())
    print(f"{count} images: {size / 2**20:.0f} MiB written in {time.perf_counter() - began:.0f} s", flush=True)
    extraction = Extraction(images, [network], FileDigests(folder / "none.json"))
    extraction.run()  # as at a start whose features are all in the cache
    app = Explorer(images, [network], extraction, "").app("t", "c")
    config = uvicorn.Config(app, port=0, log_config=None, access_log=False, lifespan="off", ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    connection = http.client.HTTPConnection("127.0.0.1", server.servers[0].sockets[0].getsockname()[1])

    def ask(name: str, **query: object) -> float:
        began = time.perf_counter()
        connection.request("GET", f"/api/{name}?{urlencode({'token': 't', **query})}")
        answer = connection.getresponse()
        content = answer.read()
        assert answer.status == 200, content
        return time.perf_counter() - began

    draw = random.Random(0)

    def clicks(work: Callable[..., float], number: int = CLICKS) -> dict[str, float]:
        places = [{"image": draw.randrange(count), "y": draw.random(), "x": draw.random()} for _ in range(number)]
        return quantiles([work(**place) for place in places])

    first = ask("gallery", image=0)
    result: dict[str, object] = {
        "images": count,
        "cache_mib": round(size / 2**20),
        "first_search_ms": round(1e3 * first, 1),
        "map_of_the_chosen_image": clicks(lambda **place: ask("look", **place)),
        "nearest_images": clicks(lambda **place: ask("gallery", **place)),
        "whole_click": clicks(lambda **place: ask("look", **place) + ask("gallery", **place)),
        "pca_of_13_images": clicks(lambda **place: ask("gallery", show="pca", order="name", **place), 20),
        "first_look_at_a_rotation": clicks(lambda **place: ask("look", rotation=1, **place), 20),
    }
    server.should_exit = True
    thread.join()
    return result


def extraction(backbone: Backbone, folder: Path) -> float:
    """Images a second whose features are computed and written, decoding included."""
    digests = FileDigests(folder / "digests.json")
    images = Images(open_source(str(SAMPLE)), digests, "")
    network = Network(images, backbone, "random", FeatureCache(folder / "extraction"), 224, torch.device("cpu"))
    network.compute(torch.zeros(BATCH["cpu"], 3, 224, 224, dtype=torch.uint8))
    work = Extraction(images, [network], digests)
    began = time.perf_counter()
    work.run()
    return round(len(images) / (time.perf_counter() - began), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write the result to")
    parser.add_argument("--images", type=int, nargs="+", default=[1_000, 10_000])
    given = parser.parse_args()
    torch.manual_seed(0)
    backbone = Backbone("vit_small_patch16_224").eval()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        result: dict[str, object] = {
            "command": "python benchmarks/explore.py",
            "device": f"CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
            "machine": platform.machine(),
            "load_average_before": round(load, 1),
            "versions": {
                "gtsa": gtsa.__version__, "python": platform.python_version(), "torch": torch.__version__,
                "starlette": starlette.__version__, "uvicorn": uvicorn.__version__,
            },
            "clicks": CLICKS,
            "results": [measure(count, Path(folder), backbone) for count in given.images],
            "images_per_second_extraction": extraction(backbone, Path(folder)),
        }  # fmt: skip
    print(json.dumps(result, indent=1))
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
