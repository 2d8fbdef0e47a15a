"""gtsa compare: cells are committed whole, a comparison goes on after any end, and failures are told."""

import csv
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import shared
from forking import fork
from gtsa.cli.main import run
from gtsa.comparison import compare, conclusions, jobs, queue, report, report_page, run_job, stages, summary
from gtsa.comparison.jobs import Job
from gtsa.comparison.results import commit, folder_of, read_result
from gtsa.comparison.rows import make_rows
from gtsa.comparison.settings import ABLATIONS, Compare
from gtsa.comparison.stages import list_final_jobs
from gtsa.comparison.tuning import choose_settings, compute_primary, list_trial_jobs, sample_settings, summarise_choices
from gtsa.core.errors import UserError
from gtsa.core.settings import plain_yaml, validated
from gtsa.evaluation import intervals
from gtsa.evaluation.evaluators.segmentation import Segmentation
from gtsa.evaluation.intervals import Drawn
from gtsa.models.weights import load_backbone
from gtsa.pretraining.settings import METHODS, Pretrain

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
    """Ten pictures with bright and dark halves, and masks that say which half is which."""
    return shared(tmp_path_factory, "halves", make_halves)


def make_halves(place):
    draw = np.random.default_rng(0)
    for name in ("images", "masks"):
        (place / name).mkdir(parents=True)
    for number in range(10):
        mask = np.zeros((40, 40), np.uint8)
        mask[:, draw.integers(10, 30) :] = 1
        pixels = (60 + 120 * mask[..., None] + draw.integers(0, 60, (40, 40, 3))).astype(np.uint8)
        Image.fromarray(pixels).save(place / "images" / f"{number}.png")
        Image.fromarray(mask).save(place / "masks" / f"{number}.png")


def settings(data, out, **more):
    images = str(data / "images")
    return {**SMALL, "data": images, "train": (images, str(data / "masks")), "out": str(out), **more}


def validate(*arguments, **more):
    return validated(Compare, settings(*arguments, **more))


def run_jobs_here(monkeypatch):
    """Cells are done in this process, which saves the imports of another."""

    def apart(job, config, free):
        run_job.run(job, config)
        return (
            f"{job.name} {compute_primary(found, config)}"
            if (found := read_result(job, config))["status"] == "done"
            else job.name
        )

    monkeypatch.setattr(queue, "run_in_process", apart)


def results(out):
    """What a comparison found, without what it took."""
    found = json.loads((out / "results.json").read_text())
    for line in found["rows"]:
        for cost in ("minutes", "peak_gib"):
            line["costs"].pop(cost, None)
    return found


@pytest.fixture(scope="session")
def whole(data, tmp_path_factory):
    """A comparison that nothing interrupted, to be read."""
    return shared(tmp_path_factory, "comparison", lambda out: compared(data, out))


def compared(data, out):
    with pytest.MonkeyPatch.context() as patch:
        run_jobs_here(patch)
        with pytest.raises(
            UserError, match="failed: broken/images-0, broken/images-1; the report has the reasons"
        ) as caught:
            compare.compare(**settings(data, out, rows={"broken": {"method": "gtsa", "learning_rate": 1e30}}))
        assert caught.value.code == 7


def test_every_row_is_asked_with_every_seed(whole):
    lines = list(csv.DictReader((whole / "results.csv").read_text().splitlines()))
    assert list(lines[0]) == ["method", "stage", "seed", "task", "feature", "block", "metric", "value", "n"]
    seen = {(line["method"], line["seed"], line["task"]) for line in lines}
    tasks = ("segmentation", "in_context")
    assert {(m, seed, t) for m in ("gtsa", "dino", "untrained") for seed in "01" for t in tasks} <= seen
    assert ("colour", "0", "in_context") in seen and ("colour", "1", "in_context") not in seen
    assert all(line["n"] == "10" for line in lines)
    by_hand = [float(x["value"]) for x in lines if x["method"] == "dino" and x["metric"] == "mIoU"]
    found = {line["row"]: line for line in results(whole)["rows"]}
    assert found["dino"]["metrics"]["primary"]["mean"] == pytest.approx(np.mean(by_hand))
    less = found["dino"]["less_reference"]["primary"]["mean"]
    assert less == pytest.approx(
        found["dino"]["metrics"]["primary"]["mean"] - found["gtsa"]["metrics"]["primary"]["mean"]
    )
    assert found["colour"]["metrics"]["primary"]["low"] is not None  # images vary, though seeds do not


def test_every_row_is_compared_with_every_other(whole):
    found = results(whole)
    mean = {line["row"]: line["metrics"]["primary"]["mean"] for line in found["rows"] if line["metrics"]}
    told = {(d["row"], d["less_row"]): d for d in found["differences"]}
    assert set(told) == {(one, other) for one in mean for other in mean if one != other}
    for (one, other), d in told.items():
        assert d["mean"] == pytest.approx(mean[one] - mean[other])
        assert (d["low"], d["high"]) == pytest.approx((-told[other, one]["high"], -told[other, one]["low"]))
    reference = {line["row"]: line["less_reference"]["primary"] for line in found["rows"] if line.get("less_reference")}
    assert reference and all(told[row, "gtsa"]["low"] == pytest.approx(d["low"]) for row, d in reference.items())


def test_differences_are_of_the_same_seeds():
    draws = np.random.default_rng(0).normal(size=(5, 3, 1))

    def answers(seeds, values):
        places = list(range(len(seeds)))
        return summary.RowMetrics(seeds, {"primary": Drawn(np.array(values)[:, None], draws[:, places], 7)})

    whole, without = answers((0, 1, 2), [1.0, 10.0, 100.0]), answers((0, 2), [3.0, 400.0])
    assert without.subtract(whole, "primary").values[:, 0].tolist() == [2.0, 300.0]
    assert whole.subtract(without, "primary").drawn[:, 1, 0] == pytest.approx(draws[:, 2, 0] - draws[:, 1, 0])
    assert whole.subtract(answers((3,), [1.0]), "primary") is None and whole.subtract(without, "mAP") is None
    one = intervals.estimate(whole.subtract(answers((1,), [1.0]), "primary"))
    assert (one.mean, one.low, one.seeds) == (9.0, -np.inf, 1)  # a seed that others lack says nothing here


def test_a_cell_that_fails_is_told_with_its_reason_and_stops_no_other(whole):
    found = {line["row"]: line for line in results(whole)["rows"]}
    assert found["broken"]["seeds"] == [] and "diverged" in found["broken"]["failed"]["0"]
    page = (whole / "report.html").read_text()
    assert "broken, seed 0: training diverged" in page and found["gtsa"]["seeds"] == [0, 1]


def test_what_a_comparison_trained_can_be_opened(whole):
    place = whole / "cells/gtsa/images-0"
    backbone, _ = load_backbone(str(place / "run"))
    assert backbone.fingerprint == json.loads((place / "result.json").read_text())["weights"]
    with pytest.raises(UserError, match="no weights there"):
        load_backbone(str(place / "run"), network="student")


def test_the_page_needs_nothing_else(whole):
    page = (whole / "report.html").read_text()
    assert not re.findall(r"https?://", page)
    assert all(source.startswith("data:image/png;base64,") for source in re.findall(r'src="([^"]+)', page))
    assert {"gtsa", "dino", "untrained", "colour"} <= set(re.findall(r"<figcaption>(\w+), seed 0", page))


def test_what_is_done_is_not_done_again_and_what_is_missing_is(whole, data, monkeypatch, tmp_path, capsys):
    more, shared = {"rows": {"broken": {"method": "gtsa", "learning_rate": 1e30}}}, whole
    whole = shutil.copytree(shared, tmp_path / "out")
    before = (whole / "results.json").read_text(), (whole / "report.html").read_text().replace(str(shared), str(whole))
    monkeypatch.setattr(queue, "run_in_process", lambda *_: pytest.fail("all is done"))
    with pytest.raises(UserError, match="failed: broken/images-0"):
        compare.compare(**settings(data, whole, **more))
    assert "all rows and seeds: done, 9 of 9 networks" in capsys.readouterr().out
    assert ((whole / "results.json").read_text(), (whole / "report.html").read_text()) == before
    done = []
    told = results(whole)
    run_jobs_here(monkeypatch)
    run = run_job.run
    monkeypatch.setattr(run_job, "run", lambda job, config: (done.append(job.name), run(job, config)))
    (whole / "cells/dino/images-1/result.json").unlink()  # as a kill just before the end leaves it
    (whole / "cells/gtsa/images-0/result.json").unlink()
    with pytest.raises(UserError, match="failed: broken/images-0"):
        compare.compare(**settings(data, whole, **more))
    assert done == ["gtsa/images-0", "dino/images-1"]
    assert results(whole) == told


def test_the_report_grows_with_every_network(data, tmp_path, monkeypatch):
    run_jobs_here(monkeypatch)
    seen, write = [], report.write_report

    def written(*arguments):
        place = write(*arguments)
        seen.append(len(results(tmp_path)["rows"]))
        return place

    monkeypatch.setattr(report, "write_report", written)
    compare.compare(**settings(data, tmp_path, methods=("mae",), controls=("colour", "position"), seeds=2))
    assert seen[0] in (1, 2) and seen == sorted(seen) and seen[-1] == 3  # the next network does not wait for the report
    assert [line["row"] for line in results(tmp_path)["rows"]] == ["mae", "colour", "position"]


def test_a_figure_that_there_is_not_is_told_before_anything_is_trained(data, tmp_path, monkeypatch):
    run_jobs_here(monkeypatch)
    asked = settings(data, tmp_path, primary="in_context:mIoUU", controls=("position",))
    with pytest.raises(
        UserError, match="--primary in_context:mIoUU: in_context has no metric mIoUU; available: mIoU, mAcc, aAcc"
    ):
        compare.compare(**asked)
    assert [place.name for place in (tmp_path / "cells").iterdir()] == ["position"]


def test_results_of_other_settings_are_not_taken(whole, data):
    less = {**SMALL["pretrain"], "gtsa": {"projector_dim": 16, "out_dim": 16}}
    with pytest.raises(UserError, match=r"made with other settings \(gtsa.predictor_dim: 16, now not given\); give"):
        list(
            map(
                lambda job: read_result(job, config),
                list_final_jobs(make_rows(config := validate(data, whole, pretrain=less)), config),
            )
        )
    with pytest.raises(UserError, match=r"made with other settings \(steps: 2, now 3\); give another --out") as told:
        compare.compare(**settings(data, whole, steps=3))
    assert told.value.code == 4


def test_a_comparison_goes_on_where_its_folders_were_moved_to(data, tmp_path, monkeypatch):
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
    jobs._digest_image_names.cache_clear()  # as in a process of its own
    with pytest.raises(UserError, match=r"other settings \(its images, its tasks, or settings that were not stored\)"):
        compare.compare(**settings(data, "out", **more) | {"data": "images"})


def test_jobs_are_done_at_the_same_time(data, tmp_path, monkeypatch):
    both = threading.Barrier(2, timeout=60)  # breaks if one waits for the other
    monkeypatch.setattr(
        queue,
        "run_in_process",
        lambda job, config, free, apart=queue.run_in_process: (both.wait(), apart(job, config, free))[1],
    )
    compare.compare(**settings(data, tmp_path, methods=("mae",), seeds=2, controls=("colour", "position"), jobs=2))


@pytest.mark.parametrize(
    ("gpus", "at_once", "threads", "workers"),
    [(2, 2, "2", 3), (1, 1, None, 15), (0, 4, "4", "auto"), (0, 1, None, "auto")],
)
def test_gpus_and_cores_are_shared_out(data, tmp_path, monkeypatch, gpus, at_once, threads, workers):
    """Sixteen cores: on a GPU half of a run's share are threads, and all of it but one read images."""
    given = []

    def run(self, command, env, **_):
        time.sleep(0.2)  # so that no place is free again before all are taken
        given.append(
            (env.get("CUDA_VISIBLE_DEVICES"), env.get("OMP_NUM_THREADS"), jobs.read_job(Path(command[-1]))[1].workers)
        )
        return 1

    for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    for module in ("gtsa.comparison.queue", "gtsa.training.devices"):
        monkeypatch.setattr(f"{module}.cores", lambda: 16)
    monkeypatch.setattr(queue.Processes, "run", run)
    config = validate(data, tmp_path, device="auto", seeds=4, jobs=at_once, methods=("mae",), controls=())
    queue.run_jobs("runs", list(list_final_jobs(make_rows(config), config)), config)
    devices = sorted(str(number % gpus) if gpus else "" for number in range(4))
    assert sorted(device or "" for device, *_ in given) == devices
    assert {used for _, used, _ in given} == {threads}
    assert {told for *_, told in given} == {workers}


def test_nothing_more_is_begun_after_a_stop(data, tmp_path, monkeypatch, capsys):
    begun = []
    run_jobs_here(monkeypatch)
    monkeypatch.setattr(
        queue,
        "run_in_process",
        lambda job, config, free, apart=queue.run_in_process: (begun.append(job.name), apart(job, config, free))[1],
    )

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "write_report", interrupted)  # Ctrl-C while the first report is written
    with pytest.raises(UserError, match="^stopped on request; the same command resumes the comparison$") as told:
        compare.compare(**settings(data, tmp_path, methods=("mae",), seeds=8, controls=()))
    assert told.value.code == 75
    assert len(begun) < 4  # the first, and what had been begun by then
    assert "stopping: no more networks are started" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stop_leaves_a_report_and_no_process(data, tmp_path, monkeypatch, capsys, number):
    """The control is done; the first training is at work, as a process that would take an hour."""
    run_jobs_here(monkeypatch)
    at_once, codes = queue.run_in_process, []

    def apart(job, config, free):
        if job.row.source:
            return at_once(job, config, free)
        threading.Timer(0.3, os.kill, (os.getpid(), number)).start()
        codes.append(free.processes.run([sys.executable, "-c", "import time; time.sleep(3600)"]))
        raise UserError("stopped on request", 75)

    monkeypatch.setattr(queue, "run_in_process", apart)
    arguments = settings(data, tmp_path, methods=("mae",), seeds=1, controls=("position",))
    (tmp_path / "c.yaml").write_text(plain_yaml(arguments))
    assert run(["compare", "--config", str(tmp_path / "c.yaml")]) == 75
    assert codes == [-signal.SIGTERM]
    told = capsys.readouterr().err.splitlines()
    place = tmp_path / "report.html"
    assert told == [f"gtsa: stopped on request; the same command resumes the comparison; results so far: {place}"]
    assert [line["row"] for line in results(tmp_path)["rows"]] == ["position"] and place.exists()


def test_a_figure_that_an_untrained_network_reaches_is_marked():
    """In all of its interval above, below, or neither; of one seed there is no interval, and no mark."""

    def line(row, **less):
        metrics = {name: {"mean": 50.0, "low": 49.0, "high": 51.0} for name in ("a", "b", "c", "d")}
        told = {n: {"mean": m, "low": low, "high": high} for n, (m, low, high) in less.items()}
        return {"row": row, "stage": "images", "seeds": [0, 1], "metrics": metrics, "less_untrained": told}

    rows = [line("gtsa", a=(2, 1, 3), b=(0.5, -1, 2), c=(-2, -3, -1), d=(9, None, None)), line("untrained")]
    del rows[1]["less_untrained"]
    shown = report_page._make_metrics_table(rows)
    a, b, c, d = shown.split("<tr><td>gtsa")[1].split("<tr>")[0].split("<td>")[2:]
    assert (
        "untrained" not in a + d and "not distinguishable from untrained" in b and "significantly below untrained" in c
    )
    assert "untrained" not in shown.split("<tr><td>untrained")[1]
    assert "95 % interval of the difference from the untrained network contains 0" in " ".join(shown.split())


def test_every_row_is_compared_with_the_untrained_network(whole):
    found = {line["row"]: line for line in results(whole)["rows"]}
    assert "less_untrained" not in found["untrained"]
    for row in ("gtsa", "dino", "colour"):
        less = found[row]["less_untrained"]
        assert less.keys() == found[row]["metrics"].keys()
        for name, value in less.items():
            mine, its = (found[r]["metrics"][name]["mean"] for r in (row, "untrained"))
            assert value["mean"] == pytest.approx(mine - its)
    assert found["untrained"]["less_reference"].keys() == found["gtsa"]["less_untrained"].keys()


def test_one_value_for_several_is_taken_as_one(data, tmp_path, monkeypatch):
    """As the verbs take it: knn: {k: 3}. Refused or not, it is the same before and after training."""
    config = validate(data, tmp_path, evaluate={"knn": {"k": 3}}, task=("knn",), primary="knn")
    assert jobs.make_evaluator("knn", config).k == (3,)
    assert make_rows(config.model_copy(update={"weights": ("..", "x" * 300)}))[-2].name == "weights"


def test_a_comparison_that_is_killed_goes_on_to_the_same_results(data, tmp_path, monkeypatch):
    """See tests/long for one that is stopped again and again."""
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


# Tuning


def test_trials_are_as_many_for_every_method_and_follow_from_their_number(data, tmp_path):
    config = validate(data, tmp_path, trials=40, methods=("gtsa", "dino", "mae"))
    rows = make_rows(config)
    found = list(list_trial_jobs(rows, config))
    assert [sum(c.row.name == m for c in found) for m in ("gtsa", "dino", "mae")] == [40] * 3
    rates = [c.changes["learning_rate"] for c in found]
    assert 2.5e-4 <= min(rates) < 3e-4 and 8e-4 < max(rates) <= 1e-3 and len(set(rates)) > 100
    assert (
        sample_settings(rows[1], 7, config)
        == sample_settings(rows[1], 7, config)
        != sample_settings(rows[1], 8, config)
    )
    assert {jobs.make_pretrain_settings(job, config)["seed"] for job in found} == {
        1000
    }  # or seeds would be chosen, not settings
    for job in found:
        if job.number == 0:  # the preset: few random draws may all be bad ones
            assert job.changes == {"steps": 1, "learning_rate": 5e-4}
            continue
        assert job.changes[job.row.name].keys() == METHODS[job.row.name].constants["search_space"].keys()


def tried(job, config, good, without=(), **more):
    """Commits a trial with this primary figure, and without the images of each fold; or one that failed."""
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


def test_the_best_trial_is_taken_by_its_method_and_its_variants(data, tmp_path):
    config = validate(data, tmp_path, trials=3, ablate=("gtsa-no-rotation", "dino-rotations"))
    rows = make_rows(config)
    for job in list_trial_jobs(rows, config):
        tried(job, config, {"gtsa": (1.0, 5.0, 3.0), "dino": (1.0, 2.0, None)}[job.row.name][job.number])
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
def test_a_trial_that_collapsed_is_taken_only_where_all_did(data, tmp_path, words, best):
    config = validate(data, tmp_path, trials=2, methods=("dino",))
    rows = make_rows(config)
    for job, good, word in zip(list_trial_jobs(rows, config), (1.0, 2.0), words, strict=True):
        tried(job, config, good, curve=[{"step": 1, "verdict": "learning"}, {"step": 2, "verdict": word}])
    assert choose_settings(rows[0], rows, config) == sample_settings(rows[0], best, config)


def test_what_most_folds_choose_is_taken(data, tmp_path):
    config = validate(data, tmp_path, trials=3, folds=3)
    rows = make_rows(config)
    inner = {  # by fold, and last of all images; the best of all images is the first trial
        "gtsa": ([1.0, 9.0, 1.0, 9.0], [2.0, 3.0, 4.0, 3.0], [1.0, 1.0, 1.0, 1.0]),
        "dino": ([1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0], [2.0, 2.0, 2.0, 2.0]),
    }
    for job in list_trial_jobs(rows, config):
        *of_folds, good = inner[job.row.name][job.number]
        tried(job, config, good, without=of_folds)
    found = [(job, read_result(job, config)) for job in list_trial_jobs(rows, config)]
    told = [{"row": "gtsa", "taken": 1, "of_folds": [1, 0, 1]}, {"row": "dino", "taken": 2, "of_folds": [2, 2, 2]}]
    assert summarise_choices(found, config) == told
    assert [choose_settings(row, rows, config) for row in rows[:2]] == [
        sample_settings(rows[0], 1, config),
        sample_settings(rows[1], 2, config),
    ]
    (line,) = conclusions.describe_disagreements(told)
    assert "gtsa uses the settings of trial 1, chosen by 2 of 3 folds. Without" in line and "0 (fold 2)" in line
    within = [
        (job, {**result, "results": [{k: v for k, v in e.items() if k != "without"} for e in result["results"]]})
        for job, result in found
    ]
    told = summarise_choices(within, config)
    assert told == [{"row": "gtsa", "taken": 0, "of_folds": [0]}, {"row": "dino", "taken": 2, "of_folds": [2]}]
    assert conclusions.describe_disagreements(told) == []


@pytest.mark.parametrize("metrics", [{}, {"mIoU": math.nan}, {"mAcc": 1.0}])
def test_a_trial_that_shows_nothing_without_a_fold_is_not_its_choice(data, tmp_path, metrics):
    config = validate(data, tmp_path, trials=2, folds=3, methods=("mae",))
    found = []
    for job, good in zip(list_trial_jobs(make_rows(config), config), (2.0, 1.0), strict=True):
        tried(job, config, good, without=[good] * 3)
        result = read_result(job, config)
        if job.number == 0:
            result["results"][1]["without"][1] = metrics
        found.append((job, result))
    assert summarise_choices(found, config) == [{"row": "mae", "taken": 0, "of_folds": [0, 1, 0]}]


@pytest.mark.parametrize(
    ("count", "told"),
    [
        (999.0, "999 FLOPs"),
        (999_999.0, "1 MFLOPs"),
        (3.9e9, "3.9 GFLOPs"),
        (2.3e20, "230 EFLOPs"),
        (1e25, "1e+04 ZFLOPs"),
    ],
)
def test_operations_are_told_with_the_prefix_that_fits(count, told):
    assert report_page._format_flops(count) == told


def test_trials_are_chosen_by_inner_folds(data, tmp_path, monkeypatch):
    """Of networks that were trained: for every fold by figures of the other images, from probes that saw none of it."""
    run_jobs_here(monkeypatch)
    asked = []
    learn = Segmentation.__call__

    def seen(self, backbone, train, val, lab):
        asked.append((set(train.places), set(val.places)))
        return learn(self, backbone, train, val, lab)

    monkeypatch.setattr(Segmentation, "__call__", seen)
    more = {"folds": 5, "trials": 2, "seeds": 1, "controls": (), "methods": ("mae",), "task": ("segmentation",)}
    compare.compare(**settings(data, tmp_path, **more, primary="segmentation:mIoU"))
    pairs, folds = asked[:10], asked[-5:]
    assert len(asked) == 10 + 10 + 5 and asked[10:20] == pairs
    assert all(not learnt & judged and learnt | judged == set(range(10)) for learnt, judged in asked)
    assert sorted(sorted(judged) for _, judged in pairs) == sorted(
        sorted(one[1] | other[1]) for one, other in itertools.combinations(folds, 2)
    )
    config = validate(data, tmp_path, **more, primary="segmentation:mIoU")
    found = [read_result(job, config)["results"][0] for job in list_trial_jobs(make_rows(config), config)]
    good = [[metrics["mIoU"] for metrics in result["without"]] for result in found]
    assert not list(tmp_path.glob("cells/mae/trial-*/per_image*")) and list(
        tmp_path.glob("cells/mae/images-0/per_image*")
    )
    table = (tmp_path / "report.html").read_text().split("<h2>Trials</h2>")[1]
    assert "<td>steps 1, learning_rate 0.0005<td>" in table and "mae.mask_ratio 0." in table
    (told,) = results(tmp_path)["choices"]
    assert told["of_folds"] == [int(second > first) for first, second in zip(*good, strict=True)]


def test_what_a_row_says_itself_counts_more_than_trials(data, tmp_path):
    config = validate(
        data, tmp_path, rows={"mine": {"method": "gtsa", "learning_rate": 7e-4, "gtsa": {"momentum": 0.5}}}
    )
    row = next(row for row in make_rows(config) if row.name == "mine")
    tried = {"learning_rate": 1e-4, "gtsa": {"momentum": 0.9, "matches": 3}, "steps": 9}
    given = jobs.make_pretrain_settings(Job(row, "flops", 0, tried), config)
    assert (given["learning_rate"], given["steps"]) == (7e-4, 9)
    assert given["gtsa"] == {**SMALL["pretrain"]["gtsa"], "momentum": 0.5, "matches": 3}


def test_the_page_says_first_what_was_lost_and_that_nothing_was_learnt():
    def line(row, mean, low, high, **runs):
        less = {"primary": {"mean": mean, "low": low, "high": high}}
        return {"row": row, "stage": "images", "less_reference": less, "costs": {"verdicts": runs} if runs else {}}

    rows = [
        line("dino", -3.0, -4.0, -2.0, learning=1, collapsing=2),
        line("untrained", 0.1, -1.0, 1.0),
        line("colour", 5.0, 4.0, 6.0),
    ]
    collapsed, *told = conclusions.describe_verdicts("gtsa", rows)
    assert "2 of 3 runs of dino collapsed" in collapsed
    assert "gtsa is not distinguishable from untrained on the primary metric" in told[0]
    assert "significantly worse than colour" in told[1] and "-5.00 (95 % interval -6.00 to -4.00)" in told[1]
    assert "significantly better than dino" in told[2] and "+3.00 (95 % interval +2.00 to +4.00)" in told[2]


def test_trials_are_judged_within_the_training_images(data, tmp_path):
    images, masks = str(data / "images"), str(data / "masks")
    config = validate(data, tmp_path, folds=None, val=(images, masks))
    row = make_rows(config)[0]
    for stage, folds in (("trial", 5), ("images", None)):
        for _, asked, question in jobs.open_tasks(Job(row, stage, 0), config):
            assert asked.folds == folds
            assert question.val.fingerprint == question.train.fingerprint  # here the same images
            assert bool(question.folds) is (folds is not None)


def test_tasks_of_the_same_labels_open_them_once(data, tmp_path, monkeypatch):
    images, seen = tmp_path / "images", []
    shutil.copytree(data / "images", images)
    shutil.copy(images / "0.png", images / "without.png")
    monkeypatch.setattr("gtsa.data.labels.masks.say", seen.append)
    places, tasks = (str(images), str(data / "masks")), ("segmentation", "in_context", "rotation")
    config = validate(data, tmp_path, train=places, task=tasks)
    places = [len(question.val) for _, _, question in jobs.open_tasks(Job(make_rows(config)[0], "images", 0), config)]
    assert places == [10, 10, 10]
    assert seen[0] == "1 of 11 images have no mask and are left out"
    assert [": pixels: " in line for line in seen] == [False, True]


def test_the_primary_figure_is_the_mean_of_its_parts(data, tmp_path):
    config = validate(data, tmp_path)
    parts = [
        {"task": t, "metrics": {"mIoU": v, "aAcc": 90.0}} for t, v in (("segmentation", 10.0), ("in_context", 30.0))
    ]
    assert compute_primary({"results": parts}, config) == 20
    with pytest.raises(UserError, match="segmentation has no metric mAP; available: mIoU, aAcc"):
        compute_primary({"results": parts}, config.model_copy(update={"primary": "segmentation:mAP"}))


# Wrong input


@pytest.mark.parametrize("name", ABLATIONS)
def test_variants_are_valid(name, data, tmp_path):
    config = validate(data, tmp_path, ablate=(name,))
    row = next(row for row in make_rows(config) if row.name == name)
    validated(Pretrain, jobs.make_pretrain_settings(Job(row, "images", 0), config))


@pytest.mark.parametrize(
    ("wrong", "told"),
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
        ({"pretrain": {"out": "x"}}, "pretrain: out is set by the comparison; remove it here"),
        ({"pretrain": {"dino": {"momentum": 2.0}}}, "momentum: from 0 to 1"),
        ({"evaluate": {"segmentation": {"stepz": 3}}}, "--task segmentation: segmentation.stepz: there is no such"),
        (
            {"trials": 1},
            "segmentation, in_context: trials are chosen for each fold by inner folds of the other images, so two",
        ),
        (
            {"trials": 1, "folds": 3, "task": ("segmentation", "clusters"), "primary": "segmentation+clusters"},
            "segmentation has 3 folds; clusters is not trained, so it has no folds. Give another --primary, or --trials 0",
        ),
        (
            {"trials": 1, "folds": 3, "tasks": {"in_context": {"folds": 4}}},
            "segmentation has 3 folds; in_context has 4 folds",
        ),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_trained(wrong, told, data, tmp_path, monkeypatch):
    monkeypatch.setattr(queue, "run_in_process", lambda *_: pytest.fail("nothing is to be trained"))
    with pytest.raises(UserError, match=re.escape(told)):
        compare.compare(**{**settings(data, tmp_path / "out"), **wrong})
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_frees_the_device(tmp_path, monkeypatch):
    """The next network would wait for it for ever."""
    (tmp_path / "file").touch()
    free = queue.Devices([""])
    monkeypatch.setattr(queue, "folder_of", lambda *_: tmp_path / "file" / "cell")
    with pytest.raises(NotADirectoryError):
        queue.run_in_process(None, None, free)
    assert free.qsize() == 1


def test_runs_of_equal_operations_have_as_many_steps_as_the_first_methods_operations_pay_for(
    data, tmp_path, monkeypatch
):
    """MAE does 10 an image and GTSA 25, so GTSA has 100 x 10 / 25 steps; those of the first method are there already."""
    flops = {"mae": 10.0, "gtsa": 25.0, "dino": 3.0}

    def found(job, config):  # of DINO there is no result yet, and a control has no steps
        name = job.row.name
        return (
            None
            if name == "dino"
            else {"flops_per_image": flops.get(name, 1.0)} | ({"steps": 100} if name in flops else {})
        )

    monkeypatch.setattr(stages, "read_successful_result", found)
    config = validate(
        data, tmp_path, methods=("mae", "gtsa", "dino"), controls=("position",), seeds=2, steps=100, equal_flops=True
    )
    jobs_found = list(stages.list_equal_flops_jobs(make_rows(config), config))
    assert [(job.name, job.changes["steps"]) for job in jobs_found] == [("gtsa/flops-0", 40), ("gtsa/flops-1", 40)]
    assert list(stages.list_equal_flops_jobs(make_rows(config), config.model_copy(update={"equal_flops": False}))) == []
