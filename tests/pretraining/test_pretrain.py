"""Whole runs: from images to an export, and what happens on the way."""

import json
import re
import shutil
import sys
from functools import partial

import pytest
import timm
import torch
from torch.utils.data import Dataset

import gtsa
from conftest import TINY, final_weights, make_scenes, scene
from gtsa.core.errors import UserError
from gtsa.core.settings import validated
from gtsa.core.settings_file import read_yaml
from gtsa.models.backbone import Backbone
from gtsa.pretraining import plan
from gtsa.pretraining.requested import requested_settings
from gtsa.pretraining.settings import Pretrain
from gtsa.training import checkpoint
from gtsa.training.devices import resolve_device


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_run_folder(finished):
    names = {p.name.split(".vm")[0] for p in finished.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "health.jsonl", "train.log", "checkpoints", "exports", "pictures"} <= names
    assert any(n.startswith("events.out.tfevents") for n in names)
    assert [m["step"] for m in lines(finished / "metrics.jsonl")] == [2, 4, 6, 8, 10, 12]
    assert [m["step"] for m in lines(finished / "health.jsonl")] == [6, 12]
    assert {"loss", "region", "rotation", "rotation_accuracy", "seconds", "waited"} <= set(
        lines(finished / "metrics.jsonl")[0]
    )
    assert len(lines(finished / "images.jsonl")) == 14
    assert sorted(p.name for p in (finished / "pictures").iterdir()) == [
        "features-00000006.png",
        "features-00000012.png",
    ]


def test_the_losses_are_those_of_the_issue(finished):
    first, last = lines(finished / "metrics.jsonl")[0], lines(finished / "metrics.jsonl")[-1]
    assert last["loss"] < first["loss"]
    assert "patch" in last
    assert last["loss"] == pytest.approx(last["region"] + 0.5 * last["patch"] + 0.5 * last["rotation"], abs=1e-4)


def test_the_export_is_the_teacher(finished):
    opened = timm.create_model(f"local-dir:{finished}/exports/timm", pretrained=True).eval()
    tensors, state = checkpoint.read(checkpoint.newest(finished / "checkpoints")[0])
    side = TINY["views"]["global_crops_size"]
    teacher = Backbone(state["encoder"]["model"], side).eval()
    teacher.load_state_dict(
        {
            k.removeprefix("teacher.encoder."): v
            for k, v in tensors["objective"].items()
            if k.startswith("teacher.encoder.")
        }
    )
    images = torch.randn(2, 3, side, side)
    with torch.no_grad():
        patches = teacher(images).patches
        torch.testing.assert_close(opened.forward_features(images)[:, 1:], patches.flatten(1, 2), rtol=0, atol=1e-5)
        torch.testing.assert_close(opened(images), patches.mean((1, 2)), rtol=0, atol=1e-5)


def test_export_of_a_run_by_its_verb(finished, tmp_path):
    exported = gtsa.export(str(finished), str(tmp_path / "t"))
    assert (exported / "model.safetensors").read_bytes() == (finished / "exports/timm/model.safetensors").read_bytes()
    student = gtsa.export(str(finished), str(tmp_path / "s"), network="student")
    assert (student / "model.safetensors").read_bytes() != (exported / "model.safetensors").read_bytes()


def test_config_yaml_is_a_call_written_down(finished, tmp_path):
    settings = read_yaml(finished / "config.yaml") | {"out": str(tmp_path / "again")}
    data = settings.pop("data")
    again = gtsa.pretrain(data, **settings)
    assert final_weights(again.folder) == final_weights(finished)
    assert again.verdict.label in ("learning", "too short to tell", "collapsing")


def test_what_changes_speed_or_memory_alone_may_change_on_resume(finished):
    given = {"out": str(finished), "resume": True}
    changed = requested_settings({**given, "compile": "on", "activation_checkpointing": True, "accumulate": 2})
    assert (changed.compile, changed.activation_checkpointing, changed.accumulate) == ("on", True, 2)
    with pytest.raises(UserError, match="these differ:\n  precision: "):
        requested_settings({**given, "precision": "bf16"})


def test_a_run_starts_from_the_weights_of_another_run(finished, tmp_path, scenes, capsys):
    gtsa.pretrain(str(scenes), out=str(tmp_path / "run"), init=str(finished), **{**TINY, "steps": 2})
    printed = " ".join(capsys.readouterr().out.split())
    assert re.search(r"(\d+) of \1 tensors loaded", printed)


def test_the_seed_decides(tmp_path, scenes):
    one, other = (
        gtsa.pretrain(str(scenes), out=str(tmp_path / str(seed)), **{**TINY, "steps": 2, "seed": seed})
        for seed in (0, 1)
    )
    assert final_weights(one.folder) != final_weights(other.folder)


class Photos(Dataset):
    def __len__(self):
        return 14

    def __getitem__(self, i):
        return scene(i), f"label {i}"


def test_any_torch_dataset(tmp_path):
    settings = {**TINY, "steps": 2, "checkpoint_every": 1}
    done = gtsa.pretrain(Photos(), out=str(tmp_path / "a"), **settings)
    assert done.export.is_dir()
    assert read_yaml(done.folder / "config.yaml")["data"] == "<Photos of 14 items>"
    shutil.rmtree(max((done.folder / "checkpoints").glob("step-*")))
    before = final_weights(done.folder)
    gtsa.pretrain(Photos(), out=str(tmp_path / "a"), resume=True)
    assert final_weights(done.folder) != before


def test_a_file_that_is_damaged_during_a_run_is_replaced_and_reported(tmp_path, monkeypatch):
    data = make_scenes(tmp_path / "data", 14)
    module = sys.modules["gtsa.pretraining.pretrain"]
    real = module.build_method

    def spoil(*given):
        (data / "scene_04.jpg").write_bytes(b"gone")
        return real(*given)

    monkeypatch.setattr(module, "build_method", spoil)
    done = gtsa.pretrain(str(data), out=str(tmp_path / "run"), **{**TINY, "hold_out": 0})
    log = (done.folder / "train.log").read_text()
    assert log.count("scene_04.jpg could not be read (not a JPEG") == 1
    assert "took its place" in log


def test_too_many_bad_files_in_mid_run_end_it(tmp_path, monkeypatch):
    data = make_scenes(tmp_path / "data", 14)
    module = sys.modules["gtsa.pretraining.pretrain"]
    real = module.build_method

    def spoil(*given):
        for i in range(0, 8, 2):
            (data / f"scene_{i:02d}.jpg").unlink()
        return real(*given)

    monkeypatch.setattr(module, "build_method", spoil)
    with pytest.raises(gtsa.UserError, match="could not be read during training") as caught:
        gtsa.pretrain(str(data), out=str(tmp_path / "run"), **{**TINY, "hold_out": 0})
    assert caught.value.code == 3


def test_one_bad_file_is_forgiven_and_named(tmp_path, capsys):
    data = make_scenes(tmp_path / "data", 14)
    (data / "scene_00.jpg").write_bytes(b"")
    done = gtsa.pretrain(str(data), out=str(tmp_path / "run"), **{**TINY, "steps": 2})
    assert "left out: scene_00.jpg: empty file" in capsys.readouterr().out
    assert json.loads((done.folder / "scan.json").read_text())["bad"] == [
        {"name": "scene_00.jpg", "reason": "empty file"}
    ]


def test_fewer_images_than_a_batch(tmp_path):
    data = make_scenes(tmp_path / "data", 3)
    assert gtsa.pretrain(str(data), out=str(tmp_path / "run"), **{**TINY, "hold_out": 0, "steps": 4}).export.is_dir()


def test_overwrite_removes_only_what_a_run_wrote(finished, tmp_path, scenes):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    (out / "notes.txt").write_text("mine")
    gtsa.pretrain(str(scenes), out=str(out), overwrite=True, **{**TINY, "steps": 2})
    assert (out / "notes.txt").read_text() == "mine"
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step-00000002"]


def shallow(monkeypatch):
    """Models have two blocks, whatever their name says."""
    module = sys.modules["gtsa.pretraining.adaptation"]
    monkeypatch.setattr(module, "Backbone", partial(Backbone, arguments={"depth": 2}))


@pytest.mark.parametrize(
    "settings",
    [
        {"views": {**TINY["views"], "rotations": False}},
        {"views": {**TINY["views"], "local_crops_number": 0}},
        {"views": {**TINY["views"], "global_crops_number": 1, "local_crops_number": 3}},
        {"views": {**TINY["views"], "global_crops_number": 3, "local_crops_number": 0}},
        {"gtsa": {**TINY["gtsa"], "region_target": "global"}},
        {"gtsa": {**TINY["gtsa"], "patch_weight": 0.0}},
        {"gtsa": {**TINY["gtsa"], "region_weight": 0.0}},
        {"gtsa": {**TINY["gtsa"], "rotation_weight": 0.0}},
        {
            "gtsa": {**TINY["gtsa"], "region_loss": "infonce", "regularizer": "vicreg", "rotation_tokens": "cls"},
            "precision": "bf16",
        },
        {
            "gtsa": {**TINY["gtsa"], "region_loss": "prototypes", "center_targets": True, "image_weight": 0.1},
            "accumulate": 2,
        },
        {"precision": "bf16"},
        {"accumulate": 2},
        {"model": "vit_small_patch16_dinov3"},
        {
            "model": "vit_small_patch14_reg4_dinov2",
            "views": {"global_crops_size": 56, "local_crops_size": 28, "local_crops_number": 2},
        },
    ],
    ids=str,
)
def test_every_switch_trains(tmp_path, scenes, settings, monkeypatch):
    shallow(monkeypatch)
    done = gtsa.pretrain(str(scenes), out=str(tmp_path / "run"), **{**TINY, "steps": 3, **settings})
    for group in final_weights(done.folder):
        assert group
    tensors, _ = checkpoint.read(checkpoint.newest(done.folder / "checkpoints")[0])
    assert all(torch.isfinite(t).all() for t in tensors["objective"].values())


@pytest.mark.parametrize(("steps", "apart"), [(20, 50), (500, 50), (4000, 400)])
def test_a_run_has_ten_evaluations_at_least_fifty_steps_apart(steps, apart):
    ready = resolve_device(validated(Pretrain, {"steps": steps, "device": "cpu"}))
    plan.resolve_budget(ready, 100)
    assert ready.settings.evaluate_every == apart
