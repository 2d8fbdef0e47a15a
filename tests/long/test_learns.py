"""Does it learn what can be learnt? Scenes whose orientation can be seen: bright above, dark below, textured."""

import json

import numpy as np
import pytest
from PIL import Image

import gtsa
from conftest import many_samples

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("users_samples")]

SETTINGS = {
    "model": "test_vit",
    "steps": 800,
    "batch_size": 16,
    "hold_out": 32,
    "learning_rate": 1e-3,
    "evaluate_every": 400,
    "checkpoint_every": 800,
    "seed": 0,
    "views": {"global_crops_size": 96, "local_crops_size": 48, "local_crops_number": 4},
    "gtsa": {"projector_dim": 128, "out_dim": 128, "predictor_dim": 128, "momentum": 0.99},
}


def oriented_scene(seed, side=128):
    """Light falls from above; blobs of all sizes lie about, each lit from above too."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side] / side
    image = 200 - 150 * y + 12 * rng.standard_normal((side, side))
    for _ in range(25):
        cx, cy, r = *rng.random(2), 0.03 + 0.1 * rng.random()
        inside = (x - cx) ** 2 + (y - cy) ** 2 < r * r
        image[inside] = (120 + 100 * (rng.random() - 0.5) - 90 * (y - cy) / r)[inside]
    tint = 0.8 + 0.4 * rng.random(3)
    return Image.fromarray(np.clip(image[..., None] * tint, 0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    data = tmp_path_factory.mktemp("oriented")
    for i in range(160):
        oriented_scene(i).save(data / f"{i:03d}.png")
    with many_samples():
        return gtsa.pretrain(str(data), out=str(tmp_path_factory.mktemp("runs") / "run"), **SETTINGS)


def test_orientation_is_learnt(trained):
    assert trained.verdict.metrics["rotation_accuracy"] > 0.9
    assert trained.verdict.label == "learning"


@pytest.mark.parametrize("what", ["region", "patch"])
def test_regions_and_positions_are_matched_better_than_by_the_untrained_network(trained, what):
    assert trained.verdict.metrics[f"{what}_gain_low"] > 0


def test_dino_does_not_collapse_on_the_sample(tmp_path):
    """The demo with DINO's preset for small data: its loss falls again once the centre has settled, and stays off log K."""
    steps = {"steps": 1000, "learning_rate": 1e-3, "evaluate_every": 250}
    done = gtsa.pretrain(out=str(tmp_path / "run"), method="dino", **steps)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses, entropies = ([line[name] for line in lines] for name in ("loss", "teacher_entropy"))
    highest = max(losses[:50])  # of the first 500 steps; log K is 6.93
    assert np.mean(losses[-10:]) < highest - 0.3
    assert 0.3 < np.mean(entropies[-10:]) < 0.95
    assert done.verdict.metrics["teacher_information"] > 0.05
    assert done.verdict.label == "learning"


def test_dino_with_settings_for_large_data_collapses_on_the_sample_and_the_verdict_reports_it(tmp_path):
    """The published temperatures with a teacher that follows fast."""
    options = {"momentum": 0.99, "teacher_temp": (0.04, 0.07)}
    done = gtsa.pretrain(out=str(tmp_path / "run"), method="dino", steps=250, learning_rate=6e-4, dino=options)
    assert done.verdict.metrics["teacher_information"] < 0.002
    assert done.verdict.label == "collapsing"
