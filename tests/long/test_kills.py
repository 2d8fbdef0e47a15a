"""Kills at any moment: every method, weights to start from, and a comparison; all end where nothing interrupted them."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from comparing import data, results, settings
from test_exact import ended_after, lines_of

from conftest import SMALL_HEADS, final_weights, run, start
from gtsa.core.settings_file import plain_yaml

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("users_samples")]  # processes are a user's
__all__ = ["data"]  # a fixture


def killed_and_resumed(folder, *given):
    assert run("pretrain", "--out", folder / "straight", *given)[0] == 0
    process = start("pretrain", "--out", folder / "run", *given, "--workers", 1)
    assert ended_after(process, folder / "run", 4)[0] == -signal.SIGKILL
    code, printed, err = run("pretrain", "--out", folder / "run", "--resume")
    assert code == 0, err
    assert "resumed from step-0000" in printed
    assert final_weights(folder / "run") == final_weights(folder / "straight")
    assert lines_of(folder / "run") == lines_of(folder / "straight")


@pytest.mark.parametrize("method", ["gtsa", *SMALL_HEADS])
def test_every_method_is_killed_and_resumed_bit_for_bit(tmp_path, scenes, tiny_yaml, method):
    config = tmp_path / "run.yaml"
    heads = f"{method}: {json.dumps(SMALL_HEADS[method])}\n" if method in SMALL_HEADS else ""
    config.write_text(tiny_yaml.read_text() + f"method: {method}\n{heads}")
    killed_and_resumed(tmp_path, "--config", config, "--data", scenes)


def test_a_run_that_started_from_weights_is_killed_and_resumed(tmp_path, scenes, tiny_yaml, finished):
    given = ["--config", tiny_yaml, "--data", scenes, "--init", finished / "exports" / "timm"]
    killed_and_resumed(tmp_path, *given, "--freeze-encoder", 0.25, "--encoder-lr-scale", 1)


def test_a_comparison_that_is_killed_resumes_to_the_same_results(data, tmp_path):
    more = {"controls": (), "seeds": 1, "methods": ("gtsa", "dino"), "pictures": 0, "steps": 30}
    file = tmp_path / "c.yaml"

    def started(out):
        file.write_text(plain_yaml(settings(data, out, **more)))
        command = [sys.executable, "-m", "gtsa", "compare", "--config", str(file)]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT, start_new_session=True)

    straight = started(tmp_path / "straight")
    assert straight.wait(300) == 0
    for signal_, sign in (
        (signal.SIGKILL, "cells/gtsa/images-0/run/metrics.jsonl"),
        (signal.SIGTERM, "cells/dino/images-0/log.txt"),
    ):
        killed = started(tmp_path / "killed")
        deadline = time.monotonic() + 200
        while not (tmp_path / "killed" / sign).exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(killed.pid, signal_)
        assert killed.wait(60) != 0
    last = started(tmp_path / "killed")
    assert last.wait(300) == 0
    summaries = [results(tmp_path / name) for name in ("straight", "killed")]
    assert summaries[0] == summaries[1]
