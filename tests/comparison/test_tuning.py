"""Trials, and the choice of settings."""

import itertools
import math

import pytest
from comparing import SMALL, data, results, run_jobs_here, settings, validate

from gtsa.comparison import compare, conclusions, jobs
from gtsa.comparison.jobs import Job
from gtsa.comparison.results import commit, folder_of, read_result
from gtsa.comparison.rows import make_rows
from gtsa.comparison.stages import list_final_jobs
from gtsa.comparison.tuning import choose_settings, compute_primary, list_trial_jobs, sample_settings, summarise_choices
from gtsa.core.errors import UserError
from gtsa.evaluation.evaluators.segmentation import Segmentation
from gtsa.pretraining.settings import METHODS

__all__ = ["data"]  # fixtures


def commit_trial(job, config, good, without=(), **more):
    """Stores a trial with this primary metric, and the one without the images of each fold; or a failed trial."""
    tasks, inner = ("segmentation", "in_context"), [{"mIoU": value} for value in without]
    entries = [
        {"task": t, "feature": "patches", "metrics": {"mIoU": good}, "images": 10}
        | ({"without": inner} if inner else {})
        for t in tasks
    ]
    result = (
        {"status": "done", "reason": "", "results": entries, **more} if good else {"status": "failed", "reason": "x"}
    )
    folder_of(job, config).mkdir(parents=True)
    commit(job, config, result)


def test_every_method_has_the_same_number_of_reproducible_trials(data, tmp_path):
    config = validate(data, tmp_path, trials=40, methods=("gtsa", "dino", "mae"))
    rows = make_rows(config)
    trials = list(list_trial_jobs(rows, config))
    assert [sum(job.row.name == m for job in trials) for m in ("gtsa", "dino", "mae")] == [40] * 3
    rates = [job.changes["learning_rate"] for job in trials]
    assert 2.5e-4 <= min(rates) < 3e-4 and 8e-4 < max(rates) <= 1e-3 and len(set(rates)) > 100
    once, again, other = (sample_settings(rows[1], number, config) for number in (7, 7, 8))
    assert once == again != other
    seeds = {jobs.make_pretrain_settings(job, config)["seed"] for job in trials}
    assert seeds == {1000}  # otherwise seeds would be chosen, not settings
    for job in trials:
        if job.number == 0:  # the preset, because a few random settings may all be bad
            assert job.changes == {"steps": 1, "learning_rate": 5e-4}
            continue
        assert job.changes[job.row.name].keys() == METHODS[job.row.name].constants["search_space"].keys()


def test_the_best_trial_is_used_by_its_method_and_its_variants(data, tmp_path):
    config = validate(data, tmp_path, trials=3, ablate=("gtsa-no-rotation", "dino-rotations"))
    rows = make_rows(config)
    for job in list_trial_jobs(rows, config):
        commit_trial(job, config, {"gtsa": (1.0, 5.0, 3.0), "dino": (1.0, 2.0, None)}[job.row.name][job.number])
    best = {"gtsa": sample_settings(rows[0], 1, config), "dino": sample_settings(rows[1], 1, config)}
    for row in rows:
        if row.tuned_as:
            assert choose_settings(row, rows, config) == best[row.tuned_as]
    by_name = {
        job.row.name: jobs.make_pretrain_settings(job, config)
        for job in list_final_jobs(rows, config)
        if job.row.source is None
    }
    assert by_name["gtsa-no-rotation"]["learning_rate"] == best["gtsa"]["learning_rate"]
    assert by_name["gtsa-no-rotation"]["views"] == {**SMALL["pretrain"]["views"], "rotations": False}
    assert by_name["dino-rotations"]["dino"] == {**SMALL["pretrain"]["dino"], **best["dino"]["dino"]}
    assert by_name["gtsa"]["seed"] == 1 and "dino" not in by_name["gtsa"]


@pytest.mark.parametrize(("words", "best"), [(("learning", "collapsing"), 0), (("collapsing", "collapsing"), 1)])
def test_a_collapsed_trial_is_chosen_only_if_all_collapsed(data, tmp_path, words, best):
    config = validate(data, tmp_path, trials=2, methods=("dino",))
    rows = make_rows(config)
    for job, good, word in zip(list_trial_jobs(rows, config), (1.0, 2.0), words, strict=True):
        commit_trial(job, config, good, curve=[{"step": 1, "verdict": "learning"}, {"step": 2, "verdict": word}])
    assert choose_settings(rows[0], rows, config) == sample_settings(rows[0], best, config)


def test_the_settings_chosen_by_most_folds_are_used(data, tmp_path):
    config = validate(data, tmp_path, trials=3, folds=3)
    rows = make_rows(config)
    inner = {  # by fold, then over all images; the first trial is the best over all images
        "gtsa": ([1.0, 9.0, 1.0, 9.0], [2.0, 3.0, 4.0, 3.0], [1.0, 1.0, 1.0, 1.0]),
        "dino": ([1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0], [2.0, 2.0, 2.0, 2.0]),
    }
    for job in list_trial_jobs(rows, config):
        *of_folds, good = inner[job.row.name][job.number]
        commit_trial(job, config, good, without=of_folds)
    trials = [(job, read_result(job, config)) for job in list_trial_jobs(rows, config)]
    choices = [{"row": "gtsa", "taken": 1, "of_folds": [1, 0, 1]}, {"row": "dino", "taken": 2, "of_folds": [2, 2, 2]}]
    assert summarise_choices(trials, config) == choices
    assert [choose_settings(row, rows, config) for row in rows[:2]] == [
        sample_settings(rows[0], 1, config),
        sample_settings(rows[1], 2, config),
    ]
    (line,) = conclusions.describe_disagreements(choices)
    assert "gtsa uses the settings of trial 1, chosen by 2 of 3 folds. Without" in line and "0 (fold 2)" in line
    without_folds = [
        (job, {**result, "results": [{k: v for k, v in e.items() if k != "without"} for e in result["results"]]})
        for job, result in trials
    ]
    choices = summarise_choices(without_folds, config)
    assert choices == [{"row": "gtsa", "taken": 0, "of_folds": [0]}, {"row": "dino", "taken": 2, "of_folds": [2]}]
    assert conclusions.describe_disagreements(choices) == []


@pytest.mark.parametrize("metrics", [{}, {"mIoU": math.nan}, {"mAcc": 1.0}])
def test_a_trial_without_a_metric_for_a_fold_is_not_chosen_by_it(data, tmp_path, metrics):
    config = validate(data, tmp_path, trials=2, folds=3, methods=("mae",))
    trials = []
    for job, good in zip(list_trial_jobs(make_rows(config), config), (2.0, 1.0), strict=True):
        commit_trial(job, config, good, without=[good] * 3)
        result = read_result(job, config)
        if job.number == 0:
            result["results"][1]["without"][1] = metrics
        trials.append((job, result))
    assert summarise_choices(trials, config) == [{"row": "mae", "taken": 0, "of_folds": [0, 1, 0]}]


def test_trials_are_chosen_by_inner_folds(data, tmp_path, monkeypatch):
    """With trained networks. Every fold chooses by metrics of the other images, from probes that were not trained on it."""
    run_jobs_here(monkeypatch)
    splits = []
    evaluate = Segmentation.__call__

    def record_split(self, backbone, train, val, context):
        splits.append((set(train.indices), set(val.indices)))
        return evaluate(self, backbone, train, val, context)

    monkeypatch.setattr(Segmentation, "__call__", record_split)
    more = {"folds": 5, "trials": 2, "seeds": 1, "controls": (), "methods": ("mae",), "task": ("segmentation",)}
    compare.compare(**settings(data, tmp_path, **more, primary="segmentation:mIoU"))
    pairs, folds = splits[:10], splits[-5:]
    assert len(splits) == 10 + 10 + 5 and splits[10:20] == pairs
    assert all(not train & val and train | val == set(range(10)) for train, val in splits)
    assert sorted(sorted(val) for _, val in pairs) == sorted(
        sorted(one[1] | other[1]) for one, other in itertools.combinations(folds, 2)
    )
    config = validate(data, tmp_path, **more, primary="segmentation:mIoU")
    trials = [read_result(job, config)["results"][0] for job in list_trial_jobs(make_rows(config), config)]
    good = [[metrics["mIoU"] for metrics in result["without"]] for result in trials]
    assert not list(tmp_path.glob("cells/mae/trial-*/per_image*")) and list(
        tmp_path.glob("cells/mae/images-0/per_image*")
    )
    table = (tmp_path / "report.html").read_text().split("<h2>Trials</h2>")[1]
    assert "<td>steps 1, learning_rate 0.0005</td>" in table and "mae.mask_ratio 0." in table
    (choice,) = results(tmp_path)["choices"]
    assert choice["of_folds"] == [int(second > first) for first, second in zip(*good, strict=True)]


def test_settings_of_a_row_override_its_trials(data, tmp_path):
    config = validate(
        data, tmp_path, rows={"mine": {"method": "gtsa", "learning_rate": 7e-4, "gtsa": {"momentum": 0.5}}}
    )
    row = next(row for row in make_rows(config) if row.name == "mine")
    changes = {"learning_rate": 1e-4, "gtsa": {"momentum": 0.9, "matches": 3}, "steps": 9}
    combined = jobs.make_pretrain_settings(Job(row, "flops", 0, changes), config)
    assert (combined["learning_rate"], combined["steps"]) == (7e-4, 9)
    assert combined["gtsa"] == {**SMALL["pretrain"]["gtsa"], "momentum": 0.5, "matches": 3}


def test_trials_are_evaluated_within_the_training_images(data, tmp_path):
    images, masks = str(data / "images"), str(data / "masks")
    config = validate(data, tmp_path, folds=None, val=(images, masks))
    row = make_rows(config)[0]
    for stage, folds in (("trial", 5), ("images", None)):
        for _, evaluate, task in jobs.open_tasks(Job(row, stage, 0), config):
            assert evaluate.folds == folds
            assert task.val.fingerprint == task.train.fingerprint  # the same images here
            assert bool(task.folds) is (folds is not None)


def test_the_primary_metric_is_the_mean_of_its_parts(data, tmp_path):
    config = validate(data, tmp_path)
    parts = [
        {"task": t, "metrics": {"mIoU": v, "aAcc": 90.0}} for t, v in (("segmentation", 10.0), ("in_context", 30.0))
    ]
    assert compute_primary({"results": parts}, config) == 20
    with pytest.raises(UserError, match="segmentation has no metric mAP; available: mIoU, aAcc"):
        compute_primary({"results": parts}, config.model_copy(update={"primary": "segmentation:mAP"}))
