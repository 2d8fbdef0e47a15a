"""Requests to stop, in every phase of a run: real signals, a clear line, the right code, and a resume that ends alike."""

import importlib
import json
import os
import signal

import pytest

import gtsa
from conftest import final_weights, make_scenes
from gtsa.cli.main import run
from gtsa.core import stops
from gtsa.data import run_images
from gtsa.pretraining import cost
from gtsa.pretraining.verdict import HealthMonitor
from gtsa.training import checkpoint, loop

SETTINGS = """
model: test_vit
steps: 6
batch_size: 4
hold_out: 4
checkpoint_every: 3
evaluate_every: 4
log_every: 1
device: cpu
views: {global_crops_size: 48, local_crops_size: 32, local_crops_number: 1}
gtsa: {projector_dim: 16, out_dim: 16, predictor_dim: 16}
"""
PRETRAIN = importlib.import_module("gtsa.pretraining.pretrain")
PHASES = {  # what is called in it, and at which call the signal comes
    "import": (gtsa, "pretrain", 1),
    "scan": (run_images, "scan", 1),
    "plan": (cost, "probe", 1),
    "first look": (HealthMonitor, "__call__", 1),
    "step": (loop, "train_step", 2),
    "save": (checkpoint, "write", 1),
    "look": (HealthMonitor, "__call__", 2),
    "last save": (checkpoint, "write", 2),
    "last look": (HealthMonitor, "__call__", 3),
    "export": (PRETRAIN, "write_export", 1),
}
AT_ONCE = ("import", "scan", "plan", "last look", "export")
STEPS = {"first look": 1, "step": 2, "save": 3, "look": 4, "last save": 6}  # that are done when it stops

TIMES = ("seconds", "waited")


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stop")
    make_scenes(folder / "images", 8)
    (folder / "run.yaml").write_text(SETTINGS)
    return ["pretrain", "--config", str(folder / "run.yaml"), "--data", str(folder / "images"), "--out"]


@pytest.fixture(scope="module")
def straight(command, tmp_path_factory):
    out = tmp_path_factory.mktemp("straight") / "run"
    assert run([*command, str(out)]) == 0
    return out


def send(monkeypatch, phase, number):
    """A signal to this process when the phase is reached, before what is done in it."""
    owner, name, at = PHASES[phase]
    real, calls = getattr(owner, name), []

    def sending(*arguments, **options):
        calls.append(1)
        if len(calls) == at:
            os.kill(os.getpid(), number)
        return real(*arguments, **options)

    monkeypatch.setattr(owner, name, sending)


def lines(out, name):
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


def stopped(command, out, monkeypatch, capfd, phase, number):
    """A run that is sent a signal in a phase: its code, its lines, and what they say."""
    handlers = [signal.getsignal(n) for n in stops.ALL]
    with monkeypatch.context() as patch:
        send(patch, phase, number)
        code = run([*command, str(out)])
    printed, err = capfd.readouterr()
    assert [signal.getsignal(n) for n in stops.ALL] == handlers
    assert "Traceback" not in printed + err
    if phase in AT_ONCE:
        assert code == (130 if number == signal.SIGINT else 75)
        assert err.splitlines() == [
            "gtsa: stopped at once; the same command with --resume resumes from the last checkpoint, or starts if there "
            "is none"
        ]
        return
    assert code == 75
    first, last = err.splitlines()
    assert first == f"gtsa: {number.name}: stopping after this step, with a checkpoint"
    assert f"stopped on request at step {STEPS[phase]} of 6, checkpoint saved" in last
    assert checkpoint.newest(out / "checkpoints")[0].name == f"step-{STEPS[phase]:08d}"


@pytest.mark.parametrize("phase", PHASES)
def test_a_stop_in_any_phase_is_clear_and_resume_ends_where_the_straight_run_ends(
    command, straight, tmp_path, monkeypatch, capfd, phase
):
    out = tmp_path / "run"
    stopped(command, out, monkeypatch, capfd, phase, signal.SIGTERM)
    assert out.exists() == (phase not in ("import", "scan"))
    if phase == "export":  # it was written to its end
        assert (out / "exports" / "timm" / "model.safetensors").is_file()
    assert run([*command, str(out), "--resume"]) == 0
    assert final_weights(out) == final_weights(straight)
    for name in ("metrics.jsonl", "health.jsonl"):
        both = [[{k: v for k, v in e.items() if k not in TIMES} for e in lines(o, name)] for o in (out, straight)]
        assert both[0] == both[1], name


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT], ids=lambda n: n.name)
@pytest.mark.parametrize("phase", ["import", "first look", "step", "save", "look", "export"])
def test_sighup_and_ctrl_c_are_as_clear(command, tmp_path, monkeypatch, capfd, phase, number):
    stopped(command, tmp_path / "run", monkeypatch, capfd, phase, number)


def test_an_interrupted_evaluation_is_repeated_when_the_run_resumes(command, tmp_path, monkeypatch, capfd):
    out = tmp_path / "run"
    evaluations = []
    real = HealthMonitor.__call__

    def slow(self, method):
        evaluations.append(1)
        if len(evaluations) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            pytest.fail("the look went on")
        return real(self, method)

    monkeypatch.setattr(HealthMonitor, "__call__", slow)
    assert run([*command, str(out)]) == 75
    assert not (out / "health.jsonl").exists()
    assert run([*command, str(out), "--resume"]) == 0
    assert [line["step"] for line in lines(out, "health.jsonl")] == [4, 6]


@pytest.mark.parametrize("phase", ["import", "plan"])
def test_sigusr1_before_the_first_step_waits_for_it(command, tmp_path, monkeypatch, capfd, phase):
    send(monkeypatch, phase, signal.SIGUSR1)
    assert run([*command, str(tmp_path / "run")]) == 75
    err = capfd.readouterr().err
    assert "gtsa: SIGUSR1: saving and stopping after the first step" in err
    assert "stopped on request at step 1 of 6, checkpoint saved" in err


def test_a_request_before_an_evaluation_does_not_wait_for_it(command, straight, tmp_path, monkeypatch, capfd):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        send(patch, "plan", signal.SIGUSR1)
        patch.setattr(HealthMonitor, "__call__", lambda *_: pytest.fail("an evaluation came first"))
        assert run([*command, str(out)]) == 75
    assert run(["report", str(out)]) == 0
    assert "stopped before step 0 was evaluated" in (out / "report.html").read_text()
    assert run([*command, str(out), "--resume"]) == 0
    assert final_weights(out) == final_weights(straight)
    assert (out / "health.jsonl").read_bytes() == (straight / "health.jsonl").read_bytes()


def test_a_request_to_stop_is_reported_once_and_a_second_ctrl_c_stops_at_once(command, tmp_path, monkeypatch, capfd):
    real = loop.train_step

    def twice(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments)

    monkeypatch.setattr(loop, "train_step", twice)
    assert run([*command, str(tmp_path / "run")]) == 130
    err = capfd.readouterr().err
    assert err.count("stopping after this step") == 1
    assert "stopped at once" in err


def test_sighup_stays_ignored_under_nohup(command, tmp_path, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        send(monkeypatch, "step", signal.SIGHUP)
        assert run([*command, str(tmp_path / "run")]) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def caught(process):
    """The signals that a process has handlers for."""
    with open(f"/proc/{process}/status") as file:
        mask = int(file.read().split("SigCgt:")[1].split()[0], 16)
    return {number for number in signal.Signals if mask >> (number - 1) & 1}


def test_a_terminal_that_is_gone_does_not_cost_the_checkpoint(tmp_path):
    """Its lines go nowhere; what is left to do is done."""
    master, slave = os.openpty()
    child = os.fork()
    if not child:
        os.dup2(slave, 1)
        os.close(master)
        os.close(slave)
        with stops.requests() as requested:
            while not requested:
                signal.pause()
            os.write(1, b"words")  # fails, had nobody seen to it
            os._exit(7)
    os.close(slave)
    while signal.SIGHUP not in caught(child):
        pass
    os.close(master)
    os.kill(child, signal.SIGHUP)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
