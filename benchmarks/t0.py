"""Does each switch of GTSA do what it says? Trains test_vit with each switch: minutes of CPU in all.

    python benchmarks/t0.py --json benchmarks/results/t0_cpu.json
    python benchmarks/t0.py --rows published H1 --steps 20 --seeds 0

No ranking: so few images and steps say nothing about what is better. Switches against collapse are trained on the
embedded sample, those about rotations on constructed scenes, on which a rotation is learnt in some hundred steps.
Of the EMA teacher, after the last step:

* shared vector: |mean v|^2 / mean |v|^2, of patch tokens and of pooled target cells as they are compared. 1: all
  vectors are one.
* effective rank (RankMe) of the patch tokens, at most 64.
* rotation accuracy of a linear probe on the mean of the patch tokens and on the CLS token, in per cent, in five folds;
  chance is 25 %.
* region: the row's own region loss, mean of the last tenth of the steps. Its scale differs between rows.
* region gain: that of the verdict, comparable between rows of the same images: cosine with the true region minus cosine
  with the same region of other images, minus its value at step 0, on held-out images.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import gtsa
from gtsa.core.seeds import Stream
from gtsa.core.types import Draw
from gtsa.data.batches.loader import ViewSet
from gtsa.data.sources import open_source
from gtsa.evaluation.evaluators.health import rank_me
from gtsa.methods.gtsa import GTSA
from gtsa.methods.parts.geometry import pairs_of
from gtsa.methods.parts.region_losses import recentred
from gtsa.pretraining.report.network import Network, open_network
from gtsa.pretraining.requested import SAMPLE
from gtsa.pretraining.run_record import read_run
from runs import write

ROWS: dict[str, dict[str, dict[str, Any]]] = {
    "sample": {
        "published": {},
        "H1 centred targets": {"center_targets": True},
        "H2 SIGReg": {"regularizer": "sigreg"},
        "H2 variance-covariance": {"regularizer": "vicreg"},
        "H3 InfoNCE": {"region_loss": "infonce"},
        "H4 prototypes": {"region_loss": "prototypes"},
        "H6 image loss 0.1": {"image_weight": 0.1},
    },
    "scenes": {
        "published": {},
        "H5 rotation from CLS": {"rotation_tokens": "cls"},
        "H5 rotation from 1/4 of the channels": {"rotation_channels": 0.25},
        "H6 image loss 0.1": {"image_weight": 0.1},
        "H7 rotation weight 0.1": {"rotation_weight": 0.1},
        "H7 rotation weight falls to 0": {"rotation_decay": (0.5, 1.0)},
        "no rotation loss": {"rotation_weight": 0.0},
    },
}
VIEWS = {  # global and local crops, px
    "sample": {"global_crops_size": 96, "local_crops_size": 48, "local_crops_number": 2},
    "scenes": {"global_crops_size": 64, "local_crops_size": 32, "local_crops_number": 2},
}
TRAINING = {"batch_size": 16, "learning_rate": 1e-3, "hold_out": 8, "report": False, "workers": 0}
HEADS = {"projector_dim": 96, "out_dim": 96, "predictor_dim": 96, "momentum": 0.99}
FOLDS = 5


def make_scene(seed: int, side: int = 128) -> Image.Image:
    """Light falls from above, on noise and on discs of all sizes: weakly, so that it has to be learnt."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side] / side
    image = 150 - 50 * y + 20 * rng.standard_normal((side, side))
    for _ in range(25):
        cx, cy, r = *rng.random(2), 0.03 + 0.1 * rng.random()
        inside = (x - cx) ** 2 + (y - cy) ** 2 < r * r
        image[inside] = (120 + 140 * (rng.random() - 0.5) - 60 * (y - cy) / r)[inside]
    tint = 0.8 + 0.4 * rng.random(3)
    return Image.fromarray(np.clip(image[..., None] * tint, 0, 255).astype(np.uint8))


def make_images(folder: Path) -> dict[str, Path]:
    """The folders of both sets of images."""
    scenes = folder / "scenes"
    scenes.mkdir()
    for number in range(160):
        make_scene(number).save(scenes / f"{number:03d}.png")
    return {"sample": SAMPLE / "images", "scenes": scenes}


def train(data: Path, views: Mapping[str, int], out: Path, changes: Mapping[str, Any], steps: int, seed: int) -> None:
    settings = {
        **TRAINING,
        "model": "test_vit",
        "steps": steps,
        "seed": seed,
        "views": views,
        "gtsa": {**HEADS, **changes},
    }
    settings |= {"evaluate_every": steps, "checkpoint_every": steps, "log_every": 1}
    with contextlib.redirect_stdout(io.StringIO()):
        gtsa.pretrain(str(data), out=str(out), **settings)


def measure(data: Path, out: Path, steps: int) -> dict[str, float]:
    network = open_network(read_run(out))
    assert network is not None
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    health = json.loads((out / "health.jsonl").read_text().splitlines()[-1])
    patches = patch_tokens(network, data)
    values = {
        "shared vector, patch tokens": shared(patches),
        "shared vector, target cells": shared(target_cells(network, data)),
        "effective rank": rank_me(patches),
        "rotation accuracy, mean of patch tokens": probe(network, data, out, "mean"),
        "rotation accuracy, CLS token": probe(network, data, out, "cls"),
        "region": statistics.mean(line["region"] for line in lines[-max(1, steps // 10) :]),
        "region gain": health["region_gain"],
    }
    extra = {name: statistics.mean(line[name] for line in lines[-max(1, steps // 10) :])
             for name in ("regularizer", "image", "rotation_accuracy") if name in lines[-1]}  # fmt: skip
    return values | extra


@torch.no_grad()
def patch_tokens(network: Network, data: Path) -> Tensor:
    """Of all images: [n, D]."""
    backbone = network.teacher
    side = network.settings.views.global_crops_size
    images = torch.stack([backbone.transform(path, side) for path in sorted(data.iterdir())])
    return backbone(images).patches.flatten(0, 2)


@torch.no_grad()
def target_cells(network: Network, data: Path) -> Tensor:
    """The teacher's pooled cells as they are compared, of one draw of views of each image: [n, C]."""
    method, source = network.method, open_source(str(data))
    assert isinstance(method, GTSA)
    views = ViewSet(
        source, range(len(source)), network.settings.multicrop, 0, Stream.VIEWS, network.teacher.normalisation
    )
    batch = views.batch([Draw(0, index) for index in range(len(views))])
    maps, cells = recentred(method.teacher_maps(batch.global_crops), method.teacher_centre), []
    for size, crops in enumerate(batch.groups):
        student, _ = method.student_maps(crops)
        target = method.pooled(student, maps, crops, batch.global_crops, size)[1]
        cells.append(target[:, *pairs_of(size, crops.count, batch.global_crops.count)].flatten(0, 3))
    return torch.cat(cells)


def shared(vectors: Tensor) -> float:
    lifted = vectors.double()
    return float(lifted.mean(0).square().sum() / lifted.square().sum(1).mean())


def probe(network: Network, data: Path, out: Path, tokens: str) -> float:
    """Rotation accuracy of a ridge regression on the central square of each image, in per cent."""
    side = network.settings.views.global_crops_size
    sides = {"resize": 128, "crop": side}
    settings = {"train": (str(data),), "folds": FOLDS, "tokens": tokens, "rotation": sides}
    with contextlib.redirect_stdout(io.StringIO()):
        report = gtsa.evaluate(str(out / "exports" / "timm"), task="rotation", workers=0, **settings)
    return float(report["results"][0]["metrics"]["rotation accuracy"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write the result to; finished rows in it are kept")
    parser.add_argument("--rows", nargs="+", default=[""], help="only rows that start so, e.g. published H1")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    given = parser.parse_args()
    head = {"model": "test_vit", "steps": given.steps}
    results = finished(given.json, head)
    rows = [(images, name) for images in ROWS for name in ROWS[images] if name.startswith(tuple(given.rows))]
    with tempfile.TemporaryDirectory() as temporary:
        folders = make_images(Path(temporary))
        for seed, (images, name) in itertools.product(given.seeds, rows):
            if any((row["images"], row["row"], row["seed"]) == (images, name, seed) for row in results):
                continue
            out = Path(temporary, f"run-{len(results)}")
            train(folders[images], VIEWS[images], out, ROWS[images][name], given.steps, seed)
            values = measure(folders[images], out, given.steps)
            entry = {"images": images, "row": name, "seed": seed, "settings": ROWS[images][name], "metrics": values}
            results.append(entry)
            write(given.json, {**head, "rows": results})
            print(f"{images}, {name}, seed {seed} is done", flush=True)
    show(results)


def finished(file: Path | None, head: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows that an earlier call has written."""
    if file is None or not file.exists():
        return []
    content = json.loads(file.read_text())
    if {key: content[key] for key in head} != head:
        raise SystemExit(f"{file} holds rows of other settings; give another file")
    rows: list[dict[str, Any]] = content["rows"]
    return rows


def show(results: Sequence[Mapping[str, Any]]) -> None:
    """A table; cells hold the values of all seeds."""
    names = list(results[0]["metrics"])[:7]
    print(f"\n| images | row | {' | '.join(names)} |\n{'|---' * (len(names) + 2)}|")
    for images, name in dict.fromkeys((result["images"], result["row"]) for result in results):
        of_row = [result["metrics"] for result in results if (result["images"], result["row"]) == (images, name)]
        cells = [", ".join(f"{metrics[key]:.3g}" for metrics in of_row) for key in names]
        print(f"| {images} | {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
