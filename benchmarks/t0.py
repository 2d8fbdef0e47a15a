"""Does each switch of GTSA do what it says? Trains test_vit on the embedded sample with each switch, minutes of CPU.

    python benchmarks/t0.py --json benchmarks/results/t0_cpu.json
    python benchmarks/t0.py --rows published H1 --steps 20 --seeds 0

No ranking: 38 tiles and some hundred steps say nothing about what is better. Settings are the demo's, but for steps
and two local crops.
Of the EMA teacher, after the last step:

* shared vector: |mean v|^2 / mean |v|^2, of patch tokens and of pooled target cells as they are compared. 1: all
  vectors are one.
* effective rank (RankMe) of the patch tokens, at most 64.
* rotation accuracy of a linear probe on the mean of the patch tokens and on the CLS token, in five folds; chance 25 %.
* region: the row's own region loss, mean of the last tenth of the steps. Its scale differs between rows.
* region gain: that of the verdict, comparable between rows: cosine with the true region minus cosine with the same
  region of other images, minus its value at step 0, on 8 held-out images.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gtsa
from gtsa.core.seeds import Stream
from gtsa.core.settings_file import read_yaml
from gtsa.core.types import Draw
from gtsa.data.loader import ViewSet
from gtsa.data.sources import open_source
from gtsa.evaluation.evaluators.health import rank_me
from gtsa.methods.gtsa import GTSA
from gtsa.methods.parts.geometry import pairs_of
from gtsa.methods.parts.region_losses import recentred
from gtsa.pretraining.report.network import Network, open_network
from gtsa.pretraining.requested import SAMPLE
from gtsa.pretraining.run_record import read_run
from runs import write

ROWS: dict[str, dict[str, Any]] = {
    "published": {},
    "H1 centred targets": {"center_targets": True},
    "H2 SIGReg": {"regularizer": "sigreg"},
    "H2 variance-covariance": {"regularizer": "vicreg"},
    "H3 InfoNCE": {"region_loss": "infonce"},
    "H4 prototypes": {"region_loss": "prototypes"},
    "H5 rotation from CLS": {"rotation_tokens": "cls"},
    "H5 rotation from a quarter of the channels": {"rotation_channels": 0.25},
    "H6 image loss 0.1": {"image_weight": 0.1},
    "H7 rotation weight 0.1": {"rotation_weight": 0.1},
    "H7 rotation weight to 0 in the second half": {"rotation_decay": (0.5, 1.0)},
    "no rotation loss": {"rotation_weight": 0.0},
}
IMAGES = SAMPLE / "images"
SIDE, FOLDS = 96, 5  # px of the demo's global crops


def train(out: Path, changes: Mapping[str, Any], steps: int, seed: int) -> None:
    demo = read_yaml(SAMPLE / "demo.yaml")
    settings = demo | {"gtsa": demo["gtsa"] | changes, "steps": steps, "seed": seed, "report": False}
    settings["views"] |= {"local_crops_number": 2}
    settings |= {"evaluate_every": steps, "checkpoint_every": steps, "log_every": 1, "workers": 0}
    with contextlib.redirect_stdout(io.StringIO()):
        gtsa.pretrain(str(IMAGES), out=str(out), **settings)


def measure(out: Path, steps: int) -> dict[str, float]:
    network = open_network(read_run(out))
    assert network is not None
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    health = json.loads((out / "health.jsonl").read_text().splitlines()[-1])
    patches = patch_tokens(network)
    values = {
        "shared vector, patch tokens": shared(patches),
        "shared vector, target cells": shared(target_cells(network)),
        "effective rank": rank_me(patches),
        "rotation accuracy, mean of patch tokens": probe(out, "mean"),
        "rotation accuracy, CLS token": probe(out, "cls"),
        "region": statistics.mean(line["region"] for line in lines[-max(1, steps // 10) :]),
        "region gain": health["region_gain"],
    }
    extra = {name: statistics.mean(line[name] for line in lines[-max(1, steps // 10) :])
             for name in ("regularizer", "image", "rotation_accuracy") if name in lines[-1]}  # fmt: skip
    return values | extra


@torch.no_grad()
def patch_tokens(network: Network) -> Tensor:
    """Of all images of the sample: [n, D]."""
    backbone = network.teacher
    images = torch.stack([backbone.transform(path, SIDE) for path in sorted(IMAGES.iterdir())])
    return backbone(images).patches.flatten(0, 2)


@torch.no_grad()
def target_cells(network: Network) -> Tensor:
    """The teacher's pooled cells as they are compared, of one draw of views of each image: [n, C]."""
    method, source = network.method, open_source(str(IMAGES))
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


def probe(out: Path, tokens: str) -> float:
    """Rotation accuracy of a ridge regression, in per cent."""
    settings = {"train": (str(IMAGES),), "folds": FOLDS, "tokens": tokens, "rotation": {"resize": SIDE, "crop": SIDE}}
    with contextlib.redirect_stdout(io.StringIO()):
        report = gtsa.evaluate(str(out / "exports" / "timm"), task="rotation", workers=0, **settings)
    return float(report["results"][0]["metrics"]["rotation accuracy"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write the result to; finished rows in it are kept")
    parser.add_argument("--rows", nargs="+", default=[""], help="only rows that start so, e.g. published H1")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    given = parser.parse_args()
    head = {"model": "test_vit", "steps": given.steps, "images": len(list(IMAGES.iterdir()))}
    results = finished(given.json, head)
    for seed in given.seeds:
        for name in (row for row in ROWS if row.startswith(tuple(given.rows))):
            if any((row["row"], row["seed"]) == (name, seed) for row in results):
                continue
            with tempfile.TemporaryDirectory() as folder:
                train(Path(folder, "run"), ROWS[name], given.steps, seed)
                values = measure(Path(folder, "run"), given.steps)
            results.append({"row": name, "seed": seed, "settings": ROWS[name], "metrics": values})
            write(given.json, {**head, "rows": results})
            print(f"{name}, seed {seed} is done", flush=True)
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
    print(f"\n| row | {' | '.join(names)} |\n{'|---' * (len(names) + 1)}|")
    for name in dict.fromkeys(result["row"] for result in results):
        of_row = [result["metrics"] for result in results if result["row"] == name]
        cells = [", ".join(f"{metrics[key]:.3g}" for metrics in of_row) for key in names]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
