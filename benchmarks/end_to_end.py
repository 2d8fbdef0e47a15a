"""Which share of the step's speed reaches training: images a second of gtsa pretrain against those of the step alone.

    python benchmarks/end_to_end.py --json runs/end_to_end.json

The step alone is that of benchmarks/step.py, on tensors in memory: no files, no augmentation. A run reads JPEGs of
640 x 480 px. Both are measured in turn; medians.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from lightning_fabric import Fabric

from gtsa.methods.gtsa import GTSA
from gtsa.models.backbone import Backbone
from gtsa.training.devices import PRECISIONS
from gtsa.training.loop import train_step
from gtsa.training.optim import ScheduledAdamW
from gtsa.training.schedules import Constant
from runs import make_photos, step_seconds, write
from step import cut_of, seconds, views_of


def step_alone(given: argparse.Namespace, device: str) -> Callable[[], float]:
    """A function that takes a step on tensors in memory, and returns its seconds."""
    torch.manual_seed(0)
    fabric = Fabric(accelerator=device, devices=1, precision=PRECISIONS[given.precision])
    module, optimizer = fabric.setup(
        method := GTSA(Backbone(given.model, 224, drop_path=0.1)),
        ScheduledAdamW(method, Constant(1e-5), Constant(0.04)),
    )
    module.train()
    views = views_of(cut_of(given.batch), fabric.device)

    def step() -> None:
        train_step(module, optimizer, [views], 1, fabric, 0.5, 0.5)

    step()
    return lambda: seconds(step, fabric.device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write the result to")
    parser.add_argument("--data", type=Path, help="folder of images; default: photos of 640 x 480 px that are made")
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--precision", choices=list(PRECISIONS), default="32")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8, help="of each run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", default="auto")
    parser.add_argument("--compile", default="off")
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = {
        "model": given.model, "batch-size": given.batch, "steps": given.steps, "precision": given.precision,
        "workers": given.workers, "compile": given.compile,
    }  # fmt: skip
    runs, steps = [], []
    with tempfile.TemporaryDirectory() as folder:
        data = given.data or make_photos(Path(folder) / "photos", max(32, given.batch))
        alone = step_alone(given, device)
        for _ in range(given.repeats):
            steps += [alone() for _ in range(given.steps)]
            runs.append(step_seconds(data, settings))
    run, step = statistics.median(runs), statistics.median(steps)
    print(
        f"{given.model}: gtsa pretrain {given.batch / run:.2f} images/s, the step alone {given.batch / step:.2f}: "
        f"{100 * step / run:.0f} % of it"
    )
    write(
        given.json,
        {
            "model": given.model, "precision": given.precision, "batch": given.batch, "repeats": given.repeats,
            "run_images_per_second": given.batch / run, "step_images_per_second": given.batch / step,
            "share_of_step": step / run,
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
