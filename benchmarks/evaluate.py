"""How fast are features extracted, and how do k-NN and in-context retrieval grow with their memory?

    python benchmarks/evaluate.py --json runs/evaluate.json

Extraction: images/s of ViT-S/16 at 224 px through the evaluation's own path, and its FLOPs as a share of the machine's
matrix-product rate, both measured alternately in this process. Retrieval: seconds a query and the memory that is held
beside the vectors themselves, for 10^4, 10^5 and 10^6 vectors, each in a process of its own; linear time means that
``nanoseconds_a_query_and_vector`` stays the same.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from lightning_fabric import Fabric

import gtsa
from gtsa.data.labels import Labelled
from gtsa.data.sources import open_source
from gtsa.evaluation.context import EvalContext
from gtsa.evaluation.features import image_features
from gtsa.evaluation.retrieval import Memory, nearest, votes_of
from gtsa.models.backbone import Backbone

WIDTH, CLASSES, QUERIES = 384, 150, 1024
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Scenes:
    """Noise of 500 x 375 px, as decoded images would come."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.image = torch.randint(0, 256, (375, 500, 3), dtype=torch.uint8).numpy()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> object:
        return self.image


def extraction(images: int) -> dict[str, float]:
    fabric = Fabric(accelerator=DEVICE, devices=1)
    backbone = Backbone("vit_small_patch16_224").to(fabric.device).eval()
    data = Labelled(open_source(Scenes(images)), range(images), [None] * images, "none", (), "")
    lab = EvalContext(fabric, batch_size=32)
    side = 2048 if DEVICE == "cpu" else 8192
    a, b = (torch.randn(side, side, device=fabric.device) for _ in range(2))
    image_features(backbone, data.take(range(32)), lab)
    times, products = [], []
    for _ in range(3):
        began = time.perf_counter()
        image_features(backbone, data, lab)
        times.append(time.perf_counter() - began)
        began = time.perf_counter()
        torch.mm(a, b)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        products.append(time.perf_counter() - began)
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        backbone(torch.zeros(1, 3, 224, 224, device=fabric.device))
    rate = images / statistics.median(times)
    return {
        "images_per_second": rate,
        "share_of_matrix_rate": counter.get_total_flops() * rate * statistics.median(products) / (2 * side**3),
    }


def held() -> float:
    """Most memory that was held so far, MiB."""
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def retrieval(kind: str, size: int) -> dict[str, float]:
    vectors = torch.randn(size, WIDTH, device=DEVICE)
    vectors.div_(vectors.norm(dim=-1, keepdim=True))  # in place: what is held from here on is the search's own
    queries = F.normalize(torch.randn(QUERIES, WIDTH, device=DEVICE), dim=-1)
    classes = torch.randint(CLASSES, (size,), device=DEVICE)
    if kind == "knn":

        def work() -> object:
            similarity, places = nearest(queries, vectors, 20)
            return votes_of(similarity, classes[places], CLASSES, 0.07)
    else:
        memory = Memory(vectors, torch.zeros(size, CLASSES, device=DEVICE).scatter_(1, classes[:, None], 1.0))

        def work() -> object:
            return memory(queries, 30, 0.02)

    before, times = held(), []
    for _ in range(3):
        began = time.perf_counter()
        work()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    each = statistics.median(times) / QUERIES
    return {
        "vectors": size,
        "milliseconds_a_query": 1e3 * each,
        "nanoseconds_a_query_and_vector": 1e9 * each / size,
        "mib_beside_the_vectors": held() - before,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write the result to")
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10**4, 10**5, 10**6])
    parser.add_argument("--one", nargs=2, metavar=("KIND", "SIZE"), help="a single retrieval, printed as JSON")
    given = parser.parse_args()
    if given.one:
        print(json.dumps(retrieval(given.one[0], int(given.one[1]))))
        return
    result: dict[str, object] = {
        "command": "python benchmarks/evaluate.py",
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "machine": platform.machine(),
        "versions": {
            "gtsa": gtsa.__version__, "python": platform.python_version(), "torch": torch.__version__,
            "timm": timm.__version__,
        },
        "extraction": extraction(given.images),
    }  # fmt: skip
    print(f"extraction: {result['extraction']}")
    for kind in ("knn", "in_context"):
        rows = []
        for size in given.sizes:
            command = [sys.executable, __file__, "--one", kind, str(size)]
            rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
            print(f"{kind}: {rows[-1]}", flush=True)
        result[kind] = rows
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
