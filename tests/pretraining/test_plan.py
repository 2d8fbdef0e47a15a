"""gtsa pretrain --plan: what a run would be and take, and nothing left of it."""

from types import SimpleNamespace

import pytest
import torch

from conftest import make_scenes
from gtsa import UserError, pretrain
from gtsa.cli.main import run
from gtsa.core.settings import validated
from gtsa.methods.gtsa import GTSA
from gtsa.pretraining import cost, micro_batches, plan, plan_table
from gtsa.pretraining.cost import Cost
from gtsa.pretraining.settings import METHODS, Pretrain
from gtsa.training import checkpoint
from gtsa.training.devices import resolve_device

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


def test_a_plan_does_not_change_an_existing_run(images, tmp_path, capfd):
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


def test_the_plan_of_a_long_run_on_a_cpu_shows_faster_settings(images, monkeypatch, capfd):
    for module in (cost, plan_table):
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
    assert plan.steps_done(SimpleNamespace(resume=True, out=str(tmp_path))) == 40
    assert plan.steps_done(SimpleNamespace(resume=False, out=str(tmp_path))) is None


def test_running_out_of_memory_during_the_plan_is_reported(images, tmp_path, monkeypatch, capfd):
    def probe(*_):
        raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr(cost, "probe", probe)
    assert run(["pretrain", "--plan", "--data", str(images), "--model", "test_vit"]) == 6
    assert "memory ran out" in capfd.readouterr().err


# Methods that need several images at a time


@pytest.fixture
def batch_norm(monkeypatch):
    """As a method with batch norm declares it."""
    monkeypatch.setitem(METHODS["gtsa"].constants, "min_images", 2)


def budget(**given):
    ready = resolve_device(validated(Pretrain, {"device": "cpu", "workers": 0, **given}))
    plan.resolve_budget(ready, 100)
    return ready


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"batch_size": 1}, "--batch-size 1: the method gtsa needs at least 2 images at a time on a device, not 1; give --batch-size 2 or more"),
        (
            {"batch_size": 4, "accumulate": 4},
            "--batch-size 4 in 4 micro-batches: the method gtsa needs at least 2 images at a time on a device, not 1; "
            "give --batch-size 8 or more, or a smaller --accumulate",
        ),
        (
            {"batch_size": 4, "devices": 4},
            "--batch-size 4 over 4 processes: the method gtsa needs at least 2 images at a time on a device, not 1; "
            "give --batch-size 8 or more",
        ),
    ],
)  # fmt: skip
def test_too_small_a_batch_for_the_method_is_refused(batch_norm, given, words):
    with pytest.raises(plan.UserError) as error:
        budget(**given)
    assert (error.value.code, str(error.value)) == (2, words)
    assert budget(**{**given, "method": "dino"}).settings.batch_size == given["batch_size"]  # it needs one


def test_contrast_with_other_images_needs_another_image():
    assert plan.min_images_of(validated(Pretrain, {})) == 1
    contrast = {"gtsa": {"region_loss": "infonce"}}
    with pytest.raises(plan.UserError, match="the method gtsa needs at least 2 images at a time on a device, not 1"):
        budget(batch_size=4, accumulate=4, **contrast)
    assert budget(batch_size=4, accumulate=2, **contrast).settings.accumulate == 2
    assert budget(batch_size=1, method="dino", **contrast).settings.batch_size == 1


def test_koleo_needs_two_images():
    with pytest.raises(plan.UserError, match="--batch-size 1: the method dino needs at least 2 images at a time"):
        budget(method="dino", batch_size=1, dino={"koleo_weight": 0.1})
    assert budget(method="dino", batch_size=1).settings.batch_size == 1


def test_a_batch_that_is_large_enough_for_the_method_is_accepted(batch_norm):
    assert budget(batch_size=4, accumulate=2).settings.accumulate == 2
    assert budget(batch_size=8, devices=4).settings.batch_size == 8
    assert budget(devices=16).settings.batch_size == 32  # auto: two images for each process


@pytest.mark.parametrize(
    ("fewest", "accumulate", "reason"),
    [
        (1, 12, "1 MiB of memory free"),
        (2, 6, "1 MiB of memory free, and gtsa needs 2 images at a time"),
        (5, 2, "1 MiB of memory free, and gtsa needs 5 images at a time"),
        (12, 1, "1 MiB of memory free, and gtsa needs 12 images at a time"),
    ],
)
def test_micro_batches_are_not_split_below_what_the_method_needs(monkeypatch, fewest, accumulate, reason):
    monkeypatch.setitem(METHODS["gtsa"].constants, "min_images", fewest)
    ready = budget(batch_size=12)
    micro_batches.resolve_accumulate(ready, Cost(0.0, 0.0, 0.0, 2**30, 0), 2**20)
    assert (ready.settings.accumulate, ready.reasons["accumulate"]) == (accumulate, reason)


def test_a_run_with_too_small_a_batch_for_its_method_writes_nothing(batch_norm, images, tmp_path, capfd):
    out = tmp_path / "run"
    assert run(["pretrain", "--data", images, "--out", str(out), *SMALL, "--batch-size", "4", "--accumulate", "4"]) == 2
    assert "needs at least 2 images at a time" in capfd.readouterr().err
    assert not out.exists()


def test_a_step_is_measured_with_as_many_images_as_the_method_needs(monkeypatch, images, capfd):
    monkeypatch.setitem(METHODS["gtsa"].constants, "min_images", 3)
    sizes, forward = [], GTSA.forward
    monkeypatch.setattr(
        GTSA, "forward", lambda self, views, time: (sizes.append(len(views.images)), forward(self, views, time))[1]
    )
    assert run(["pretrain", "--plan", "--data", images, *SMALL, "--batch-size", "4"]) == 0
    assert sizes and min(sizes) >= 3


@pytest.mark.parametrize(
    ("batch", "ranks", "parts", "message"),
    [
        (64, 3, "auto", "--batch-size 64 does not divide over 3 processes; give 63 or 66"),
        (64, 3, 5, "--batch-size 64 does not divide over 3 processes x 5 micro-batches; give 60 or 75"),
        (4, 1, 6, "--batch-size 4 does not divide over 6 micro-batches; give 6"),
    ],
)
def test_a_batch_that_does_not_divide_is_refused_with_sizes_that_do(batch, ranks, parts, message):
    given = validated(Pretrain, {"batch_size": batch, "devices": ranks, "accumulate": parts})
    with pytest.raises(UserError, match=f"^{message}$"):
        plan.check_batch(given)
    for size in map(int, message.partition("give ")[2].split(" or ")):
        plan.check_batch(given.model_copy(update={"batch_size": size}))


def test_it_is_refused_before_images_are_listed(images, tmp_path, monkeypatch):
    monkeypatch.setattr("gtsa.pretraining.pretrain.open_run", lambda *_: pytest.fail("the run was opened"))
    with pytest.raises(UserError, match="does not divide over 3 micro-batches; give 6 or 9"):
        pretrain(images, out=str(tmp_path / "run"), model="test_vit", batch_size=8, accumulate=3)


def test_a_resumed_run_keeps_its_batch(images, tmp_path, capfd):
    command = ["pretrain", "--data", images, "--out", str(tmp_path / "run"), *SMALL]
    assert run([*command, "--batch-size", "4", "--steps", "2"]) == 0
    assert run([*command, "--resume", "--accumulate", "3"]) == 2
    assert "does not divide over 3 micro-batches; resume with another number of micro-batches" in capfd.readouterr().err


@pytest.mark.parametrize(("parts", "ranks", "expected"), [("auto", 1, 64), ("auto", 3, 63), (5, 1, 60), (100, 1, 100)])
def test_a_batch_that_is_left_out_divides(parts, ranks, expected):
    resolved = resolve_device(validated(Pretrain, {"accumulate": parts, "devices": ranks, "device": "cpu"}))
    plan.resolve_budget(resolved, 512)
    assert resolved.settings.batch_size == expected
    plan.check_batch(resolved.settings)
