"""gtsa compare as a whole: rows and seeds, resuming, failures."""

import csv
import json
import os
import shutil
import signal
import time

import numpy as np
import pytest
from comparing import SMALL, data, results, run_jobs_here, settings, validate, whole

from forking import fork
from gtsa.comparison import compare, jobs, queue, run_job, stages
from gtsa.comparison.jobs import Job
from gtsa.comparison.results import read_result
from gtsa.comparison.rows import make_rows
from gtsa.comparison.stages import list_final_jobs
from gtsa.core.errors import UserError
from gtsa.core.settings_file import plain_yaml
from gtsa.models.weights import load_backbone

__all__ = ["data", "whole"]  # fixtures


def test_every_row_is_evaluated_with_every_seed(whole):
    lines = list(csv.DictReader((whole / "results.csv").read_text().splitlines()))
    assert list(lines[0]) == ["method", "stage", "seed", "task", "feature", "block", "metric", "value", "n"]
    seen = {(line["method"], line["seed"], line["task"]) for line in lines}
    tasks = ("segmentation", "in_context")
    assert {(m, seed, t) for m in ("gtsa", "dino", "untrained") for seed in "01" for t in tasks} <= seen
    assert ("colour", "0", "in_context") in seen and ("colour", "1", "in_context") not in seen
    assert all(line["n"] == "10" for line in lines if not line["metric"].startswith("smallest difference"))
    by_hand = [float(x["value"]) for x in lines if x["method"] == "dino" and x["metric"] == "mIoU"]
    rows = {line["row"]: line for line in results(whole)["rows"]}
    assert rows["dino"]["metrics"]["primary"]["mean"] == pytest.approx(np.mean(by_hand))
    difference = rows["dino"]["less_reference"]["primary"]["mean"]
    assert difference == pytest.approx(
        rows["dino"]["metrics"]["primary"]["mean"] - rows["gtsa"]["metrics"]["primary"]["mean"]
    )
    assert rows["colour"]["metrics"]["primary"]["low"] is not None  # the interval is over images alone


def test_a_failed_job_is_reported_with_its_reason_and_stops_no_other(whole):
    rows = {line["row"]: line for line in results(whole)["rows"]}
    assert rows["broken"]["seeds"] == [] and "diverged" in rows["broken"]["failed"]["0"]
    page = (whole / "report.html").read_text()
    assert "broken, seed 0: training diverged" in page and rows["gtsa"]["seeds"] == [0, 1]


def test_trained_networks_can_be_loaded(whole):
    folder = whole / "cells/gtsa/images-0"
    backbone, _ = load_backbone(str(folder / "run"))
    assert backbone.fingerprint == json.loads((folder / "result.json").read_text())["weights"]
    with pytest.raises(UserError, match="no weights there"):
        load_backbone(str(folder / "run"), network="student")


def test_finished_jobs_are_kept_and_missing_ones_are_run(whole, data, monkeypatch, tmp_path, capsys):
    more, shared = {"rows": {"broken": {"method": "gtsa", "learning_rate": 1e30}}}, whole
    whole = shutil.copytree(shared, tmp_path / "out")
    before = (whole / "results.json").read_text(), (whole / "report.html").read_text().replace(str(shared), str(whole))
    monkeypatch.setattr(queue, "run_in_process", lambda *_: pytest.fail("all is done"))
    with pytest.raises(UserError, match="failed: broken/images-0"):
        compare.compare(**settings(data, whole, **more))
    assert "all rows and seeds: done, 9 of 9 networks" in capsys.readouterr().out
    assert ((whole / "results.json").read_text(), (whole / "report.html").read_text()) == before
    done = []
    expected = results(whole)
    run_jobs_here(monkeypatch)
    run = run_job.run
    monkeypatch.setattr(run_job, "run", lambda job, config: (done.append(job.name), run(job, config)))
    (whole / "cells/dino/images-1/result.json").unlink()  # as after a kill just before the end
    (whole / "cells/gtsa/images-0/result.json").unlink()
    with pytest.raises(UserError, match="failed: broken/images-0"):
        compare.compare(**settings(data, whole, **more))
    assert done == ["gtsa/images-0", "dino/images-1"]
    assert results(whole) == expected


def test_results_of_other_settings_are_refused(whole, data):
    less = {**SMALL["pretrain"], "gtsa": {"projector_dim": 16, "out_dim": 16}}
    config = validate(data, whole, pretrain=less)
    with pytest.raises(UserError, match=r"made with other settings \(gtsa.predictor_dim: 16, now not given\); give"):
        _ = [read_result(job, config) for job in list_final_jobs(make_rows(config), config)]
    with pytest.raises(UserError, match=r"made with other settings \(steps: 2, now 3\); give another --out") as caught:
        compare.compare(**settings(data, whole, steps=3))
    assert caught.value.code == 4


def test_a_comparison_resumes_after_its_folders_were_moved(data, tmp_path, monkeypatch):
    run_jobs_here(monkeypatch)
    more = {"methods": ("mae",), "seeds": 1, "controls": ("colour",), "train": ("images", "masks")}
    shutil.copytree(data, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    compare.compare(**settings(data, "out", **more) | {"data": "images"})
    (tmp_path / "here").rename(tmp_path / "there")
    monkeypatch.chdir(tmp_path / "there")
    monkeypatch.setattr(queue, "run_in_process", lambda *_: pytest.fail("all is done"))
    compare.compare(**settings(data, "out", **more) | {"data": "images"})
    shutil.copy("images/0.png", "images/10.png")
    jobs._digest_image_names.cache_clear()  # as in a new process
    with pytest.raises(UserError, match=r"other settings \(its images, its tasks, or settings that were not stored\)"):
        compare.compare(**settings(data, "out", **more) | {"data": "images"})


def test_a_killed_comparison_resumes_to_the_same_results(data, tmp_path, monkeypatch, users_samples):
    """tests/long has one that is stopped several times."""
    more = {"controls": (), "seeds": 1, "methods": ("gtsa", "dino"), "pictures": 0, "steps": 10}
    more["pretrain"] = SMALL["pretrain"] | {"log_every": 1, "checkpoint_every": 2}
    file, out = tmp_path / "c.yaml", tmp_path / "killed"
    file.write_text(plain_yaml(settings(data, out, **more)))
    process = fork("compare", "--config", file)
    deadline = time.monotonic() + 200
    while not (out / "cells/gtsa/images-0/run/metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    run_jobs_here(monkeypatch)
    for name in ("killed", "straight"):
        compare.compare(**settings(data, tmp_path / name, **more))
    assert results(tmp_path / "killed") == results(tmp_path / "straight")


def test_tasks_with_the_same_labels_open_them_once(data, tmp_path, monkeypatch):
    images, seen = tmp_path / "images", []
    shutil.copytree(data / "images", images)
    shutil.copy(images / "0.png", images / "without.png")
    monkeypatch.setattr("gtsa.data.labels.masks.say", seen.append)
    paths, tasks = (str(images), str(data / "masks")), ("segmentation", "in_context", "rotation")
    config = validate(data, tmp_path, train=paths, task=tasks)
    counts = [len(task.val) for _, _, task in jobs.open_tasks(Job(make_rows(config)[0], "images", 0), config)]
    assert counts == [10, 10, 10]
    assert seen[0] == "1 of 11 images have no mask and are left out"
    assert [": pixels: " in line for line in seen] == [False, True]


def test_runs_of_equal_operations_have_as_many_operations_as_the_first_method(data, tmp_path, monkeypatch):
    """MAE needs 10 operations per image, GTSA 25: GTSA gets 100 x 10 / 25 steps. The first method has its runs already."""
    flops = {"mae": 10.0, "gtsa": 25.0, "dino": 3.0}

    def make_result(job, config):  # DINO has no result yet; a control has no steps
        name = job.row.name
        if name == "dino":
            return None
        return {"flops_per_image": flops.get(name, 1.0)} | ({"steps": 100} if name in flops else {})

    monkeypatch.setattr(stages, "read_successful_result", make_result)
    config = validate(
        data, tmp_path, methods=("mae", "gtsa", "dino"), controls=("position",), seeds=2, steps=100, equal_flops=True
    )
    flops_jobs = list(stages.list_equal_flops_jobs(make_rows(config), config))
    assert [(job.name, job.changes["steps"]) for job in flops_jobs] == [("gtsa/flops-0", 40), ("gtsa/flops-1", 40)]
    assert list(stages.list_equal_flops_jobs(make_rows(config), config.model_copy(update={"equal_flops": False}))) == []
