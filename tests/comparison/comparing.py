"""Shared by the tests of comparisons: small data, small settings, and a finished comparison."""

import json

import numpy as np
import pytest
from PIL import Image

from conftest import shared
from gtsa.comparison import compare, queue, run_job
from gtsa.comparison.results import read_result
from gtsa.comparison.settings import Compare
from gtsa.comparison.tuning import compute_primary
from gtsa.core.errors import UserError
from gtsa.core.settings import validated

SMALL = {
    "model": "test_vit", "steps": 2, "batch_size": 4, "seeds": 2, "controls": ("untrained", "colour"), "pictures": 1,
    "device": "cpu", "folds": 2,
    "pretrain": {
        "views": {"global_crops_size": 32, "local_crops_size": 32, "local_crops_number": 1},
        "gtsa": {"projector_dim": 16, "out_dim": 16, "predictor_dim": 16},
        "dino": {"num_prototypes": 16, "hidden_dim": 16, "bottleneck_dim": 8},
        "mae": {"decoder_dim": 64, "decoder_depth": 1},
        "hold_out": 5,
    },
    "evaluate": {"segmentation": {"size": 32, "steps": 2, "batch_size": 2}, "in_context": {"size": 32, "memory": 50}},
}  # fmt: skip


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Ten images with a dark and a bright half, and masks of the halves."""
    return shared(tmp_path_factory, "halves", make_halves)


def make_halves(folder):
    draw = np.random.default_rng(0)
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for number in range(10):
        mask = np.zeros((40, 40), np.uint8)
        mask[:, draw.integers(10, 30) :] = 1
        pixels = (60 + 120 * mask[..., None] + draw.integers(0, 60, (40, 40, 3))).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{number}.png")


def settings(data, out, **more):
    images = str(data / "images")
    return {**SMALL, "data": images, "train": (images, str(data / "masks")), "out": str(out), **more}


def validate(*arguments, **more):
    return validated(Compare, settings(*arguments, **more))


def run_jobs_here(monkeypatch):
    """Runs jobs in this process, which saves the imports of another one."""

    def run_here(job, config, devices):
        run_job.run(job, config)
        result = read_result(job, config)
        return f"{job.name} {compute_primary(result, config)}" if result and result["status"] == "done" else job.name

    monkeypatch.setattr(queue, "run_in_process", run_here)


def results(out):
    """results.json without time and memory."""
    summary = json.loads((out / "results.json").read_text())
    for row in summary["rows"]:
        for cost in ("minutes", "peak_gib"):
            row["costs"].pop(cost, None)
    return summary


@pytest.fixture(scope="session")
def whole(data, tmp_path_factory):
    """A comparison without interruption. Tests must not change it."""
    return shared(tmp_path_factory, "comparison", lambda out: make_comparison(data, out))


def make_comparison(data, out):
    with pytest.MonkeyPatch.context() as patch:
        run_jobs_here(patch)
        with pytest.raises(
            UserError, match="failed: broken/images-0, broken/images-1; the report has the reasons"
        ) as caught:
            compare.compare(**settings(data, out, rows={"broken": {"method": "gtsa", "learning_rate": 1e30}}))
        assert caught.value.code == 7
