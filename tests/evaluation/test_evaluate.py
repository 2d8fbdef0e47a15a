"""gtsa evaluate as a whole: several tasks, folds, files, and errors with an exit code."""

import csv
import json
import os
import re
import shutil
from dataclasses import replace
from importlib.metadata import version

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image

import gtsa
from conftest import TINY, run_apart
from evaluating import coloured
from gtsa.cli.main import run
from gtsa.core.errors import UserError
from gtsa.core.settings import validated
from gtsa.core.settings_file import read_yaml
from gtsa.data.run_images import RunImages
from gtsa.evaluation import evaluators
from gtsa.evaluation.context import EvalContext
from gtsa.evaluation.evaluators.finetune import Finetune
from gtsa.evaluation.folds import folds_of, joined
from gtsa.evaluation.tasks import Task
from gtsa.models.backbone import Backbone
from gtsa.pretraining.settings import Pretrain

QUICK = {
    "knn": {"k": (3, 1), "resize": 64, "crop": 64},
    "linear": {"steps": 10, "resize": 64, "crop": 64},
    "rotation": {"resize": 64, "crop": 64},
    "health": {"resize": 64, "crop": 64},
    "finetune": {"epochs": 1.0, "warmup": 0.5, "batch_size": 4, "resize": 64, "crop": 64},
}
FLAGS = ["--knn.k", "3", "--knn.resize", "64", "--knn.crop", "64", "--device", "cpu", "--workers", "0"]
WEIGHTS = "random:test_vit"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of 12 and 6 coloured images in three class folders."""
    root = tmp_path_factory.mktemp("labelled")
    for part, count, seed in (("train", 12, 0), ("val", 6, 1)):
        kinds = [i % 3 for i in range(count)]
        for i, (kind, pixels) in enumerate(zip(kinds, coloured(kinds, 64, seed), strict=True)):
            folder = root / part / f"class {'abc'[kind]}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / f"{i:02d}.png")
    return root


def run_evaluation(folders, task, **settings):
    data = {"train": (str(folders / "train"),), "val": (str(folders / "val"),)}
    tasks = (task,) if isinstance(task, str) else task
    quick = {name: QUICK[name] for name in tasks}
    return gtsa.evaluate(WEIGHTS, task, **{**data, **quick, "device": "cpu", "workers": 0, **settings})


def test_a_class_may_be_missing_in_the_evaluation_images(folders, tmp_path, capsys):
    shutil.copytree(folders / "val", tmp_path / "val")
    shutil.rmtree(tmp_path / "val" / "class b")
    report = run_evaluation(folders, "knn", val=(str(tmp_path / "val"),))
    assert report["results"][0]["metrics"]["top1, k = 3"] == 100.0  # a and c keep their names
    assert "--val has no example of class b" in capsys.readouterr().out
    with pytest.raises(UserError, match="--val has classes that --train has no example of: class b"):
        run_evaluation(folders, "knn", train=(str(tmp_path / "val"),), val=(str(folders / "train"),))


def test_a_single_path_or_task_is_accepted_and_so_is_a_path_object(folders, tmp_path):
    usual = run_evaluation(folders, "knn")
    given = {"train": str(folders / "train"), "val": folders / "val", "out": tmp_path / "out.json", "device": "cpu"}
    assert gtsa.evaluate(WEIGHTS, "knn", **given, knn={**QUICK["knn"], "k": 3})["results"][0]["metrics"] == {
        "top1, k = 3": usual["results"][0]["metrics"]["top1, k = 3"]
    }
    assert (tmp_path / "out.json").exists()


def test_a_damaged_image_is_reported_before_a_long_training(folders, tmp_path, monkeypatch):
    shutil.copytree(folders / "val", tmp_path / "val")
    bad = sorted((tmp_path / "val").rglob("*.png"))[2:4]
    for file in bad:
        file.write_bytes(file.read_bytes()[:200])
    monkeypatch.setattr(Finetune, "__call__", lambda *_: pytest.fail("nothing is to be trained"))
    with pytest.raises(UserError, match="2 x image that cannot be read") as caught:
        run_evaluation(folders, "finetune", val=(str(tmp_path / "val"),))
    assert all(str(file.relative_to(tmp_path / "val")) in str(caught.value) for file in bad) and caught.value.code == 3


def test_evaluation_images_that_are_also_training_images_are_reported(folders, capsys):
    run_evaluation(folders, "knn", val=(str(folders / "train"),))
    assert (
        "knn: 12 of 12 evaluation images are also training images: the metrics are too high" in capsys.readouterr().out
    )
    run_evaluation(folders, "knn")
    assert "also training images" not in capsys.readouterr().out


def test_the_report_has_chance_levels_and_counts(folders, tmp_path, capsys):
    report = run_evaluation(folders, ("knn", "linear"), out=str(tmp_path / "out.json"))
    knn, linear = report["results"]
    assert knn["chance"] == {"most frequent class": pytest.approx(100 / 3)}
    assert knn["intervals"]["top1, k = 3"] == (100.0, 100.0) and knn["seconds"] > 0
    assert report["requested"]["task"] == ["knn", "linear"] and report["requested"]["train"] == [str(folders / "train")]
    shown = capsys.readouterr().out
    assert "95 % intervals over images; most frequent class: 33.33 %" in " ".join(shown.split())
    assert "top1, k = 3 100.00 % 100.00 to 100.00" in " ".join(shown.split())
    assert "step 10/" in shown or "ETA 0 s" in shown  # a training tells how far it is, with a folder or without
    assert linear["per_class"] == {}


def test_classes_have_metrics_of_their_own(tmp_path):
    draw = np.random.default_rng(0)
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    for number in range(6):
        mask = draw.integers(0, 3, (4, 4)).repeat(16, 0).repeat(16, 1).astype(np.uint8)
        Image.fromarray(mask).save(tmp_path / "masks" / f"{number}.png")
        Image.fromarray((mask * 80 + draw.integers(0, 9, mask.shape)).astype(np.uint8)).save(
            tmp_path / "images" / f"{number}.png"
        )
    (tmp_path / "names.txt").write_text("ground\nroof\ntree\nnever\n")
    (result,) = gtsa.evaluate(
        WEIGHTS, "in_context", train=(tmp_path / "images", tmp_path / "masks"), folds=2, classes=tmp_path / "names.txt",
        in_context={"size": 64, "k": 3}, device="cpu",
    )["results"]  # fmt: skip
    actual = result["per_class"]["IoU"]
    assert list(actual) == ["ground", "roof", "tree", "never"] and actual["never"] is None
    assert np.mean([v for v in actual.values() if v is not None]) == pytest.approx(result["metrics"]["mIoU"])
    low, high = result["intervals"]["mIoU"]
    assert low < result["metrics"]["mIoU"] < high


def test_a_task_that_fails_does_not_lose_the_results_of_others(folders, tmp_path, monkeypatch):
    def fails(*_):
        raise UserError("it failed", 6)

    monkeypatch.setattr(Finetune, "__call__", fails)
    with pytest.raises(UserError, match="it failed"):
        run_evaluation(folders, ("knn", "finetune"), out=str(tmp_path / "out.json"))
    (result,) = json.loads((tmp_path / "out.json").read_text())["results"]
    assert result["task"] == "knn" and result["metrics"]["top1, k = 3"] == 100.0


def test_results_are_not_overwritten(folders, tmp_path):
    (tmp_path / "out.json").write_text("mine")
    with pytest.raises(UserError, match="already exists"):
        run_evaluation(folders, "knn", out=str(tmp_path / "out.json"))
    with pytest.raises(UserError, match="cannot be written") as caught:
        run_evaluation(folders, "knn", out=str(tmp_path / "out.json" / "x.json"))
    assert caught.value.code == 6
    assert (tmp_path / "out.json").read_text() == "mine"


def stopped(folders, monkeypatch, tmp_path, task, **more):
    """An evaluation that is stopped in ``task``."""
    maker = evaluators.load_all()[task]

    def stops(self, backbone, train, val, context):
        context.on_prediction(0, torch.ones(3))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(maker, "__call__", stops)
        run_evaluation(
            folders, ("knn", task), out=str(tmp_path / "out.json"), predictions=str(tmp_path / "kept"), **more
        )


def test_an_evaluation_that_was_stopped_replaces_its_own_files(folders, tmp_path, monkeypatch):
    """The same command again; its earlier files are not mixed with the new ones."""
    stopped(folders, monkeypatch, tmp_path, "finetune")
    assert json.loads((tmp_path / "out.json").read_text())["unfinished"] == ["finetune"]
    (tmp_path / "kept" / "finetune" / "stale.csv").parent.mkdir(exist_ok=True)
    (tmp_path / "kept" / "finetune" / "stale.csv").write_text("of the one that was stopped")
    for other in ({"seed": 5}, {"val": (str(folders / "train"),)}):
        with pytest.raises(UserError, match="already exists"):
            run_evaluation(folders, ("knn", "finetune"), out=str(tmp_path / "out.json"), **other)
        with pytest.raises(UserError, match="not empty"):
            run_evaluation(folders, ("knn", "finetune"), predictions=str(tmp_path / "kept"), **other)
    run_evaluation(folders, ("knn", "finetune"), out=str(tmp_path / "out.json"), predictions=str(tmp_path / "kept"))
    actual = json.loads((tmp_path / "out.json").read_text())
    assert "unfinished" not in actual and len(actual["results"]) == 2
    kept = sorted(str(p.relative_to(tmp_path / "kept")) for p in (tmp_path / "kept").rglob("*") if p.is_file())
    assert kept == ["finetune/predictions.csv", "knn/predictions.csv"]


def test_predictions_of_two_evaluations_are_not_mixed(folders, tmp_path):
    run_evaluation(folders, "knn", predictions=str(tmp_path / "kept"))
    before = (tmp_path / "kept" / "knn" / "predictions.csv").read_bytes()
    for again in ("knn", "linear"):
        with pytest.raises(UserError, match=r"kept is not empty \(knn\): predictions of two evaluations are not mixed"):
            run_evaluation(folders, again, predictions=str(tmp_path / "kept"), val=(str(folders / "train"),))
    assert [p.name for p in (tmp_path / "kept").iterdir()] == ["knn"]
    assert (tmp_path / "kept" / "knn" / "predictions.csv").read_bytes() == before


def test_a_link_instead_of_predictions_is_not_followed(folders, tmp_path, monkeypatch):
    stopped(folders, monkeypatch, tmp_path, "finetune")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("mine")
    shutil.rmtree(tmp_path / "kept" / "knn")
    (tmp_path / "kept" / "knn").symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match="leads out of the folder") as caught:
        run_evaluation(folders, ("knn", "finetune"), out=str(tmp_path / "out.json"), predictions=str(tmp_path / "kept"))
    assert caught.value.code == 8 and (tmp_path / "mine" / "thesis.tex").exists()


# Images without labels


def test_rotation_needs_images_alone(folders, tmp_path):
    """A flat folder, and nested ones whose names are no classes."""
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, file in enumerate(sorted((folders / "train").rglob("*.png"))):
        shutil.copy(file, flat / f"{number:02d}.png")
    (tmp_path / "nested" / "another folder").mkdir(parents=True)
    for file in list(flat.iterdir())[:4]:
        shutil.copy(file, tmp_path / "nested" / "another folder" / file.name)
    for data, images in (
        ({"train": flat, "val": (), "folds": 3}, 12),
        ({"train": flat, "val": tmp_path / "nested"}, 4),
        ({"train": folders / "train", "val": tmp_path / "nested"}, 4),
    ):
        (result,) = run_evaluation(folders, "rotation", **data)["results"]
        assert result["images"]["evaluated"] == images and "rotation accuracy" in result["metrics"]
        assert not result["chance"]


def test_labels_in_only_one_of_the_sets_are_reported(folders, tmp_path):
    (tmp_path / "labels.csv").write_text("path,label\nclass a/00.png,x\nclass a/03.png,y\n")
    with pytest.raises(UserError, match="--train has no labels, --val classes; give the same kind"):
        run_evaluation(folders, "rotation", val=(str(folders / "train"), str(tmp_path / "labels.csv")))


@pytest.mark.parametrize("part", ["", "exports/timm"])
def test_health_of_a_run_needs_nothing(finished, scenes, tmp_path, capsys, part):
    """The run's own held-out images are used: those that follow from its scan and its seed."""
    small = {"resize": 64, "crop": 64}
    (own,) = gtsa.evaluate(str(finished / part), "health", device="cpu", workers=0, health=small)["results"]
    shown = " ".join(capsys.readouterr().out.split())
    assert f"evaluated on {TINY['hold_out']} held-out images of {finished}" in shown
    assert re.search(
        r"rank \d+\.\d\d effective number of dimensions .* spread \d\.\d\d of their directions; 1: all", shown
    )
    assert own["images"] == {"evaluated": TINY["hold_out"]}
    settings = validated(Pretrain, read_yaml(finished / "config.yaml"))
    pool = RunImages(str(scenes), settings, print)
    for number in pool.held_out:
        shutil.copy(scenes / pool.source.name(number), tmp_path)
    (same,) = gtsa.evaluate(str(finished / part), "health", val=tmp_path, device="cpu", workers=0, health=small)[
        "results"
    ]
    assert own["metrics"]["rank"] == pytest.approx(same["metrics"]["rank"])


@pytest.mark.parametrize(
    ("weights", "words"),
    [(WEIGHTS, "--val is missing: give --val IMAGES, without labels"), ("GONE", "cannot be opened")],
)
def test_health_without_images_says_what_is_needed(finished, tmp_path, weights, words):
    if weights == "GONE":
        weights = str(shutil.copytree(finished, tmp_path / "run"))
        text = (tmp_path / "run" / "config.yaml").read_text()
        (tmp_path / "run" / "config.yaml").write_text(text.replace("data: ", "data: /gone"))
    with pytest.raises(UserError, match=words):
        gtsa.evaluate(weights, "health", device="cpu")


def test_several_tasks_in_one_call(folders, tmp_path):
    report = run_evaluation(
        folders, ("knn", "linear", "rotation", "health"), out=str(tmp_path / "new" / "out.json"), seed=3
    )
    assert json.loads((tmp_path / "new" / "out.json").read_text()) == json.loads(json.dumps(report))
    assert [r["task"] for r in report["results"]] == ["knn", "linear", "rotation", "health"]
    assert report["seed"] == 3 and report["tokens"] == "mean"
    assert report["weights"]["source"] == WEIGHTS and len(report["weights"]["fingerprint"]) == 16
    assert report["versions"]["torch"] == version("torch") and report["versions"]["gtsa"] == gtsa.__version__
    knn, linear, rotation, health = report["results"]
    assert knn["metrics"] == {"top1, k = 3": 100.0, "top1, k = 1": 100.0}
    assert list(linear["metrics"]) == ["top1"]
    assert knn["settings"] == {"k": (3, 1), "temperature": 0.07, "resize": 64, "crop": 64}
    for result in (knn, linear, rotation):
        assert result["images"] == {"evaluated": 6, "trained_on": 12}
    assert health["images"] == {"evaluated": 6}
    assert knn["data"] == linear["data"] and knn["data"]["train"] != knn["data"]["val"]
    assert knn["classes"] == 3


def test_the_same_call_gives_the_same_metrics_and_fingerprints(folders):
    one, again = (run_evaluation(folders, ("knn", "finetune")) for _ in range(2))
    for report in (one, again):
        assert all(result.pop("seconds") > 0 for result in report["results"])
    assert one == again


def test_another_file_name_is_another_data_set(folders, tmp_path):
    moved, renamed = tmp_path / "moved", tmp_path / "renamed"
    for copy in (moved, renamed):
        shutil.copytree(folders / "val", copy)
    (renamed / "class a" / "00.png").rename(renamed / "class a" / "new.png")
    first, second, third = (
        run_evaluation(folders, "knn", val=(str(where),))["results"][0]["data"]["val"]
        for where in (folders / "val", moved, renamed)
    )
    assert first == second != third


@pytest.mark.parametrize("task", ["knn", "linear", "finetune", "rotation"])
def test_folds_evaluate_every_image_once(folders, task, tmp_path):
    report = run_evaluation(folders, task, val=(), folds=4, predictions=str(tmp_path), work=str(tmp_path / "work"))
    (result,) = report["results"]
    assert result["images"] == {"evaluated": 12, "folds": 4}
    assert all(np.isfinite(value) for value in result["metrics"].values())
    if task == "knn":
        assert result["metrics"]["top1, k = 3"] == 100.0
        with open(tmp_path / "knn" / "predictions.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert [r["image"] for r in rows] == sorted(f"class {'abc'[i % 3]}/{i:02d}.png" for i in range(12))
        assert all(r["truth"] == r["prediction"] == r["image"].split("/")[0] for r in rows)


def test_folds_are_a_partition_that_follows_from_the_seed():
    folds = list(folds_of(23, 5, 7))
    assert sorted(i for _, val in folds for i in val) == list(range(23))
    assert all(sorted(train + val) == list(range(23)) for train, val in folds)
    assert {len(val) for _, val in folds} == {4, 5}
    assert folds == list(folds_of(23, 5, 7)) != list(folds_of(23, 5, 8))


class Leaky:
    """An evaluator whose per_image lists its training images."""

    learns = True

    def __call__(self, backbone, train, val, context):
        return {
            "image": torch.tensor(val),
            "learnt": torch.stack([torch.bincount(torch.tensor(train), minlength=99)] * len(val)),
        }

    def metrics(self, per_image):
        return {
            "images": per_image["image"].tolist(),
            "learnt": torch.unique(torch.nonzero(per_image["learnt"])[:, 1]).tolist(),
        }


class Places(list):
    image_groups = ()

    def take(self, indices):
        return Places(self[i] for i in indices)

    def with_range16(self, range16):
        return self


@given(st.lists(st.integers(0, 9), min_size=8, max_size=30), st.integers(2, 3), st.integers(0, 9))
def test_folds_keep_groups_together(labels, folds, seed):
    numbers = [sorted(set(labels)).index(label) for label in labels]
    assume(len(set(numbers)) >= folds)
    parts = list(folds_of(len(numbers), folds, seed, numbers))
    assert sorted(image for _, val in parts for image in val) == list(range(len(numbers)))
    for train, val in parts:
        assert val and not {numbers[i] for i in train} & {numbers[i] for i in val}
        assert sorted(train + val) == list(range(len(numbers)))


@given(st.integers(6, 40), st.integers(3, 6), st.integers(0, 9))
def test_settings_of_a_fold_are_evaluated_on_all_other_images_by_models_not_trained_on_it(images, folds, seed):
    question = Task("leaky", {}, Leaky(), Places(), Places(range(images)), folds, pairs=True)
    per_image = question.per_image(Backbone("test_vit"), EvalContext(None, "mean", seed, 1, 0))
    metrics_of_folds = question.metrics_without_each_fold(per_image, seed)
    assert len(metrics_of_folds) == folds
    for (_, fold), metrics in zip(folds_of(images, folds, seed), metrics_of_folds, strict=True):
        assert sorted(metrics["images"]) == sorted(set(range(images)) - set(fold))
        assert not set(metrics["learnt"]) & set(fold)
    assert replace(question, pairs=False).metrics_without_each_fold(per_image, seed) == []


def test_per_image_results_of_folds_are_joined():
    parts = [{"a": torch.tensor([1, 2]), "b": ["x", "y"], "c": torch.ones(2)}, {"a": torch.tensor([3]), "b": ["z"]}]
    actual = joined(parts)
    assert actual["a"].tolist() == [1, 2, 3] and actual["b"] == ["x", "y", "z"] and set(actual) == {"a", "b"}


def test_predictions_and_pictures(folders, tmp_path):
    run_evaluation(folders, ("knn", "rotation"), predictions=str(tmp_path), pictures=2)
    actual = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert actual == ["knn/pictures/class a/00.png", "knn/pictures/class c/05.png", "knn/predictions.csv"]
    with Image.open(tmp_path / actual[0]) as picture:
        picture.load()


def test_on_the_command_line(folders, tmp_path):
    code, out, err = run_apart(
        "evaluate", WEIGHTS, "--task", "knn", "health", "--train", folders / "train", "--val", folders / "val", *FLAGS,
        "--health.resize", "64", "--health.crop", "64", "--out", tmp_path / "out.json",
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert "knn (6 images, trained on 12;" in out and "100.00" in out and "health (6 images)" in out
    assert [r["task"] for r in json.loads((tmp_path / "out.json").read_text())["results"]] == ["knn", "health"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([WEIGHTS, "--val", "VAL"], 2, "task: give one or several of"),
        ([WEIGHTS, "--task", "guess", "--val", "VAL"], 2, "unknown task 'guess'; the tasks are"),
        ([WEIGHTS, "--task", "knn", "--train", "TRAIN"], 2, "val: give the evaluation images, or --folds"),
        ([WEIGHTS, "--task", "knn", "--val", "VAL"], 2, "give --train IMAGES LABELS"),
        (
            [WEIGHTS, "--task", "knn", "--train", "TRAIN", "--val", "VAL", "--folds", "3"],
            2,
            "folds: needs --train and no --val",
        ),
        ([WEIGHTS, "--task", "knn", "--train", "TRAIN", "--folds", "13"], 2, "there are 12 images"),
        ([WEIGHTS, "--task", "knn", "--train", "TRAIN", "--folds", "1"], 2, "folds"),
        ([WEIGHTS, "--task", "knn", "--train", "NOWHERE", "--val", "VAL"], 3, "there is no such file or folder"),
        (
            [WEIGHTS, "--task", "knn", "--train", "TRAIN", "--val", "VAL", "--pictures", "3"],
            2,
            "give a folder with --predictions",
        ),
        (
            [WEIGHTS, "--task", "knn", "--train", "TRAIN", "--val", "VAL", "--knn.k", "13"],
            2,
            "there are 12 training images",
        ),
        ([WEIGHTS, "--task", "knn", "--train", "TRAIN", "--val", "VAL", "--knn.k", "0"], 2, "k must be at least 1"),
        (
            [WEIGHTS, "--task", "knn", "--train", "TRAIN", "--val", "VAL", "--knn.neighbours", "3"],
            2,
            "--knn.neighbours",
        ),
        ([WEIGHTS, "--task", "linear", "--train", "TRAIN", "--val", "VAL", "--linear.steps", "many"], 2, "steps"),
        (
            [WEIGHTS, "--task", "finetune", "--train", "TRAIN", "--val", "VAL", "--finetune.batch-size", "3"],
            2,
            "multiple of 2",
        ),
        (["NOWHERE", "--task", "knn", "--train", "TRAIN", "--val", "VAL"], 4, "no weights there"),
        (["random:vit_none", "--task", "knn", "--train", "TRAIN", "--val", "VAL"], 2, "has no model 'vit_none'"),
        ([WEIGHTS, "--task", "knn", "--train", "TRAIN", "--val", "VAL", "--device", "cuda"], 6, "no GPU"),
        (
            [WEIGHTS, "--task", "knn", "--train", "TRAIN", "--val", "VAL", "--predictions", "FILE"],
            6,
            "cannot be written",
        ),
        (
            [WEIGHTS, "--task", "knn", "--train", "TRAIN", "--val", "VAL", "--out", "FILE/x.json"],
            6,
            "cannot be written",
        ),
    ],
)
def test_errors_have_a_message_and_an_exit_code(folders, tmp_path, capsys, arguments, code, message):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    (tmp_path / "file").write_text("")
    words = {
        "TRAIN": folders / "train",
        "VAL": folders / "val",
        "NOWHERE": tmp_path / "nowhere",
        "FILE": tmp_path / "file",
    }
    given = [str(words.get(a, a)).replace("FILE", str(tmp_path / "file")) for a in arguments]
    flags = [] if "--device" in given else ["--device", "cpu"]
    if "--knn.k" not in given:
        flags += ["--knn.k", "3"]
    small = ["--knn.resize", "64", "--knn.crop", "64", "--workers", "0"]
    assert run(["evaluate", *given, *flags, *small]) == code
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("workers", ["0", "1"])
def test_an_image_that_cannot_be_read_is_named(folders, tmp_path, capsys, workers):
    shutil.copytree(folders / "val", tmp_path / "val")
    whole = (folders / "val" / "class b" / "01.png").read_bytes()
    (tmp_path / "val" / "class b" / "01.png").write_bytes(whole[: len(whole) // 2])
    data = ["--train", str(folders / "train"), "--val", str(tmp_path / "val")]
    assert run(["evaluate", WEIGHTS, "--task", "knn", *data, *FLAGS[:-1], workers]) == 3
    message = capsys.readouterr().err
    assert message.startswith("gtsa: class b/01.png: damaged") and "Traceback" not in message


def test_train_and_val_of_other_classes_are_refused(folders, tmp_path):
    shutil.copytree(folders / "val", tmp_path / "val")
    (tmp_path / "val" / "class c").rename(tmp_path / "val" / "class d")
    with pytest.raises(UserError, match="no example of: class d") as caught:
        run_evaluation(folders, "knn", val=(str(tmp_path / "val"),))
    assert caught.value.code == 3
