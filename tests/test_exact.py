"""The same run, whatever happens to it: workers, kills, requests to stop."""

import json
import random
import re
import shlex
import signal
import subprocess
import time

import pytest

from conftest import final_weights, run, start
from gtsa.run import Run


@pytest.fixture(scope="module")
def straight(tmp_path_factory, scenes, tiny_yaml):
    out = tmp_path_factory.mktemp("runs") / "straight"
    code, printed, err = run("pretrain", "--config", tiny_yaml, "--data", scenes, "--out", out, "--workers", 0)
    assert code == 0, err
    return out, printed


def steps_of(out, file="metrics.jsonl"):
    return [json.loads(line)["step"] for line in (out / file).read_text().splitlines()]


def kill_after(out, step, *arguments, by=signal.SIGKILL):
    """Starts a run and sends it a signal once the checkpoint of ``step`` is there; its exit code and output."""
    process = start("pretrain", "--out", out, *arguments)
    waited = time.monotonic()
    while not list((out / "checkpoints").glob(f"step-{step:08d}")) and process.poll() is None:
        assert time.monotonic() - waited < 120
        time.sleep(0.005)
    time.sleep(random.random() * 0.3)
    process.send_signal(by)
    out_, err = process.communicate(timeout=120)
    return process.returncode, out_ + err


def test_the_folder_of_a_killed_run_is_free_at_once(tmp_path, scenes, tiny_yaml):
    """Its workers, which outlive it for a moment, do not hold its lock."""
    out = tmp_path / "run"
    arguments = ["--config", tiny_yaml, "--data", scenes, "--workers", 2, "--steps", 2000]
    process = start("pretrain", "--out", out, *arguments)
    while not (out / "checkpoints" / "step-00000004").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    Run(out, resume=True).close()
    process.communicate()


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(tmp_path, scenes, tiny_yaml, straight, workers):
    out = tmp_path / "run"
    assert run("pretrain", "--config", tiny_yaml, "--data", scenes, "--out", out, "--workers", workers)[0] == 0
    assert final_weights(out) == final_weights(straight[0])


def test_killed_twice_and_resumed(tmp_path, scenes, tiny_yaml, straight):
    out = tmp_path / "run"
    code, _ = kill_after(out, 4, "--config", tiny_yaml, "--data", scenes, "--workers", 1)
    assert code == -signal.SIGKILL
    code, _ = kill_after(out, 8, "--resume", "--workers", 0)
    assert code in (-signal.SIGKILL, 0)
    code, printed, err = run("pretrain", "--out", out, "--resume")
    assert code == 0, err
    assert "resumed from step-0000" in printed
    assert final_weights(out) == final_weights(straight[0])
    assert steps_of(out) == steps_of(straight[0])
    assert steps_of(out, "health.jsonl") == steps_of(straight[0], "health.jsonl")


def test_stopped_on_request(tmp_path, scenes, tiny_yaml, straight):
    out = tmp_path / "run"
    code, printed = kill_after(out, 4, "--config", tiny_yaml, "--data", scenes, "--steps", 2000, by=signal.SIGTERM)
    assert code == 75
    again = re.search(r"go on with: (.+) pretrain --out (.+) --resume", printed)
    assert again and shlex.split(again[2]) == [str(out)]
    told = subprocess.run([*shlex.split(again[1]), "methods"], capture_output=True, text=True)
    assert "gtsa" in told.stdout  # it can be typed as it stands
    assert "Traceback" not in printed


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_used(tmp_path, scenes, tiny_yaml, straight):
    out = tmp_path / "run"
    assert run("pretrain", "--config", tiny_yaml, "--data", scenes, "--out", out)[0] == 0
    newest = max((out / "checkpoints").glob("step-*"))
    file = newest / "objective.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    code, printed, _ = run("pretrain", "--out", out, "--resume")
    assert code == 0
    assert (
        f"{newest.name} is damaged (objective.safetensors was changed or cut short): going on from step-00000008"
        in printed
    )
    assert final_weights(out) == final_weights(straight[0])


def test_resume_refuses_other_settings(tmp_path, scenes, straight):
    code, _, err = run("pretrain", "--out", straight[0], "--resume", "--learning-rate", "0.5", "--views.grey", "0.7")
    assert code == 2
    assert "learning_rate:" in err
    assert "now 0.5" in err
    assert "views.grey: 0.2, now 0.7" in err


def test_one_folder_two_runs(tmp_path, scenes, tiny_yaml):
    arguments = ["pretrain", "--config", tiny_yaml, "--data", scenes, "--out", tmp_path / "run", "--resume"]
    both = [start(*arguments) for _ in range(2)]
    told = [process.communicate(timeout=120) for process in both]
    assert sorted(process.returncode for process in both) == [0, 6]
    assert any("another run is writing into" in err for _, err in told)


SMALL_HEADS = {
    "dino": {"prototypes": 64, "hidden": 32, "bottleneck": 16},
    "mae": {"decoder_dim": 64, "decoder_depth": 1},
}
SMALL_HEADS["ibot"] = SMALL_HEADS["dino"]


@pytest.mark.parametrize("method", SMALL_HEADS)
def test_every_method_is_killed_and_resumed_bit_for_bit(tmp_path, scenes, tiny_yaml, method):
    config = tmp_path / "run.yaml"
    config.write_text(tiny_yaml.read_text() + f"method: {method}\n{method}: {json.dumps(SMALL_HEADS[method])}\n")
    code, _, err = run("pretrain", "--config", config, "--data", scenes, "--out", tmp_path / "straight")
    assert code == 0, err
    code, _ = kill_after(tmp_path / "run", 4, "--config", config, "--data", scenes, "--workers", 1)
    assert code == -signal.SIGKILL
    code, printed, err = run("pretrain", "--out", tmp_path / "run", "--resume")
    assert code == 0, err
    assert "resumed from step-0000" in printed
    assert final_weights(tmp_path / "run") == final_weights(tmp_path / "straight")
    assert losses_of(tmp_path / "run") == losses_of(tmp_path / "straight")


def losses_of(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "waited")} for line in lines]
