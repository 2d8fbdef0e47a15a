"""gtsa compare --only, --cells and --status: training on one machine, evaluation on another, and how far it is."""

import fcntl
import json
import shutil

import pytest
import torch
from comparing import SMALL, data, results, run_jobs_here, settings, validate
from safetensors.torch import load_file

from conftest import run
from gtsa.comparison import compare, jobs
from gtsa.comparison.jobs import Job
from gtsa.comparison.results import commit, folder_of
from gtsa.comparison.rows import make_rows
from gtsa.comparison.status import describe
from gtsa.core.errors import UserError
from gtsa.core.settings_file import plain_yaml

__all__ = ["data"]  # fixtures
MORE = {"methods": ("mae",), "seeds": 2, "controls": ("untrained",), "task": ("in_context",), "pictures": 0}


@pytest.fixture
def here(data, tmp_path, monkeypatch):
    run_jobs_here(monkeypatch)
    return lambda **more: settings(data, tmp_path / "out", **{**MORE, **more})


def files(out, name="*"):
    return sorted(str(path.relative_to(out / "cells")) for path in (out / "cells").glob(f"*/*/{name}"))


def test_training_needs_no_labels_and_evaluation_no_training(here, data, tmp_path, monkeypatch):
    out = tmp_path / "out"
    elsewhere = {"train": ("nowhere/images", "nowhere/masks")}
    compare.compare(**here(only="training", cells=("mae/images-0",), **elsewhere))
    assert files(out, "trained.json") == ["mae/images-0/trained.json"] and not files(out, "result.json")
    assert not (out / "report.html").exists()
    weights = load_file(out / "cells/mae/images-0/teacher/model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}

    with pytest.raises(UserError, match=r"trained.json was made with other settings \(steps: 2, now 3\); give another"):
        compare.compare(**here(only="training", cells=("mae/images-0",), **elsewhere, steps=3))
    shutil.rmtree(out / "cells/mae/images-0/run")  # what comes back from the other machine is the network alone
    monkeypatch.setattr("gtsa.comparison.run_job.pretrain", lambda **_: pytest.fail("it is trained"))
    compare.compare(**here(only="evaluation"))
    assert files(out, "result.json") == [f"{name}/result.json" for name in (
        "mae/images-0", "untrained/images-0", "untrained/images-1",
    )]  # fmt: skip
    rows = {row["row"]: row for row in results(out)["rows"]}
    assert rows["mae"]["seeds"] == [0] and rows["mae"]["costs"]["steps"] == 2
    assert (out / "report.html").exists()


def test_both_halves_give_what_one_call_gives(here, data, tmp_path):
    """To the rounding of the weights: one call evaluates them in single precision."""
    out = tmp_path / "out"
    compare.compare(**here(only="training"))
    compare.compare(**here())  # the other half, and the rows without training
    compare.compare(**here() | {"out": str(tmp_path / "one")})
    one, two = (
        {row["row"]: row["metrics"]["primary"]["mean"] for row in results(folder)["rows"]}
        for folder in (tmp_path / "one", out)
    )
    assert two["untrained"] == one["untrained"] and two["mae"] == pytest.approx(one["mae"], abs=2.0)
    training = json.loads((out / "cells/mae/images-1/trained.json").read_text())["training"]
    result = json.loads((out / "cells/mae/images-1/result.json").read_text())
    assert {name: result[name] for name in training} == training


def test_weights_that_are_lost_are_a_failure_with_advice(here, tmp_path):
    compare.compare(**here(only="training", cells=("mae/images-1",)))
    shutil.rmtree(tmp_path / "out/cells/mae/images-1/teacher")
    with pytest.raises(UserError, match="failed: mae/images-1"):
        compare.compare(**here(only="evaluation"))
    result = json.loads((tmp_path / "out/cells/mae/images-1/result.json").read_text())
    assert "teacher is missing: bring it back, or remove" in result["reason"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"only": "training", "trials": 2}, "trials: needs training and evaluation in one"),
        ({"only": "evaluation", "equal_flops": True}, "equal_flops: needs training and evaluation in one"),
        ({"only": "training", "evaluate_every": 5}, "evaluate_every: needs training and evaluation in one"),
        ({"cells": ("dino/*",)}, r"--cells dino/\*: there is no such network"),
        ({"cells": ("mae/images-2",)}, "the rows are mae, untrained"),
    ],
)
def test_what_cannot_be_halved_or_found_is_refused(here, more, message):
    with pytest.raises(UserError, match=message) as caught:
        compare.compare(**here(**more))
    assert caught.value.code == 2


def test_the_images_of_a_row_are_those_that_are_chosen(data, tmp_path):
    """Other images beside those of --include, on one machine and not on the other, change nothing."""
    include = {"pretrain": SMALL["pretrain"] | {"include": "images"}}
    every, few = tmp_path / "every", tmp_path / "few"
    for folder in (every, few):
        shutil.copytree(data / "images", folder / "images")
    shutil.copytree(data / "images", every / "others")
    digests = set()
    for folder in (every, few):
        config = validate(data, tmp_path / "out", **include).model_copy(update={"data": str(folder)})
        digests.add(jobs.compute_digest(Job(make_rows(config)[0], "images", 0), config))
    assert len(digests) == 1


# Status


def test_the_status_of_each_network(here, data, tmp_path):
    config = validate(data, tmp_path / "out", **MORE)
    job, other = (Job(make_rows(config)[0], "images", seed) for seed in (0, 1))
    folder = folder_of(job, config)
    assert describe(job, config) == ("waiting", "")
    (folder / "run").mkdir(parents=True)
    (folder / "job.json").touch()
    log = folder / "run" / "metrics.jsonl"
    log.write_text('{"step": 1, "seconds": 120.0}\n{"step": 2, "sec')  # killed while it wrote
    assert describe(job, config) == ("stopped", "step 1 of 2, about 2 min 00 s of training left")
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        log.write_text('{"step": 2, "seconds": 120.0}\n')
        assert describe(job, config) == ("running", "all 2 steps are done; its evaluation is not")
    entry = {"task": "in_context", "feature": "patches", "metrics": {"mIoU": 31.2}, "images": 10}
    commit(job, config, {"status": "done", "reason": "", "results": [entry], "seconds_in_all": 61.4})
    folder_of(other, config).mkdir()
    commit(other, config, {"status": "failed", "reason": "training diverged"})
    assert describe(job, config) == ("done", "primary 31.20, 61 s")
    assert describe(other, config) == ("FAILED", "training diverged")


def test_the_command_prints_the_status(here, tmp_path):
    compare.compare(**here(only="training", cells=("mae/images-0",)))
    file = tmp_path / "compare.yaml"
    file.write_text(plain_yaml(here(train=("nowhere/images", "nowhere/masks"))))
    code, out, _ = run("compare", "--config", file, "--only", "training", "--status")  # reads no labels
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert code == 0
    assert "mae/images-0 trained waits for its evaluation" in lines and "mae/images-1 waiting" in lines
    assert "untrained/images-1 waiting" in lines
    code, out, _ = run("compare", "--config", file, "--status", "--cells", "mae/images-0")
    assert "untrained" not in out


# The same method twice


def test_a_method_is_compared_with_itself(here, data, tmp_path):
    again = {"again": {"method": "mae", "seed_offset": 100}}
    config = validate(data, tmp_path / "out", **{**MORE, "rows": again})
    first, second = (row for row in make_rows(config) if row.source is None)
    seeds = [jobs.make_pretrain_settings(Job(row, "images", 1), config)["seed"] for row in (first, second)]
    assert seeds == [1, 101]
    assert "seed_offset" not in jobs.make_pretrain_settings(Job(second, "images", 1), config)
    compare.compare(**here(rows=again))
    rows = {row["row"]: row for row in results(tmp_path / "out")["rows"]}
    assert rows["again"]["seeds"] == [0, 1] and rows["again"]["less_reference"]["primary"]["low"] is not None
    weights = {json.loads((tmp_path / f"out/cells/{row}/images-0/result.json").read_text())["weights"] for row in
               ("mae", "again")}  # fmt: skip
    assert len(weights) == 2


@pytest.mark.parametrize("offset", [-1, True, "7", 2**31])
def test_a_wrong_offset_is_refused(here, offset):
    with pytest.raises(UserError, match=r"rows: again.seed_offset: give a whole number from 0"):
        compare.compare(**here(rows={"again": {"method": "mae", "seed_offset": offset}}))


def test_no_row_has_the_seed_of_the_trials(here):
    rows = {"again": {"method": "mae", "seed_offset": 999}}
    with pytest.raises(
        UserError, match="row again: seed_offset: no final run may have seed 1000, which the trials have"
    ):
        compare.compare(**here(rows=rows, trials=1, folds=3, task=("segmentation",)))


# One evaluation on several sets of images


def test_one_evaluation_on_several_sets_of_images(here, data, tmp_path):
    """The primary metric is the mean over both; the images of a set with groups are drawn by group."""
    (tmp_path / "groups.csv").write_text("path,group\n" + "".join(f"{n}.png,{n // 2}\n" for n in range(10)))
    paths = [str(data / "images"), str(data / "masks")]
    tasks = {
        "fine": {"evaluator": "in_context", "in_context": {"size": 32, "memory": 50}},
        "coarse": {"evaluator": "in_context", "in_context": {"size": 16, "memory": 50}, "train": paths,
                   "val": paths, "folds": None, "groups": str(tmp_path / "groups.csv")},
    }  # fmt: skip
    given = here(task=("fine", "coarse"), tasks=tasks, primary="fine:mIoU+coarse:mIoU")
    compare.compare(**given)
    rows = {row["row"]: row for row in results(tmp_path / "out")["rows"]}
    metrics = rows["mae"]["metrics"]
    assert metrics["primary"]["mean"] == pytest.approx(
        (metrics["fine:mIoU"]["mean"] + metrics["coarse:mIoU"]["mean"]) / 2
    )
    assert metrics["primary"]["images"] == 20  # ten in each set
    entry = json.loads((tmp_path / "out/cells/mae/images-0/result.json").read_text())["results"][1]
    assert entry["task"] == "coarse" and entry["groups"] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_names_of_tasks_are_checked(here):
    with pytest.raises(UserError, match="task: unknown task 'in_contxt'"):
        compare.compare(**here(task=("fine",), tasks={"fine": {"evaluator": "in_contxt"}}))
    with pytest.raises(UserError, match="task: 'a/b' has a /"):
        compare.compare(**here(task=("a/b",), tasks={"a/b": {"evaluator": "in_context"}}))
    with pytest.raises(UserError, match="evaluate_every: fine is a name of this comparison"):
        compare.compare(**here(task=("fine",), tasks={"fine": {"evaluator": "in_context"}}, evaluate_every=1))


def test_metrics_without_a_bootstrap_have_no_interval(here, data, tmp_path):
    """The effective rank of a choice of images is slow to compute, and means little."""
    tasks = {"health": {"health": {"resize": 32, "crop": 32}, "folds": None, "val": str(data / "images")}}
    compare.compare(**here(task=("in_context", "health"), tasks=tasks))
    rows = {row["row"]: row for row in results(tmp_path / "out")["rows"]}
    rank, primary = (rows["mae"]["metrics"][name] for name in ("health:rank", "primary"))
    assert rank["mean"] > 1 and rank["low"] is None and rank["seeds"] == 2
    assert primary["low"] is not None
