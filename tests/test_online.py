"""Evaluations during pretraining: they are logged, the best checkpoint is kept, and the training never notices."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import gtsa
from conftest import TINY, final_weights
from gtsa import checkpoint
from gtsa.core import Remedy


@pytest.fixture(scope="module")
def coloured(tmp_path_factory):
    """Class folders that any features tell apart: red and blue, with noise."""
    root, rng = tmp_path_factory.mktemp("data") / "coloured", np.random.default_rng(0)
    for name, colour in (("red", (220, 40, 40)), ("blue", (40, 40, 220))):
        (root / name).mkdir(parents=True)
        for i in range(6):
            pixels = np.array(colour) + rng.normal(0, 20, (64, 64, 3))
            Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, scenes, coloured):
    config = tmp_path_factory.mktemp("config") / "eval.yaml"
    config.write_text("knn: {k: [3], resize: 64, crop: 64}\n")
    out = tmp_path_factory.mktemp("runs") / "evaluated"
    chosen = {"eval": ("knn",), "eval_train": (str(coloured),), "eval_folds": 3, "eval_config": str(config)}
    gtsa.pretrain(str(scenes), out=str(out), keep_best="knn:top1, k = 3", **chosen, **TINY)
    return out


def test_answers_are_logged(evaluated):
    lines = [json.loads(line) for line in (evaluated / "evaluations.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [6, 12]
    assert all(line["knn: top1, k = 3"] == 100 for line in lines)


def test_the_best_checkpoint_is_a_run_by_itself(evaluated, coloured):
    place, problems = checkpoint.newest(evaluated / "best" / "checkpoints")
    assert not problems
    assert place.name == "step-00000006"  # the first of two that are as good
    found = gtsa.evaluate(str(evaluated / "best"), "knn", train=(str(coloured),), folds=3, knn={"k": (3,), "crop": 64})
    assert found["results"][0]["figures"]["top1, k = 3"] == 100


def test_the_training_never_notices(evaluated, scenes, tmp_path):
    gtsa.pretrain(str(scenes), out=str(tmp_path / "run"), **TINY)
    mine, theirs = (checkpoint.read(checkpoint.newest(f / "checkpoints")[0])[0] for f in (evaluated, tmp_path / "run"))
    assert all(torch.equal(mine["objective"][k], theirs["objective"][k]) for k in theirs["objective"])
    assert final_weights(evaluated) == final_weights(tmp_path / "run")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"eval": ("knn",)}, "--eval"),
        ({"eval": ("nothing",), "eval_val": ("x",)}, "there is no 'nothing'"),
        ({"keep_best": "knn"}, "knn is not among --eval"),
    ],
)
def test_mistakes_are_told_before_anything_is_trained(scenes, tmp_path, settings, words):
    with pytest.raises(Remedy, match=words):
        gtsa.pretrain(str(scenes), out=str(tmp_path / "run"), **TINY, **settings)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
