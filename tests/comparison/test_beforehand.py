"""Errors are reported before any training."""

import json
import re

import pytest
from comparing import SMALL, data, run_jobs_here, settings, validate

from gtsa.comparison import compare, jobs, queue
from gtsa.comparison.jobs import Job
from gtsa.comparison.rows import make_rows
from gtsa.comparison.settings import ABLATIONS
from gtsa.core.errors import UserError
from gtsa.core.settings import validated
from gtsa.pretraining.settings import Pretrain

__all__ = ["data"]  # fixtures


def test_a_single_value_is_accepted_for_a_tuple(data, tmp_path, monkeypatch):
    """As in the commands: knn: {k: 3}. Checks before and after the training must agree."""
    config = validate(data, tmp_path, evaluate={"knn": {"k": 3}}, task=("knn",), primary="knn")
    assert jobs.make_evaluator("knn", config).k == (3,)
    assert make_rows(config.model_copy(update={"weights": ("..", "x" * 300)}))[-2].name == "weights"


@pytest.mark.parametrize(
    ("task", "primary"),
    [
        (("knn",), "knn"),
        (("segmentation", "knn"), "segmentation"),
        (("knn", "in_context", "segmentation"), "segmentation:mIoU+in_context:mIoU"),
    ],
)
def test_the_default_primary_metric_follows_the_tasks(task, primary, data, tmp_path):
    config = validate(data, tmp_path, task=task)
    assert config.primary == primary
    assert validate(data, tmp_path, task=task, primary="auto") == config
    again = jobs.job_to_json(Job(make_rows(config)[0], "images", 0), config)
    (tmp_path / "job.json").write_text(again)
    assert jobs.read_job(tmp_path / "job.json")[1] == config


def test_missing_evaluation_images_are_reported_for_the_tasks_that_lack_them(data, tmp_path):
    with pytest.raises(UserError, match="val: give the evaluation images of in_context, or --folds N with --train"):
        validate(data, tmp_path, folds=None, tasks={"segmentation": {"folds": 2}})


def test_distillation_is_a_row(data, tmp_path, monkeypatch):
    run_jobs_here(monkeypatch)
    pretrain = {**SMALL["pretrain"], "distill": {"teacher": "random:test_vit"}}
    compare.compare(**settings(data, tmp_path, methods=("distill",), seeds=1, controls=(), pretrain=pretrain))
    result = json.loads((tmp_path / "cells" / "distill" / "images-0" / "result.json").read_text())
    assert result["status"] == "done" and result["flops_per_image"] > 0


def test_an_unknown_metric_is_reported_before_any_training(data, tmp_path, monkeypatch):
    run_jobs_here(monkeypatch)
    arguments = settings(data, tmp_path, primary="in_context:mIoUU", controls=("position",))
    with pytest.raises(
        UserError, match="--primary in_context:mIoUU: in_context has no metric mIoUU; available: mIoU, mAcc, aAcc"
    ):
        compare.compare(**arguments)
    assert [folder.name for folder in (tmp_path / "cells").iterdir()] == ["position"]


@pytest.mark.parametrize("name", ABLATIONS)
def test_variants_are_valid(name, data, tmp_path):
    config = validate(data, tmp_path, ablate=(name,))
    row = next(row for row in make_rows(config) if row.name == name)
    validated(Pretrain, jobs.make_pretrain_settings(Job(row, "images", 0), config))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"methods": ("gtsa", "nothing")}, "unknown method 'nothing'; available: dino"),
        ({"methods": ("gtsa", "gtsa")}, "each only once"),
        ({"ablate": ("gtsa-no-head",)}, "gtsa-no-rotation"),
        ({"controls": ("magic",)}, "untrained"),
        ({"primary": "knn:top1"}, "not among --task"),
        ({"rows": {"gtsa": {}}}, "two rows have the name gtsa"),
        ({"rows": {"../up": {}}}, "only letters, digits"),
        ({"rows": {"mine": {"stepz": 3}}}, "row mine: stepz: there is no such setting, did you mean steps"),
        ({"learning_rates": (1e-3, 1e-4)}, "low <= high"),
        ({"train": ("nowhere", "nothing")}, "nowhere"),
        ({"data": "nowhere"}, "nowhere"),
        ({"weights": ("nothing.pth",)}, "no weights there"),
        ({"rows": {"mine": {"init": "nothing.pth"}}}, "no weights there"),
        ({"rows": {"mine": {"init": "random:vit_tiny_patch16_224"}}}, "does not fit test_vit"),
        ({"model": "resnet50"}, "no plain vision transformer"),
        ({"tasks": {"knn": {}}}, "tasks: knn is not among --task"),
        ({"methods": ("gtsa",), "ablate": ("dino-rotations",), "trials": 1}, "add dino to --methods"),
        ({"evaluate": {"segmentation": {"size": "x"}}}, "--task segmentation: segmentation.size: 'x'"),
        ({"evaluate": {"knn": {"k": "x"}}}, "--task segmentation: knn.k: 'x'"),
        (
            {"evaluate_every": 1, "folds": None, "val": (), "tasks": {t: {"folds": 2} for t in SMALL["evaluate"]}},
            "evaluate_every: val: give",
        ),
        ({"methods": ("gtsa", "distill")}, "row distill: distill.teacher: is missing; name weights"),
        (
            {"rows": {"small": {"method": "distill", "distill": {"teacher": "nothing.pth"}}}},
            "row small: --distill.teacher: nothing.pth: no weights there",
        ),
        ({"pretrain": {"out": "x"}}, "pretrain: out is set by the comparison; remove it here"),
        ({"pretrain": {"dino": {"momentum": 2.0}}}, "momentum: from 0 to 1"),
        ({"evaluate": {"segmentation": {"stepz": 3}}}, "--task segmentation: segmentation.stepz: there is no such"),
        (
            {"trials": 1},
            "segmentation, in_context: trials are chosen for each fold by inner folds of the other images, so two",
        ),
        (
            {"trials": 1, "folds": 3, "task": ("segmentation", "clusters"), "primary": "segmentation+clusters"},
            "segmentation has 3 folds; clusters uses no training images, so it has no folds. Give another --primary, or --trials 0",
        ),
        (
            {"trials": 1, "folds": 3, "tasks": {"in_context": {"folds": 4}}},
            "segmentation has 3 folds; in_context has 4 folds",
        ),
    ],
)
def test_errors_are_reported_before_any_training(wrong, message, data, tmp_path, monkeypatch):
    monkeypatch.setattr(queue, "run_in_process", lambda *_: pytest.fail("nothing is to be trained"))
    with pytest.raises(UserError, match=re.escape(message)):
        compare.compare(**{**settings(data, tmp_path / "out"), **wrong})
    assert not (tmp_path / "out").exists()
