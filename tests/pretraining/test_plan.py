"""gtsa pretrain --plan: what a run would be and take, and nothing left of it."""

from types import SimpleNamespace

import pytest
import torch

from conftest import make_scenes
from gtsa.cli.main import run
from gtsa.pretraining import cost, plan
from gtsa.training import checkpoint

SMALL = [
    "--model",
    "test_vit",
    "--views.global-crops-size",
    "48",
    "--views.local-crops-size",
    "32",
    "--device",
    "cpu",
]
SMALL += ["--views.local-crops-number", "1", "--gtsa.projector-dim", "16", "--gtsa.out-dim", "16"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return str(make_scenes(tmp_path_factory.mktemp("plan") / "images", 8))


def everything(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


@pytest.mark.parametrize("out", [True, False])
def test_the_plan_alone(images, tmp_path, monkeypatch, capfd, out):
    monkeypatch.chdir(tmp_path)
    given = ["--out", "runs/new"] if out else []
    assert run(["pretrain", "--plan", "--data", images, *given, *SMALL, "--batch-size", "4", "--steps", "120"]) == 0
    printed, err = capfd.readouterr()
    names = [line.split("  ")[0] for line in printed.splitlines()]
    assert names[:2] == [f"reading {images}", "measuring a step of test_vit on cpu ..."]
    assert {"plan", "images", "steps", "time", "memory", "disk"} <= set(names)
    assert (
        "learning" not in printed.lower().replace("learning rate", "") and "aster settings" not in printed and err == ""
    )
    assert everything(tmp_path) == []


def test_a_plan_of_a_run_that_is_there_leaves_it_as_it_is(images, tmp_path, capfd):
    out = tmp_path / "run"
    command = ["pretrain", "--data", images, "--out", str(out), *SMALL]
    assert run([*command, "--batch-size", "4", "--steps", "2"]) == 0
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    for way in (["--resume"], ["--overwrite"]):
        assert run([*command, "--plan", *way, "--steps", "9", "--batch-size", "4"]) == 0
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    assert run([*command, "--resume", "--steps", "3", "--batch-size", "4"]) == 0  # planning was no setting of the run
    assert "plan:" not in (out / "config.yaml").read_text() or "plan: false" in (out / "config.yaml").read_text()


def test_a_plan_refuses_what_a_run_refuses(tmp_path, capfd):
    assert run(["pretrain", "--plan", "--data", str(tmp_path / "nowhere"), *SMALL]) == 3
    assert run(["pretrain", "--plan", "--data", str(tmp_path), "--epochs", "0"]) == 2


def test_a_long_run_on_a_cpu_is_told_what_takes_less(images, monkeypatch, capfd):
    for module in (cost, plan):
        monkeypatch.setattr(module, "LONG", 0.001)
    larger = [{"48": "96", "32": "64"}.get(word, word) for word in SMALL]
    assert run(["pretrain", "--plan", "--data", images, *larger, "--batch-size", "4", "--steps", "9"]) == 0
    printed = capfd.readouterr().out
    assert "Faster settings, each added to those before it" in printed
    assert "--views.global-crops-size 48 --views.local-crops-size 32: about " in printed


def test_out_is_needed_where_there_is_no_plan_to_show(capfd):
    assert run(["pretrain"]) == 2
    assert "--out is missing" in capfd.readouterr().err


def test_steps_that_are_done_are_those_of_our_checkpoints(tmp_path):
    out = tmp_path / "checkpoints"
    checkpoint.write(out, 40, {}, {})
    for name in ("step-99999999", "step-old"):
        (out / name).mkdir()
    assert plan._steps_done(SimpleNamespace(resume=True, out=str(tmp_path))) == 40
    assert plan._steps_done(SimpleNamespace(resume=False, out=str(tmp_path))) is None


def test_memory_that_runs_out_for_the_plan_is_told(images, tmp_path, monkeypatch, capfd):
    def probe(*_):
        raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr(cost, "probe", probe)
    assert run(["pretrain", "--plan", "--data", str(images), "--model", "test_vit"]) == 6
    assert "memory ran out" in capfd.readouterr().err
