"""recipes/slurm/pretrain.sbatch on two "machines" of this computer: srun and scontrol are stand-ins, torchrun is not."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "recipes" / "slurm" / "pretrain.sbatch"
SRUN = """#!/bin/bash
# Runs its command once a machine, and passes signals on, as srun does.
"$@" & a=$!
"$@" & b=$!
trap 'kill -USR1 $a $b' USR1
trap 'kill -TERM $a $b' TERM
worst=0
for each in $a $b; do
    while true; do
        wait $each; code=$?
        if ((code <= 128)) || ! kill -0 $each 2>/dev/null; then break; fi
    done
    if ((code > worst)); then worst=$code; fi
done
exit $worst
"""
SCONTROL = """#!/bin/bash
case "$1" in
    show) printf 'localhost\\nlocalhost\\n' ;;
    requeue) echo "$2" >> "$REQUEUED" ;;
esac
"""


@pytest.fixture
def job(tmp_path, scenes, tiny_yaml):
    """Starts the script as a job of two machines with one process each."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    (programs / "python").symlink_to(sys.executable)
    environment = {
        **os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "REQUEUED": str(tmp_path / "requeued"),
        "SLURM_JOB_ID": str(os.getpid()), "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "localhost", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }  # fmt: skip
    started = []

    def start(*arguments):
        command = ["--config", tiny_yaml, "--data", scenes, "--out", tmp_path / "run", "--device", "cpu", *arguments]
        with open(tmp_path / f"job-{len(started)}.log", "w") as log:
            process = subprocess.Popen(
                ["bash", SCRIPT, *map(str, command)], stdout=log, stderr=log, env=environment, start_new_session=True
            )
        started.append(process)
        return process, tmp_path / f"job-{len(started) - 1}.log"

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def test_the_script_is_a_shell_script_with_the_signal_it_expects():
    assert subprocess.run(["bash", "-n", SCRIPT], check=False).returncode == 0
    lines = re.findall(r"^#SBATCH (.+)$", SCRIPT.read_text(), re.MULTILINE)
    assert {"--signal=B:USR1@300", "--requeue", "--ntasks-per-node=1"} <= set(lines)


def test_a_job_without_out_is_refused():
    done = subprocess.run(["bash", SCRIPT, "--data", "scenes"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--out is missing" in done.stderr


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_two_machines_train_are_stopped_and_queued_again(job, tmp_path, number):
    """SIGUSR1 as before the time limit, to the script alone; SIGTERM as on preemption, to all processes of the job."""
    process, log = job("--steps", "400", "--checkpoint-every", "400", "--evaluate-every", "400", "--shard")
    metrics = tmp_path / "run" / "metrics.jsonl"
    for _ in range(1500):
        if process.poll() is not None or (metrics.exists() and metrics.read_text().count("\n") >= 2):
            break
        time.sleep(0.1)
    assert process.poll() is None, log.read_text()
    if number == signal.SIGTERM:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    assert process.wait(120) == 75, log.read_text()
    assert (tmp_path / "requeued").read_text().split() == [str(os.getpid())]
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    steps = int(saved.name.removeprefix("step-"))
    assert 4 <= steps < 400
    process, log = job("--steps", str(steps + 4), "--checkpoint-every", "2")
    assert process.wait(240) == 0, log.read_text()
    assert f"resumed from {saved.name}" in log.read_text()
    assert "2 x cpu" in log.read_text()
    assert json.loads(metrics.read_text().splitlines()[-1])["step"] == steps + 4
    assert (tmp_path / "requeued").read_text().split() == [str(os.getpid())]  # a run that is done is not queued again
