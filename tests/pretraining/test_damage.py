"""What lies in a run folder and is not what was written: links, files of others, damage, a full disk, a folder that is gone."""

import builtins
import errno
import json
import os
import random
import shutil
import subprocess

import pytest

import gtsa
from conftest import final_weights, make_scenes
from gtsa.cli.main import run as command
from gtsa.core import files
from gtsa.core.errors import UserError
from gtsa.core.settings import validated
from gtsa.core.settings_file import plain_yaml
from gtsa.data.run_images import RunImages
from gtsa.models.weight_sources import read_weights
from gtsa.pretraining.requested import settings_of
from gtsa.pretraining.settings import Pretrain
from gtsa.training import checkpoint
from gtsa.training.run_folder import RunFolder

SMALL = {
    "model": "test_vit",
    "steps": 8,
    "batch_size": 4,
    "hold_out": 5,
    "checkpoint_every": 4,
    "evaluate_every": 5,
    "log_every": 3,
    "views": {"global_crops_size": 48, "local_crops_size": 32, "local_crops_number": 1},
    "gtsa": {"projector_dim": 8, "out_dim": 8, "predictor_dim": 8},
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_scenes(tmp_path_factory.mktemp("images") / "scenes", 10)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, images):
    out = tmp_path_factory.mktemp("runs") / "whole"
    gtsa.pretrain(str(images), out=str(out), **SMALL)
    return out


@pytest.fixture
def copied(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


@pytest.fixture(scope="module")
def cut(tmp_path_factory, images):
    """A run that was killed after its checkpoint of step 4, with half of a line of its log in the making."""
    out = tmp_path_factory.mktemp("runs") / "cut"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        after_checkpoint(patch, 4, killed)
        gtsa.pretrain(str(images), out=str(out), **SMALL)
    return out


@pytest.fixture
def begun(cut, tmp_path):
    return shutil.copytree(cut, tmp_path / "begun")


def killed():
    raise KeyboardInterrupt


def after_checkpoint(patch, step, happens):
    """Makes something happen right after the checkpoint of a step."""
    real = checkpoint.write

    def write(folder, at, *rest):
        step_folder = real(folder, at, *rest)
        if at == step:
            happens()
        return step_folder

    patch.setattr(checkpoint, "write", write)


def everything(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refused(code, match, out, **settings):
    with pytest.raises(UserError, match=match) as caught:
        gtsa.pretrain(out=str(out), **{"resume": True, **settings})
    assert caught.value.code == code
    return str(caught.value)


# Links, and files of others


@pytest.mark.parametrize("name", ["checkpoints", "exports", "exports/timm", "pictures", "best", "metrics.jsonl"])
@pytest.mark.parametrize("way", ["overwrite", "resume"])
def test_nothing_is_removed_or_written_through_a_link(copied, tmp_path, images, name, way):
    outside = tmp_path / "outside"
    for inner in (
        "step-00000001/manifest.json",
        "timm/config.json",
        "features-00000001.png",
        "checkpoints/step-00000009/a",
    ):
        (outside / inner).parent.mkdir(parents=True, exist_ok=True)
        (outside / inner).write_text("{}")
    link = copied / name
    if link.is_dir():
        shutil.rmtree(link)
    link.unlink(missing_ok=True)
    link.symlink_to(outside)
    before = everything(outside), everything(copied)
    message = refused(8, "is a symbolic link to", copied, data=str(images), **{"resume": False, way: True}, **SMALL)
    assert str(link) in message and str(outside) in message
    assert (everything(outside), everything(copied)) == before


def test_a_link_that_is_planted_in_mid_run_is_not_written_through(tmp_path):
    run = RunFolder(tmp_path / "run")
    (tmp_path / "outside").mkdir()
    for name in ("pictures", "checkpoints", "train.log"):
        (tmp_path / "run" / name).symlink_to(tmp_path / "outside")
    for write in (lambda: run.write("pictures/a.png", b""), lambda: run.checkpoints, lambda: run.note("text")):
        with pytest.raises(UserError, match="is a symbolic link") as caught:
            write()
        assert caught.value.code == 8
    run.close()
    assert not list((tmp_path / "outside").iterdir())


def test_overwrite_leaves_and_names_what_no_run_wrote(copied, tmp_path, images, capsys):
    mine = ("notes.txt", "checkpoints/step-99999999/a", "exports/timm/notes.md", "best/b", "pictures/c.png")
    for name in mine:
        (copied / name).parent.mkdir(parents=True, exist_ok=True)
        (copied / name).write_text("mine")
    (copied / "checkpoints" / "step-00000099").symlink_to(tmp_path)
    gtsa.pretrain(str(images), out=str(copied), overwrite=True, **{**SMALL, "steps": 2})
    assert [(copied / name).read_text() for name in mine] == ["mine"] * len(mine)
    assert (copied / "checkpoints" / "step-00000099").is_symlink()
    printed = capsys.readouterr().out
    for name in (
        "notes.txt",
        "checkpoints/step-99999999",
        "checkpoints/step-00000099",
        "exports/timm/notes.md",
        "best/b",
    ):
        assert f"'{name}'" in printed
    assert [p.name for p in checkpoint.listing(copied / "checkpoints")] == ["step-00000002"]
    assert read_weights(str(copied / "exports" / "timm")).model == "test_vit"


def test_a_path_that_blocks_a_checkpoint_is_reported_before_the_first_step(begun, monkeypatch, capsys):
    (begun / "checkpoints" / "step-00000099").touch()
    (begun / "checkpoints" / "step-00000007").touch()
    monkeypatch.setattr("gtsa.training.trainer.fit", lambda *_, **__: pytest.fail("it has started"))
    refused(8, "step-00000007 is not a checkpoint of gtsa.*move it away", begun)
    (begun / "checkpoints" / "step-00000007").unlink()
    with pytest.raises(pytest.fail.Exception):
        gtsa.pretrain(out=str(begun), resume=True)
    assert "step-00000099 is not a checkpoint of gtsa; it stays as it is" in capsys.readouterr().out


def test_drafts_of_a_run_that_was_killed_go_when_it_is_resumed(begun, whole):
    process = subprocess.Popen(["true"])
    process.wait()
    for name in ("config.yaml", "images.jsonl", "metrics.jsonl", "scan.json"):
        (begun / f".{name}.{process.pid}").write_text("half")
    for folder in (f"exports/.timm.{process.pid}", f"checkpoints/.draft-00000008-{process.pid}"):
        (begun / folder).mkdir(parents=True)
        (begun / folder / "model.safetensors").write_text("half")
    (begun / f".config.yaml.{os.getppid()}").write_text("of a living process")
    gtsa.pretrain(out=str(begun), resume=True)
    left = [p.name for p in begun.rglob(".*") if p.name != ".lock"]
    assert left == [f".config.yaml.{os.getppid()}"]


def test_a_start_that_was_killed_in_its_first_write_needs_no_flag(tmp_path):
    process = subprocess.Popen(["true"])
    process.wait()
    (tmp_path / f".config.yaml.{process.pid}").write_text("half")
    run = RunFolder(tmp_path)
    run.start_logs(0)
    run.close()
    assert [p.name for p in tmp_path.iterdir()] == [".lock"]


# Damage


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_an_older_checkpoint_is_never_taken_in_silence(copied, tmp_path, capsys):
    flip(copied / "checkpoints" / "step-00000008" / "optimizer.safetensors")
    older = copied / "checkpoints" / "step-00000004"
    for arguments in (
        ["export", copied, "--out", tmp_path / "new"],
        ["evaluate", copied, "--task", "health", "--val", tmp_path],
        ["pretrain", "--data", tmp_path, "--out", tmp_path / "other", "--init", copied],
    ):
        make_scenes(tmp_path, 2)
        assert command([str(a) for a in arguments]) == 4
        message = capsys.readouterr().err
        assert "step-00000008 is damaged (optimizer.safetensors was changed or cut short)" in message
        assert f"to use it, give {older}" in message
    assert not (tmp_path / "new").exists()
    assert command(["export", str(older), "--out", str(tmp_path / "new")]) == 0
    named = read_weights(str(older)).tensors
    assert all((read_weights(str(tmp_path / "new")).tensors[k] == v).all() for k, v in named.items())
    flip(older / "objective.safetensors")
    assert command(["export", str(older), "--out", str(tmp_path / "second")]) == 4
    assert f"{older} is damaged (objective.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw[:-20],
        lambda raw: raw[: raw.index(b"\n") + 1],
        lambda raw: b"\xff" + raw,
        lambda raw: b"[]\n" + raw,
    ],
    ids=["in a line", "at a line", "not UTF-8", "no dictionary"],
)
@pytest.mark.parametrize("checkpoints", [True, False])
def test_a_damaged_image_list_is_refused(begun, damage, checkpoints):
    if not checkpoints:
        shutil.rmtree(begun / "checkpoints")
    (begun / "images.jsonl").write_bytes(damage((begun / "images.jsonl").read_bytes()))
    refused(4, r"images\.jsonl (is damaged|was changed or cut short).*bring it back", begun)


def test_damaged_logs_and_reports_are_read_as_far_as_they_can_be(begun, whole):
    (begun / "scan.json").write_text("{")
    log = begun / "metrics.jsonl"
    log.write_bytes(b"\xff\xfe broken\n" + log.read_bytes() + b'{"step": 4, "lo\xff')
    (begun / "train.log").write_bytes(b"\xff\n")
    gtsa.pretrain(out=str(begun), resume=True)
    assert lines_about(log) == lines_about(whole / "metrics.jsonl")
    assert b"metrics.jsonl: 1 lines could not be read" in (begun / "train.log").read_bytes()


def rewritten(step_folder, change):
    """A checkpoint that is whole, with another state or without a file of tensors."""
    manifest = json.loads((step_folder / "manifest.json").read_bytes())
    state = json.loads((step_folder / "state.json").read_bytes())
    change(state, manifest["files"])
    data = json.dumps(state, indent=1, sort_keys=True).encode() + b"\n"
    (step_folder / "state.json").write_bytes(data)
    manifest["files"]["state.json"] = {"bytes": len(data), "sha256": files.digest(step_folder / "state.json")}
    (step_folder / "manifest.json").write_bytes(json.dumps(manifest, indent=1, sort_keys=True).encode() + b"\n")
    checkpoint.verify(step_folder)


@pytest.mark.parametrize("key", ["skips", "scaler", "threads", "unreadable"])
def test_a_state_without_a_key_is_refused(begun, key):
    rewritten(begun / "checkpoints" / "step-00000004", lambda state, _: state.pop(key))
    refused(4, f"step-00000004 is whole, but not what this version of gtsa writes .it has no '{key}'", begun)


def test_a_checkpoint_without_a_file_of_tensors_is_refused(begun):
    for name in ("start", "optimizer"):
        rewritten(begun / "checkpoints" / "step-00000004", lambda _, listed: listed.pop(f"{name}.safetensors"))  # noqa: B023
        refused(4, f"it has no '{name}'", begun)


def test_weights_of_a_state_without_its_encoder_are_refused(begun):
    rewritten(begun / "checkpoints" / "step-00000004", lambda state, _: state.pop("encoder"))
    with pytest.raises(UserError, match="it has no 'encoder'") as caught:
        read_weights(str(begun))
    assert caught.value.code == 4


# config.yaml


def stored_settings(out):
    """The stored settings of a run, without its own folder."""
    return validated(Pretrain, settings_of(out)).model_dump(exclude={"out"})


def test_every_damage_to_the_settings_is_detected_or_harmless(begun):
    file = begun / "config.yaml"
    raw, before = file.read_bytes(), stored_settings(begun)
    chance, actual = random.Random(0), 0
    flips = [(chance.randrange(len(raw)), chance.randrange(8)) for _ in range(60)]
    damaged = [raw[:at] + bytes([raw[at] ^ 1 << bit]) + raw[at + 1 :] for at, bit in flips]
    damaged += [raw[: chance.randrange(len(raw))] for _ in range(20)]
    for data in damaged:
        file.write_bytes(data)
        try:
            assert stored_settings(begun) == before
        except UserError as caught:
            assert caught.code == 4, caught
            actual += 1
    assert actual > 40
    file.write_bytes(raw)
    assert stored_settings(begun) == before


@pytest.mark.parametrize("name", ["learning_rate: 6.2", "steps: 8", "momentum: 0.9", "- 32", "keep_checkpoints: 2"])
def test_resume_says_which_setting_was_changed(begun, name):
    file = begun / "config.yaml"
    text = file.read_text()
    name = name if name in text else name.replace("- 32", "local_crops_size: 32")
    assert name in text
    file.write_text(text.replace(name, name[:-1] + "6", 1))
    message = refused(4, "is not what the run was started with:\n", begun)
    assert f"{name.split(':')[0]}: " in message and ", now " in message and "or remove it" in message


def test_without_config_yaml_the_checkpoint_says_the_settings(begun, whole, capsys):
    (begun / "config.yaml").unlink()
    gtsa.pretrain(out=str(begun), resume=True)
    assert "config.yaml is missing: using the settings in the newest checkpoint" in capsys.readouterr().out
    assert stored_settings(begun) == stored_settings(whole)
    assert final_weights(begun) == final_weights(whole)


def test_another_runs_settings_are_refused(begun, tmp_path, images):
    other = tmp_path / "other"
    gtsa.pretrain(str(images), out=str(other), **{**SMALL, "steps": 1, "seed": 3})
    shutil.copy(other / "config.yaml", begun / "config.yaml")
    assert "seed: 0, now 3" in refused(4, "is not what the run was started with", begun)


def test_what_may_change_may_change_twice(begun, whole, monkeypatch):
    """A resumed run that is killed before its next checkpoint has other settings than the checkpoint keeps."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RunImages, "account", lambda *_: killed())
        gtsa.pretrain(out=str(begun), resume=True, keep_checkpoints=3, steps=9)
    gtsa.pretrain(out=str(begun), resume=True, workers=0, steps=8)
    assert settings_of(begun)["keep_checkpoints"] == 3
    assert final_weights(begun) == final_weights(whole)


def of_before(state, listed):
    del state["settings"], state["recent"], listed["recent.safetensors"]


def test_runs_of_before_there_was_a_seal_resume(begun, whole):
    text = (begun / "config.yaml").read_text()
    (begun / "config.yaml").write_text(text[: text.index(files.SEAL)])
    rewritten(begun / "checkpoints" / "step-00000004", of_before)
    gtsa.pretrain(out=str(begun), resume=True)
    assert final_weights(begun) == final_weights(whole)


def test_damaged_settings_of_a_run_without_a_checkpoint_are_refused(begun):
    shutil.rmtree(begun / "checkpoints")
    raw = (begun / "config.yaml").read_bytes()
    for damaged in (raw[: len(raw) // 2], raw.replace(b"steps: 8", b"steps: 9")):
        (begun / "config.yaml").write_bytes(damaged)
        refused(4, r"config\.yaml is (damaged|not what)", begun)


# Logs after a crash


def lines_about(log):
    """Lines of a log but for what depends on the clock."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "waited")} for line in lines]


def test_logs_of_a_killed_run_are_the_straight_runs(begun, whole):
    """Bit for bit, also the line that was half full when the checkpoint was written."""
    gtsa.pretrain(out=str(begun), resume=True)
    for name in ("metrics.jsonl", "health.jsonl"):
        assert lines_about(begun / name) == lines_about(whole / name)
    assert [line["step"] for line in lines_about(begun / "metrics.jsonl")] == [3, 6, 8]
    assert len(list(begun.glob("events.out.tfevents.*"))) == 1
    assert final_weights(begun) == final_weights(whole)


# The disk is full, and stays full; the folder is gone


def full_disk(patch):
    """From now on nothing can be written to a file."""
    real_open, real = builtins.open, os.open

    def opened(path, flags, *rest, **options):
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(path))
        return real(path, flags, *rest, **options)

    def file(path, mode="r", *rest, **options):
        if set(mode) & set("wax+") and path != os.devnull and isinstance(path, str | os.PathLike):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(path))
        return real_open(path, mode, *rest, **options)

    patch.setattr(os, "open", opened)
    patch.setattr(builtins, "open", file)


@pytest.mark.parametrize("at", [4, 8])
def test_a_disk_that_stays_full_ends_a_run_with_one_sentence(tmp_path, images, monkeypatch, capsys, at):
    """In mid-run, at the next line of the log; and after the last checkpoint, at the last look."""
    out, small = tmp_path / "run", tmp_path / "small.yaml"
    small.write_text(plain_yaml(SMALL))
    after_checkpoint(monkeypatch, at, lambda: full_disk(monkeypatch))
    code = command(["pretrain", "--config", str(small), "--data", str(images), "--out", str(out)])
    monkeypatch.undo()
    message = capsys.readouterr().err
    assert code == 6
    assert message.startswith("gtsa: ") and message.count("\n") == 1
    assert "No space left on device" in message and "make room, then resume with --resume" in message
    assert checkpoint.newest(out / "checkpoints")[0] == out / "checkpoints" / checkpoint.name(at)


@pytest.mark.parametrize(("happens", "at"), [("renamed", 4), ("removed", 8), ("replaced", 4)])
def test_a_run_whose_folder_is_gone_ends_and_says_so(tmp_path, images, monkeypatch, happens, at):
    out, elsewhere = tmp_path / "run", tmp_path / "elsewhere"

    def gone():
        out.rename(elsewhere)
        if happens == "removed":
            shutil.rmtree(elsewhere)
        if happens == "replaced":
            out.mkdir()

    after_checkpoint(monkeypatch, at, gone)
    with pytest.raises(UserError, match="was renamed, removed or replaced while the run was writing into it") as caught:
        gtsa.pretrain(str(images), out=str(out), **SMALL)
    monkeypatch.undo()
    assert caught.value.code == 6
    assert not out.exists() or not list(out.iterdir())
    if happens == "renamed":
        assert gtsa.pretrain(out=str(elsewhere), resume=True).export.is_dir()
