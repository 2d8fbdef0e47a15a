"""Requests to stop: one line and a code, whatever is at work; and the processes that work for a command go with it."""

import os
import signal
import sys
import threading
import time

import pytest

import gtsa
from gtsa.cli.main import run
from gtsa.core.stops import Processes, Stopped, handle_signals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
@pytest.mark.parametrize(
    ("arguments", "way"),
    [
        (["evaluate", "x", "--task", "knn", "--val", "x"], "the unfinished task is lost; with --work FOLDER"),
        (
            ["evaluate", "x", "--task", "knn", "--val", "x", "--work", "w"],
            "the same command resumes the trainings in --work",
        ),
        (["compare", "--data", "x", "--out", "x", "--train", "x", "--folds", "2"], "the same command resumes"),
        (["check", "x"], "the same command resumes; images that were decoded are not decoded again"),
        (["preview", "x"], "give the same command again"),
    ],
)
def test_a_command_ends_with_one_line(monkeypatch, capsys, tmp_path, number, code, arguments, way):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").mkdir()
    before = signal.getsignal(number)
    monkeypatch.setattr(gtsa, arguments[0], lambda *_, **__: (os.kill(os.getpid(), number), time.sleep(9)))
    assert run(arguments) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"gtsa: stopped at once; {way}")
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(
    ("arguments", "way"),
    [
        (
            ["--data", "x"],
            "the same command with --resume resumes from the last checkpoint, or starts if there is none",
        ),
        (
            [],  # --resume starts no run on the sample
            "the same command with --resume resumes from the last checkpoint; if there is no run yet, give the same "
            "command again",
        ),
    ],
)
def test_a_stopped_pretraining_says_what_resumes_it(monkeypatch, capsys, tmp_path, arguments, way):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").mkdir()
    monkeypatch.setattr(gtsa, "pretrain", lambda *_, **__: (os.kill(os.getpid(), signal.SIGINT), time.sleep(9)))
    assert run(["pretrain", "--out", "run", *arguments]) == 130
    assert capsys.readouterr().err == f"gtsa: stopped at once; {way}\n"


def test_the_way_out_is_not_interrupted():
    with pytest.raises(Stopped) as caught, handle_signals():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(9)
        finally:
            os.kill(os.getpid(), signal.SIGHUP)
    assert caught.value.code == 143


def test_signals_that_others_handle_or_ignore_are_left_to_them():
    """As nohup ignores SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with handle_signals():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_sigusr1_waits_only_where_there_are_steps(capfd):
    with handle_signals(trains=True):
        os.kill(os.getpid(), signal.SIGUSR1)
    assert "after the first step" in capfd.readouterr().err
    with pytest.raises(Stopped) as caught, handle_signals():
        os.kill(os.getpid(), signal.SIGUSR1)
    assert caught.value.code == 128 + signal.SIGUSR1


def test_processes_come_to_a_stop_and_later_ones_too():
    processes, codes = Processes(), []
    sleeps = [sys.executable, "-c", "import time; time.sleep(60)"]
    threads = [threading.Thread(target=lambda: codes.append(processes.run(sleeps))) for _ in range(2)]
    threads[0].start()
    while not processes.working:
        time.sleep(0.01)
    processes.stop()
    threads[1].start()  # was on its way when the stop came
    for thread in threads:
        thread.join(30)
    assert codes == [-signal.SIGTERM] * 2 and not processes.working
