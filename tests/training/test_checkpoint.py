"""A checkpoint is whole or absent."""

import errno
import os
import random

import pytest
import torch

from gtsa.core.errors import UserError
from gtsa.core.migration import SCHEMA
from gtsa.training import checkpoint

TENSORS = {
    "method": {"a": torch.arange(50.0), "b": torch.ones(3, 4, dtype=torch.bfloat16)},
    "start": {"c": torch.eye(3)},
}


def test_written_and_read_is_equal(tmp_path):
    step_folder = checkpoint.write(tmp_path, 7, TENSORS, {"skips": [1]})
    assert checkpoint.newest(tmp_path) == (step_folder, [])
    tensors, state = checkpoint.read(step_folder)
    assert state == {"schema": SCHEMA, "step": 7, "skips": [1]}
    for stem, group in TENSORS.items():
        for name, tensor in group.items():
            assert torch.equal(tensors[stem][name], tensor)


def test_only_the_newest_are_kept(tmp_path):
    for step in range(1, 6):
        checkpoint.write(tmp_path, step, TENSORS, {}, keep=2)
    assert [p.name for p in checkpoint.listing(tmp_path)] == ["step-00000005", "step-00000004"]


def test_the_same_step_can_be_written_again(tmp_path):
    checkpoint.write(tmp_path, 1, TENSORS, {"n": 1})
    step_folder = checkpoint.write(tmp_path, 1, TENSORS, {"n": 2})
    assert checkpoint.read(step_folder)[1]["n"] == 2
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_every_flipped_bit_and_truncation_is_detected(tmp_path):
    step_folder = checkpoint.write(tmp_path, 3, TENSORS, {"skips": []})
    files = sorted(step_folder.iterdir())
    chance = random.Random(0)
    actual = 0
    for _ in range(200):
        file = chance.choice(files)
        whole = file.read_bytes()
        changed = bytearray(whole)
        changed[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        file.write_bytes(changed)
        actual += checkpoint.newest(tmp_path)[0] is None
        file.write_bytes(whole)
    for _ in range(60):
        file = chance.choice(files)
        whole = file.read_bytes()
        file.write_bytes(whole[: chance.randrange(len(whole))])
        actual += checkpoint.newest(tmp_path)[0] is None
        file.write_bytes(whole)
    for file in files:
        whole = file.read_bytes()
        file.unlink()
        actual += checkpoint.newest(tmp_path)[0] is None
        file.write_bytes(whole)
    assert actual == 260 + len(files)
    assert checkpoint.newest(tmp_path) == (step_folder, [])


@pytest.mark.parametrize("call", ["open", "os.fsync", "os.rename", "os.mkdir", "os.open"])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EACCES])
def test_no_failure_of_the_disk_costs_the_old_checkpoint(tmp_path, monkeypatch, call, error):
    """Every call of a kind fails once, in turn, until a save goes through."""
    old = checkpoint.write(tmp_path, 1, TENSORS, {})
    for turn in range(50):
        with monkeypatch.context() as patch:
            failed = break_once(patch, call, turn, error)
            try:
                checkpoint.write(tmp_path, 2, TENSORS, {})
            except UserError as raised:
                assert raised.code == 6
                assert "step-00000001" in str(raised)
        checkpoint.verify(old)
        if not failed:
            break
        newest, _ = checkpoint.newest(tmp_path)
        assert newest is not None
    else:
        raise AssertionError("the fault never stopped happening")
    assert turn > 0
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["step-00000001", "step-00000002"]


def break_once(patch, call, turn, error):
    """Makes the ``turn``-th call fail; returns a list that is filled if it did."""
    import builtins

    module, name = (os, call[3:]) if call.startswith("os.") else (builtins, call)
    real, count, failed = getattr(module, name), [0], []

    def broken(*arguments, **options):
        relevant = call != "open" or "b" in str(arguments[1:2])
        if relevant:
            count[0] += 1
            if count[0] - 1 == turn:
                failed.append(True)
                raise OSError(error, os.strerror(error))
        return real(*arguments, **options)

    patch.setattr(module, name, broken)
    return failed


def test_what_an_interrupted_save_left_is_cleared(tmp_path):
    (tmp_path / ".draft-00000001-123").mkdir()
    (tmp_path / ".draft-00000001-123" / "method.safetensors").write_bytes(b"half")
    checkpoint.write(tmp_path, 2, TENSORS, {})
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000002"]


def test_a_damaged_newer_one_never_costs_the_one_just_written(tmp_path):
    """A run that goes back behind a damaged checkpoint writes older steps: they are the ones to keep."""
    for step in (40, 60):
        checkpoint.write(tmp_path, step, {"a": {"x": torch.ones(3)}}, {}, keep=2)
    file = tmp_path / "step-00000060" / "a.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    for step in (41, 42):
        step_folder = checkpoint.write(tmp_path, step, {"a": {"x": torch.ones(3)}}, {}, keep=1)
        assert checkpoint.newest(tmp_path) == (step_folder, [])
    assert [p.name for p in checkpoint.listing(tmp_path)] == ["step-00000042"]


# What is not ours


def test_others_in_the_folder_are_left_alone_and_cost_nothing(tmp_path):
    """Links, files and folders under the names of checkpoints are neither counted nor removed nor read."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "manifest.json").write_text("{}")
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "step-00000007").symlink_to(outside)
    (folder / "step-00000011").write_text("a note")
    (folder / "step-99999999").mkdir()
    (folder / "step-99999999" / "mine.txt").write_text("mine")
    for step in (10, 12, 13):
        step_folder = checkpoint.write(folder, step, TENSORS, {}, keep=2)
    assert [p.name for p in checkpoint.listing(folder)] == ["step-00000013", "step-00000012"]
    assert [p.name for p in checkpoint.foreign(folder)] == ["step-00000007", "step-00000011", "step-99999999"]
    assert checkpoint.newest(folder) == (step_folder, [])
    assert (folder / "step-99999999" / "mine.txt").read_text() == "mine"
    assert (folder / "step-00000007").is_symlink() and [p.name for p in outside.iterdir()] == ["manifest.json"]


@pytest.mark.parametrize("kind", ["link", "file", "folder"])
def test_files_of_others_are_not_replaced(tmp_path, kind):
    step_folder = tmp_path / "step-00000002"
    outside = tmp_path / "outside"
    outside.mkdir()
    {"link": lambda: step_folder.symlink_to(outside), "file": step_folder.touch, "folder": step_folder.mkdir}[kind]()
    checkpoint.write(tmp_path, 1, TENSORS, {})
    with pytest.raises(UserError, match="is not a checkpoint of gtsa.*move it away") as error:
        checkpoint.write(tmp_path, 2, TENSORS, {})
    assert error.value.code == 8
    assert step_folder.exists() and outside.is_dir()
    assert checkpoint.newest(tmp_path)[0] == tmp_path / "step-00000001"


def test_a_file_that_the_manifest_does_not_list_is_not_read_and_survives(tmp_path):
    step_folder = checkpoint.write(tmp_path, 1, TENSORS, {})
    (step_folder / "extra.safetensors").write_bytes(b"nothing like it")
    assert checkpoint.newest(tmp_path) == (step_folder, [])
    assert checkpoint.read(step_folder)[0].keys() == TENSORS.keys()
    checkpoint.write(tmp_path, 2, TENSORS, {}, keep=1)
    assert [p.name for p in step_folder.iterdir()] == ["extra.safetensors"]
    assert [p.name for p in checkpoint.listing(tmp_path)] == ["step-00000002", "step-00000001"]
    checkpoint.write(tmp_path, 3, TENSORS, {}, keep=1)
    assert [p.name for p in step_folder.iterdir()] == ["extra.safetensors"]


def test_a_manifest_cannot_reach_out_of_its_folder(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    step_folder = checkpoint.write(tmp_path / "checkpoints", 1, TENSORS, {})
    text = (step_folder / "manifest.json").read_text().replace('"state.json"', '"../../mine.txt"')
    (step_folder / "manifest.json").write_text(text)
    assert checkpoint.newest(tmp_path / "checkpoints")[0] is None
    for step in (2, 3):
        checkpoint.write(tmp_path / "checkpoints", step, TENSORS, {}, keep=1)
    assert (tmp_path / "mine.txt").read_text() == "mine"
    assert not step_folder.exists()


def test_a_checkpoint_without_its_manifest_is_damaged_and_not_removed(tmp_path):
    for step in (1, 2):
        step_folder = checkpoint.write(tmp_path, step, TENSORS, {})
    (step_folder / "manifest.json").unlink()
    newest, problems = checkpoint.newest(tmp_path)
    assert newest == tmp_path / "step-00000001"
    assert problems == ["step-00000002 is damaged (manifest.json: No such file or directory)"]
    checkpoint.write(tmp_path, 3, TENSORS, {}, keep=1)
    assert step_folder.is_dir()


def test_the_state_is_read_without_the_tensors(tmp_path):
    assert checkpoint.newest_state(tmp_path) == {}
    for step in (1, 2):
        step_folder = checkpoint.write(tmp_path, step, TENSORS, {"n": step})
    (step_folder / "method.safetensors").write_bytes(b"")
    assert checkpoint.newest_state(tmp_path)["n"] == 2
    (step_folder / "state.json").write_text("{}")
    assert checkpoint.newest_state(tmp_path)["n"] == 1
