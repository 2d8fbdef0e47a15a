"""Does the cost of an image stay the same with the batch, the number of images, and the number of processes?

    python benchmarks/scaling.py --json runs/scaling.json

Batch: the step of a tiny network (test_vit, 48 and 32 px) on tensors in memory, from the smallest batch to the largest.
Images: steps of gtsa pretrain on folders of 1,000 and 10,000 files. Processes: the same batch in one process and in
two, each with one thread. Measured in turn; medians.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch
from lightning_fabric import Fabric

from gtsa.data.batches.loader import collate
from gtsa.data.views.multicrop import MultiCrop
from gtsa.methods.gtsa import GTSA
from gtsa.models.backbone import Backbone
from gtsa.training.loop import train_step
from gtsa.training.optim import ScheduledAdamW
from gtsa.training.schedules import Constant
from runs import link_photos, make_photos, step_seconds, write
from step import seconds, views_of

HEADS = {"projector_dim": 64, "out_dim": 96, "predictor_dim": 64}
TINY = {
    "model": "test_vit", "views.global-crops-size": 48, "views.local-crops-size": 32, "views.local-crops-number": 4,
    **{f"gtsa.{name.replace('_', '-')}": value for name, value in HEADS.items()},
}  # fmt: skip


def batches(sizes: list[int], repeats: int) -> list[dict[str, float]]:
    """Milliseconds an image for each batch size."""
    fabric = Fabric(accelerator="cuda" if torch.cuda.is_available() else "cpu", devices=1)
    torch.manual_seed(0)
    method = GTSA(Backbone("test_vit", 48), **HEADS)
    module, optimizer = fabric.setup(method, ScheduledAdamW(method, Constant(1e-5), Constant(0.04)))
    module.train()
    cut, image = MultiCrop(2, 4, 48, 32), torch.full((3, 72, 96), 128, dtype=torch.uint8)
    drawn = [cut(image, np.random.default_rng(number)) for number in range(max(sizes))]
    views = {size: views_of(collate(drawn[:size]), fabric.device) for size in sizes}
    taken: dict[int, list[float]] = {size: [] for size in sizes}
    for repeat in range(repeats + 1):
        for size in sizes:
            once = seconds(lambda v=views[size]: train_step(module, optimizer, [v], 1, fabric, 0.5, 0.5), fabric.device)
            if repeat:  # the first round warms up
                taken[size].append(once)
    return [{"batch": size, "milliseconds_an_image": 1000 * statistics.median(taken[size]) / size} for size in sizes]


def lengths(photos: Path, folder: Path, counts: list[int], steps: int, repeats: int) -> list[dict[str, float]]:
    """Seconds a step for each number of listed images."""
    data = {count: link_photos(photos, folder / str(count), count) for count in counts}
    taken: dict[int, list[float]] = {count: [] for count in counts}
    for _ in range(repeats):
        for count in counts:
            taken[count].append(step_seconds(data[count], {**TINY, "batch-size": 16, "steps": steps}))
    return [{"images": count, "step_seconds": statistics.median(each)} for count, each in taken.items()]


def processes(photos: Path, counts: list[int], steps: int, repeats: int) -> list[dict[str, float]]:
    """Seconds a step of the same batch for each number of processes, each with one thread."""
    taken: dict[int, list[float]] = {count: [] for count in counts}
    for _ in range(repeats):
        for count in counts:
            settings = {**TINY, "batch-size": 16, "steps": steps, "devices": count}
            taken[count].append(step_seconds(photos, settings, {"OMP_NUM_THREADS": "1"}))
    return [{"processes": count, "step_seconds": statistics.median(each)} for count, each in taken.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write the result to")
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32, 128, 512])
    parser.add_argument("--images", type=int, nargs="+", default=[1_000, 10_000])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=12, help="of each run")
    parser.add_argument("--repeats", type=int, default=2)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        photos = make_photos(Path(folder) / "photos", 32, 96, 72)
        of_batch = batches(given.batches, given.repeats + 1)
        of_images = lengths(photos, Path(folder), given.images, given.steps, given.repeats)
        of_processes = processes(photos, given.processes, given.steps, given.repeats)
    result = {
        "batch": of_batch, "images": of_images, "processes": of_processes,
        "image_in_largest_over_smallest_batch":
            of_batch[-1]["milliseconds_an_image"] / of_batch[0]["milliseconds_an_image"],
        "step_with_most_over_fewest_images": of_images[-1]["step_seconds"] / of_images[0]["step_seconds"],
        "speed_of_most_over_fewest_processes": of_processes[0]["step_seconds"] / of_processes[-1]["step_seconds"],
    }  # fmt: skip
    print(
        f"an image in a batch of {given.batches[-1]} costs {result['image_in_largest_over_smallest_batch']:.2f} times "
        f"that of {given.batches[0]}; a step with {given.images[-1]:,} images listed "
        f"{result['step_with_most_over_fewest_images']:.2f} times that with {given.images[0]:,}; "
        f"{given.processes[-1]} processes are {result['speed_of_most_over_fewest_processes']:.2f} times as fast as "
        f"{given.processes[0]}"
    )
    write(given.json, result)


if __name__ == "__main__":
    main()
