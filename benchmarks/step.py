"""How long does a full-size training step take, and how much of the machine's matrix rate does it reach?

    python benchmarks/step.py --json runs/step.json

One step is what pretraining does: ViT-S/16, 2 x 224 + 8 x 96 px, forward, backward, clipping, AdamW, moving average.
``--profile FILE`` writes what the time of one step goes into, operation by operation, augmentation included.
share_of_matrix_rate = (FLOPs of the step / its time) / (FLOPs of a square matrix product / its time), both measured
alternately in this process at the same precision, medians.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import lightning_fabric
import numpy as np
import timm
import torch
from lightning_fabric import Fabric
from torch.profiler import ProfilerActivity
from torch.utils.flop_counter import FlopCounterMode

import gtsa
from gtsa import augment
from gtsa.backbone import Backbone
from gtsa.core import Crops, Views
from gtsa.data import collate
from gtsa.loop import train_step
from gtsa.methods.gtsa import GTSA
from gtsa.optim import ScheduledAdamW
from gtsa.plan import PRECISIONS
from gtsa.schedules import Constant
from gtsa.views import MultiCrop

KINDS = {"32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def cut_of(batch: int) -> Views:
    """Grey crops with real geometry and colour recipes: what the workers hand to augment.apply."""
    cut = MultiCrop()
    image = torch.full((3, 427, 640), 128, dtype=torch.uint8)
    return collate([cut(image, np.random.default_rng(i)) for i in range(batch)])


def views_of(cut: Views, device: torch.device) -> Views:
    """Noise with the geometry of crops as they were cut: what augment.apply hands to a method."""

    def finish(crops: Crops) -> Crops:
        noise = torch.randn(crops.pixels.shape, device=device)
        return Crops(noise, crops.boxes.to(device), crops.turns.to(device), crops.colours)

    return cut.each(finish)


def seconds(work, device: torch.device) -> float:  # type: ignore[no-untyped-def]
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def profile(step, place: Path, device: torch.device) -> None:  # type: ignore[no-untyped-def]
    """Writes a table of operations by the device's own time, of one step."""
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with torch.profiler.profile(activities=kinds) as seen:
        seconds(step, device)
    order = f"self_{device.type}_time_total"
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(seen.key_averages().table(sort_by=order, row_limit=60, max_name_column_width=90) + "\n")


def measure(model: str, precision: str, batch: int, repeats: int, device: str, table: Path | None) -> dict[str, object]:
    torch.manual_seed(0)
    fabric = Fabric(accelerator=device, devices=1, precision=PRECISIONS[precision])
    method = GTSA(Backbone(model, 224, drop_path=0.1))
    optimizer = ScheduledAdamW(method, Constant(1e-5), Constant(0.04))
    module, wrapped = fabric.setup(method, optimizer)
    module.train()
    cut = cut_of(batch)
    views = views_of(cut, fabric.device)

    def step() -> None:
        train_step(module, wrapped, [views], 1, fabric, 0.5, 0.5)

    side = 2048 if device == "cpu" else 8192
    a, b = (torch.randn(side, side, device=fabric.device, dtype=KINDS[precision]) for _ in range(2))
    with FlopCounterMode(display=False) as counter:
        step()
    flops = counter.get_total_flops()
    torch.mm(a, b)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times, products = [], []
    for _ in range(repeats):
        times.append(seconds(step, fabric.device))
        products += [seconds(lambda: torch.mm(a, b), fabric.device) for _ in range(3)]
    if table:
        mean, std = method.encoders["student"].normalisation  # type: ignore[misc]

        def whole() -> None:
            augment.apply(cut, fabric.device, mean, std)
            step()

        profile(whole, table.with_stem(f"{table.stem}-{precision}"), fabric.device)
    step_time, product_time = statistics.median(times), statistics.median(products)
    rate = 2 * side**3 / product_time
    return {
        "model": model,
        "views": "2 x 224 + 8 x 96",
        "precision": precision,
        "batch": batch,
        "step_seconds": step_time,
        "images_per_second": batch / step_time,
        "step_tflop": flops / 1e12,
        "matrix_tflop_per_second": rate / 1e12,
        "share_of_matrix_rate": flops / step_time / rate,
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None,
        "repeats": repeats,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write the result to")
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--precision", nargs="+", choices=list(KINDS), default=["32", "bf16"])
    parser.add_argument("--batch", type=int, default=0, help="images; 0: 4 on CPU, 128 on a GPU")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--profile", type=Path, help="file for a table of operations; the precision joins its name")
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch = given.batch or (4 if device == "cpu" else 128)
    rows = [
        measure(given.model, precision, batch, given.repeats, device, given.profile) for precision in given.precision
    ]
    result = {
        "command": f"python benchmarks/step.py --batch {batch} --repeats {given.repeats}",
        "device": torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "machine": platform.machine(),
        "versions": {
            "gtsa": gtsa.__version__, "python": platform.python_version(), "torch": torch.__version__,
            "timm": timm.__version__, "lightning_fabric": lightning_fabric.__version__,
        },
        "rows": rows,
    }  # fmt: skip
    for row in rows:
        print(
            f"{row['model']} {row['precision']:>4}: {row['step_seconds']:.2f} s a step of {batch} images, "
            f"{100 * row['share_of_matrix_rate']:.0f} % of the matrix rate"  # type: ignore[operator]
        )
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
