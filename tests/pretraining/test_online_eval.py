"""Evaluations during pretraining: they are logged, the best checkpoint is kept, and the training never notices."""

import importlib
import json
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import gtsa
from conftest import TINY, final_weights
from gtsa.core import stops
from gtsa.core.errors import UserError
from gtsa.core.settings import validated
from gtsa.evaluation import tasks
from gtsa.pretraining.monitor import Monitor
from gtsa.pretraining.online_eval import OnlineEvaluation
from gtsa.pretraining.settings import Pretrain
from gtsa.training import checkpoint

pretraining = importlib.import_module("gtsa.pretraining.pretrain")


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


def test_metrics_are_logged(evaluated):
    lines = [json.loads(line) for line in (evaluated / "evaluations.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 6, 12]
    assert all(line["knn: top1, k = 3"] == 100 for line in lines)


def test_the_best_checkpoint_is_a_run_by_itself(evaluated, coloured):
    checkpoint_folder, problems = checkpoint.newest(evaluated / "best" / "checkpoints")
    assert not problems
    assert checkpoint_folder.name == "step-00000006"  # the first of two that are as good
    actual = gtsa.evaluate(str(evaluated / "best"), "knn", train=(str(coloured),), folds=3, knn={"k": (3,), "crop": 64})
    assert actual["results"][0]["metrics"]["top1, k = 3"] == 100


def test_the_training_never_notices(evaluated, finished):
    mine, reference = (checkpoint.read(checkpoint.newest(f / "checkpoints")[0])[0] for f in (evaluated, finished))
    assert all(torch.equal(mine["objective"][k], reference["objective"][k]) for k in reference["objective"])
    assert final_weights(evaluated) == final_weights(finished)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"eval": ("knn",)}, "eval: give --eval-val IMAGES .LABELS., or --eval-folds N with --eval-train"),
        ({"eval_train": ("x",), "eval_folds": 3}, "eval: name tasks for these images, e.g. knn; choose from "),
        ({"eval": ("nothing",), "eval_val": ("x",)}, "unknown task 'nothing'"),
        ({"keep_best": "knn"}, "knn is not among --eval"),
    ],
)
def test_wrong_settings_are_reported_before_any_training(scenes, tmp_path, settings, words):
    with pytest.raises(UserError, match=words):
        gtsa.pretrain(str(scenes), out=str(tmp_path / "run"), **TINY, **settings)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


class Asked:
    """A question of 50 images, whose per_image is whether a network was right about each."""

    name, val, folds = "knn", range(50), None
    bootstrap = True

    def __init__(self):
        self.evaluator, self.times = self, 0

    def groups(self, seed):
        return None

    def __call__(self, network, *_):
        self.times += 1
        return {"right": network}

    def metrics(self, per_image):
        return {"top1": 100 * float(per_image["right"].double().mean()), "wrong": float((1 - per_image["right"]).sum())}


@pytest.fixture
def question(monkeypatch):
    requested = Asked()
    monkeypatch.setattr(tasks, "open_tasks", lambda _: [requested])
    return requested


def asking(start_counts=True, keep_best="knn"):
    given = {"eval": ("knn",), "eval_val": ("x",), "eval_train": ("x",), "keep_best": keep_best, "out": "x"}
    return OnlineEvaluation(
        validated(Pretrain, {**given, "device": "cpu", "precision": "32", "workers": 0}), start_counts
    )


def right(count):
    return (torch.arange(50) < count).int()


def test_the_choice_says_how_sure_it_is(question):
    online = asking()
    assert online(0, right(30)) == ({"knn: top1": 60.0, "knn: wrong": 20.0}, True)
    assert not online(10, right(30))[1]  # as good is not better
    assert online(20, right(45))[1]
    assert not online(30, right(40))[1]
    message = online.choice(right(30), right(45))
    assert question.times == 4  # nothing is evaluated again
    assert message.startswith("take step 20: knn 90.00, at the start 60.00; +30.00 (95 % interval over images +")
    low, high = (float(word) for word in message.split("images ")[1].rstrip(")").split(" to "))
    gains = 100 * (right(45) - right(30)).double()
    half = 2.0096 * float(gains.std()) / 50**0.5  # Student's t for 50 images
    assert (low, high) == pytest.approx((30 - half, 30 + half), abs=1.5)  # of a bootstrap


def test_after_a_resume_both_networks_are_evaluated_again(question):
    online = asking()
    online.best = 20, 62.0
    message = online.choice(right(30), right(31))
    assert question.times == 2
    assert message.endswith("; not significantly different from the start")


def test_a_choice_that_is_clearly_worse_says_so(question):
    """As after a resume, if the best metric is not reached again."""
    online = asking()
    online.best = 20, 62.0
    assert online.choice(right(40), right(10)).endswith("; worse than the start")


def test_a_start_that_is_untrained_is_no_choice(question):
    online = asking(start_counts=False)
    assert not online(0, right(50))[1]
    assert online(10, right(10))[1]
    assert online.choice(None, right(10)) == "take step 10: knn 20.00"


def test_an_unknown_metric(question):
    with pytest.raises(UserError, match="knn has no such metric; it has top1, wrong"):
        asking(keep_best="knn:top7")(0, right(1))


def test_an_interrupted_evaluation_keeps_no_best_network(question):
    """Its checkpoint was not saved: the look is taken again, and has to find it better again."""
    monitor, online = Monitor.__new__(Monitor), asking()
    online(0, right(20))
    before = online.best

    def evaluate_step(step):
        online(step, right(40))
        raise stops.EvaluationStopped(signal.SIGTERM)

    monitor.online, monitor.trainer, monitor._evaluate = online, SimpleNamespace(missed=False), evaluate_step
    monitor.step_zero = True
    assert monitor._evaluate_unless_stopped(5) is None
    assert monitor.trainer.missed and online.best == before and 5 not in online.per_image
    assert online(5, right(40))[1]


def test_evaluations_during_a_run_are_not_compiled_and_say_so(coloured, tmp_path, capsys):
    config = tmp_path / "eval.yaml"
    config.write_text("compile: on\n")
    given = {"data": "x", "out": "x", "eval": ("linear",), "eval_train": (str(coloured),), "eval_folds": 3}
    for more, said in (({}, False), ({"eval_config": str(config)}, True)):
        online = OnlineEvaluation(validated(Pretrain, {**given, **more, "workers": 0, "precision": "32"}), False)
        assert online.settings.compile == "off"
        assert ("compile has no effect during a run" in capsys.readouterr().out) is said
