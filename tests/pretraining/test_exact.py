"""The same run, whatever happens to it: workers, kills, requests to stop. Every method killed: tests/long."""

import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import time

import pytest

import gtsa
from conftest import SMALL_HEADS, TINY, final_weights, run
from forking import fork
from gtsa.core.errors import UserError
from gtsa.methods.parts import region_losses, regularizers
from gtsa.training.run_folder import RunFolder


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def lines_of(out, file="metrics.jsonl"):
    """What a log says, without what is measured with a clock."""
    lines = [json.loads(line) for line in (out / file).read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "waited")} for line in lines]


def ended_after(process, out, step, by=signal.SIGKILL):
    """Sends a signal to a run once the checkpoint of ``step`` is there; its exit code and output."""
    waited = time.monotonic()
    while not list((out / "checkpoints").glob(f"step-{step:08d}")) and process.poll() is None:
        assert time.monotonic() - waited < 120
        time.sleep(0.005)
    time.sleep(random.random() * 0.1)
    process.send_signal(by)
    out_, err = process.communicate(timeout=120)
    return process.returncode, out_ + err


def test_the_folder_of_a_killed_run_is_free_at_once(tmp_path, scenes, tiny_yaml):
    """Its workers, which outlive it for a moment, do not hold its lock."""
    out = tmp_path / "run"
    arguments = ["--config", tiny_yaml, "--data", scenes, "--workers", 2, "--steps", 2000]
    process = fork("pretrain", "--out", out, *arguments)
    while not (out / "checkpoints" / "step-00000004").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    RunFolder(out, resume=True).close()


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(tmp_path, scenes, tiny_yaml, finished, workers):
    out = tmp_path / "run"
    process = fork("pretrain", "--config", tiny_yaml, "--data", scenes, "--out", out, "--workers", workers)
    assert process.communicate() and process.returncode == 0
    assert final_weights(out) == final_weights(finished)


def test_killed_twice_and_resumed(tmp_path, scenes, tiny_yaml, finished):
    out = tmp_path / "run"
    process = fork("pretrain", "--out", out, "--config", tiny_yaml, "--data", scenes, "--workers", 1)
    assert ended_after(process, out, 4)[0] == -signal.SIGKILL
    process = fork("pretrain", "--out", out, "--resume", "--workers", 0)
    assert ended_after(process, out, 8)[0] in (-signal.SIGKILL, 0)
    code, printed, err = run("pretrain", "--out", out, "--resume")
    assert code == 0, err
    assert "resumed from step-0000" in printed
    assert final_weights(out) == final_weights(finished)
    for log in ("metrics.jsonl", "health.jsonl"):
        assert lines_of(out, log) == lines_of(finished, log)


def test_stopped_on_request(tmp_path, scenes, tiny_yaml):
    out = tmp_path / "run"
    process = fork("pretrain", "--out", out, "--config", tiny_yaml, "--data", scenes, "--steps", 2000)
    code, printed = ended_after(process, out, 4, by=signal.SIGTERM)
    assert code == 75
    again = re.search(r"resume with: (.+) pretrain --out (.+) --resume", printed)
    assert again and shlex.split(again[2]) == [str(out)]
    message = subprocess.run([*shlex.split(again[1]), "--version"], capture_output=True, text=True)
    assert message.stdout.strip() == gtsa.__version__  # it can be typed as it stands
    assert "Traceback" not in printed


def stopped_and_resumed(scenes, folder, monkeypatch, **settings):
    """A run that is stopped between two checkpoints, by a signal, ends where one ends that is not."""
    settings = {**TINY, "steps": 6, "log_every": 1, "evaluate_every": 100, **settings}
    gtsa.pretrain(str(scenes), out=str(folder / "straight"), **settings)
    log = RunFolder.log

    def stopping(self, step, *rest, **words):
        log(self, step, *rest, **words)
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "log", stopping)
        with pytest.raises(UserError, match="stopped on request at step [34] of 6") as stopped:
            gtsa.pretrain(str(scenes), out=str(folder / "run"), **settings)
    assert stopped.value.code == 75
    gtsa.pretrain(out=str(folder / "run"), resume=True)
    assert final_weights(folder / "run") == final_weights(folder / "straight")
    assert lines_of(folder / "run") == lines_of(folder / "straight")


@pytest.mark.parametrize("method", ["gtsa", *SMALL_HEADS])
def test_every_method_is_stopped_and_resumed_bit_for_bit(tmp_path, scenes, monkeypatch, method):
    """See tests/long for kills at any moment."""
    heads = {method: SMALL_HEADS[method]} if method in SMALL_HEADS else {}
    stopped_and_resumed(scenes, tmp_path, monkeypatch, method=method, checkpoint_every=5, **heads)


SWITCHES = {
    "center_targets": True,
    "regularizer": "sigreg",
    "image_weight": 0.1,
    "rotation_decay": (0.2, 0.8),
    "num_prototypes": 64,
}


@pytest.mark.parametrize("region_loss", ["infonce", "prototypes"])
def test_gtsa_with_its_switches_is_stopped_and_resumed_bit_for_bit(tmp_path, scenes, monkeypatch, region_loss):
    """Means, negatives, directions and assignments are the same."""
    monkeypatch.setattr(region_losses, "NEGATIVES", 16)  # fewer than there are, so that they are drawn
    monkeypatch.setattr(regularizers, "VECTORS", 16)
    settings = {**TINY["gtsa"], **SWITCHES, "region_loss": region_loss}
    stopped_and_resumed(scenes, tmp_path, monkeypatch, gtsa=settings, checkpoint_every=5)


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_used(copied, finished):
    newest = max((copied / "checkpoints").glob("step-*"))
    file = newest / "objective.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    code, printed, _ = run("pretrain", "--out", copied, "--resume")
    assert code == 0
    assert (
        f"{newest.name} is damaged (objective.safetensors was changed or cut short): resuming from step-00000008"
        in printed
    )
    assert final_weights(copied) == final_weights(finished)


def test_resume_refuses_other_settings(copied):
    code, _, err = run("pretrain", "--out", copied, "--resume", "--learning-rate", "0.5", "--views.grayscale", "0.7")
    assert code == 2
    assert "learning_rate:" in err
    assert "now 0.5" in err
    assert "views.grayscale: 0.2, now 0.7" in err


def test_one_folder_two_runs(tmp_path, scenes, tiny_yaml):
    arguments = ["pretrain", "--config", tiny_yaml, "--data", scenes, "--out", tmp_path / "run", "--resume"]
    both = [fork(*arguments) for _ in range(2)]
    message = [process.communicate() for process in both]
    assert sorted(process.returncode for process in both) == [0, 6]
    assert any("another run is writing into" in err for _, err in message)
