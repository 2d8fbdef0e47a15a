"""Files are there whole or not at all; what a dead process left goes, what others left stays."""

import os
import subprocess
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gtsa.core import files
from gtsa.training.events import Events


@pytest.fixture(scope="module")
def gone():
    """The id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_drafts_of_dead_processes_go_and_no_others(tmp_path, gone):
    outside = tmp_path / "outside"
    outside.write_text("mine")
    folder = tmp_path / "folder"
    (folder / f".timm.{gone}").mkdir(parents=True)
    for name in (f".timm.{gone}/model.safetensors", f".config.yaml.{gone}", f".notes.{gone}", ".config.yaml.swp"):
        (folder / name).write_text("x")
    (folder / f".config.yaml.{os.getppid()}").write_text("x")
    (folder / f".scan.json.{gone}").symlink_to(outside)
    files.clear_drafts(folder, "config.yaml", "scan.json", "timm")
    left = {f".notes.{gone}", ".config.yaml.swp", f".config.yaml.{os.getppid()}", f".scan.json.{gone}"}
    assert {p.name for p in folder.iterdir()} == left
    assert outside.read_text() == "mine"


def test_a_file_that_cannot_be_stored_leaves_no_draft(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("before")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.store(tmp_path / "file", b"after")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "before"


def test_a_draft_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "outside").write_text("mine")
    files.draft_of(tmp_path / "file").symlink_to(tmp_path / "outside")
    with pytest.raises(OSError, match="symbolic link"):
        files.store(tmp_path / "file", b"ours")
    assert (tmp_path / "outside").read_text() == "mine"


def test_a_seal_shows_every_changed_byte_and_truncation():
    whole = files.sealed("steps: 12\nseed: 0\n").encode()
    assert files.is_sealed(whole) is True
    assert files.is_sealed(b"steps: 12\n") is None
    for position in range(len(whole)):
        assert not files.is_sealed(whole[:position])
        for bit in range(8):
            changed = bytearray(whole)
            changed[position] ^= 1 << bit
            assert not files.is_sealed(bytes(changed))


def scalars(folder):
    shown = EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, round(e.value, 3)) for e in shown.Scalars(tag)] for tag in shown.Tags()["scalars"]}


def test_tensorboard_shows_one_line_after_a_resume(tmp_path):
    """Read by TensorBoard itself: what a killed run wrote beyond its checkpoint is not shown."""
    first = Events(tmp_path, 0)
    for step in (1, 2, 3):
        first.add(step, {"loss": step})
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-3])  # killed in mid-write
    again = Events(tmp_path, 1)
    assert [p.name for p in tmp_path.iterdir()] == [file.name]
    again.add(2, {"loss": 20})
    again.add(3, {"loss": 30, "rank": 1.5})
    assert scalars(tmp_path) == {"loss": [(1, 1), (2, 20), (3, 30)], "rank": [(3, 1.5)]}
    assert [p.name for p in tmp_path.iterdir()] == [file.name]


def test_a_start_that_logs_nothing_leaves_no_events(tmp_path):
    Events(tmp_path, 0)
    assert not list(tmp_path.iterdir())
