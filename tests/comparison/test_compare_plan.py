"""gtsa compare --plan: the networks that would be trained and evaluated; nothing is written."""

import re

import pytest
from comparing import SMALL, data, run_jobs_here, settings, whole

from conftest import run
from gtsa.comparison import compare, queue, report
from gtsa.comparison.results import commit, folder_of
from gtsa.core.errors import UserError
from gtsa.core.settings_file import plain_yaml

__all__ = ["data", "whole"]  # fixtures


@pytest.fixture
def plan(tmp_path):
    """Prints the plan of a comparison through the command line: {first words of a line: the rest}."""

    def read(**given):
        file = tmp_path / "compare.yaml"
        file.write_text(plain_yaml(given))
        code, out, err = run("compare", "--config", file, "--plan")
        assert (code, err) == (0, "")
        lines = out[re.search("^plan", out, re.MULTILINE).end() :].strip().splitlines()
        columns = [re.split(r"  +", line.strip()) for line in lines if not line.startswith(" ")]  # not wrapped lines
        return {name: " ".join(rest) for name, *rest in columns}

    return read


def commit_at_once(monkeypatch):
    """Stores results of jobs without training. MAE has fewer operations than others; controls have none."""

    def commit_job(job, config, devices):
        trained = {"steps": 2, "flops_per_image": 10.0 if job.row.name == "mae" else 25.0}
        entry = {"task": "in_context", "feature": "patches", "metrics": {"mIoU": 1.0}, "images": 10}
        result = {"status": "done", "reason": "", "results": [entry | {"without": 3 * [{"mIoU": 1.0}]}]}
        folder_of(job, config).mkdir(parents=True)
        commit(job, config, result | (trained if job.row.source is None else {}))
        return job.name

    monkeypatch.setattr(queue, "run_in_process", commit_job)
    monkeypatch.setattr(report, "write_report", lambda *_: None)


def count_results(out):
    return len(list(out.glob("cells/*/*/result.json")))


def test_the_plan_lists_the_networks_that_a_comparison_runs(data, tmp_path, monkeypatch, plan):
    """With trials and equal operations, before the comparison and after it."""
    monkeypatch.setattr(queue, "run_in_process", lambda *_: pytest.fail("nothing is to be trained"))
    out = tmp_path / "out"
    more = {"folds": 3, "trials": 2, "trial_steps": 1, "equal_flops": True, "methods": ("mae", "dino")}
    more |= {"task": ("in_context",), "ablate": ("dino-rotations",), "seeds": 2, "pictures": 0}
    lines = plan(**settings(data, out, **more))
    assert not out.exists()
    assert lines["images"] == "10 each run sees 8 images, 0.8 times each of 10"
    assert lines["primary metric"] == "first metric of in_context"
    assert lines["mae, trials"] == "2 networks, 0 done 1 step of 4 images each"
    assert lines["mae"] == "2 networks, 0 done 2 steps of 4 images each"
    assert lines["dino, equal operations"].startswith("2 networks, 0 done as many operations as mae")
    assert lines["untrained"] == "2 networks, 0 done without training"
    assert lines["colour"] == "1 network, 0 done without training"
    assert lines["in all"].endswith("16 training steps to do, and those of equal operations")
    commit_at_once(monkeypatch)
    compare.compare(**settings(data, out, **more))
    networks = count_results(out)
    assert lines["in all"].startswith(f"{networks} networks, 0 done")
    before = sorted(out.rglob("*"))
    after = plan(**settings(data, out, **more))
    assert after["in all"] == f"{networks} networks, {networks} done 0 training steps to do"
    assert re.fullmatch(r"2 networks, 2 done \d+ steps? of 4 images each", after["dino, equal operations"])
    assert sorted(out.rglob("*")) == before


def test_the_plan_counts_failed_networks_as_done(whole, data, plan):
    """The steps and the batch of a row are its own."""
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    rows = {"broken": {"method": "gtsa", "learning_rate": 1e30}, "long": {"method": "mae", "steps": 7, "batch_size": 2}}
    lines = plan(**settings(data, whole, rows=rows))
    assert lines["broken"] == "2 networks, 2 done 2 steps of 4 images each"
    assert lines["long"] == "2 networks, 0 done 7 steps of 2 images each"
    assert lines["in all"] == "11 networks, 9 done 14 training steps to do"
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


def test_the_plan_leaves_out_a_row_whose_trials_all_failed(data, tmp_path, monkeypatch, plan):
    run_jobs_here(monkeypatch)
    out = tmp_path / "out"
    more = {"folds": 3, "trials": 1, "trial_steps": 1, "methods": ("mae",), "controls": (), "pictures": 0}
    more |= {"task": ("in_context",), "learning_rates": (1e30, 1e30), "seeds": 1}
    more["pretrain"] = SMALL["pretrain"] | {"log_every": 1}
    with pytest.raises(UserError, match="failed: mae/trial-0"):
        compare.compare(**settings(data, out, **more))
    lines = plan(**settings(data, out, **more))
    assert count_results(out) == 1 and "mae" not in lines
    assert lines["in all"] == "1 network, 1 done 0 training steps to do"


def test_the_plan_reports_what_is_wrong_as_a_comparison_does(data, tmp_path):
    file = tmp_path / "compare.yaml"
    file.write_text(plain_yaml(settings(data, tmp_path / "out", weights=("nothing.pth",))))
    code, _, err = run("compare", "--config", file, "--plan")
    assert code == 4 and "no weights there" in err
