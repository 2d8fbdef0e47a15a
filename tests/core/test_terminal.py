"""Progress: on a terminal a line that is rewritten, in a log lines, not a flood; and ETAs."""

import io
import logging
import time

import pytest
from rich.console import Console

from gtsa.core import terminal
from gtsa.core.settings import validated
from gtsa.core.terminal import Clock, Progress, doing, times
from gtsa.pretraining.settings import Pretrain
from gtsa.training.devices import launch_fabric, resolve_device

VALUES = {"seconds": 0.5, "waited": 0.1, "loss": 0.25}


@pytest.fixture(params=[True, False], ids=["terminal", "log"])
def shown(request, monkeypatch):
    """What a console shows, and whether it is a terminal."""
    file = io.StringIO()
    monkeypatch.setattr(
        terminal, "console", Console(file=file, force_terminal=request.param, width=120, highlight=False)
    )
    return lambda: file.getvalue(), request.param


def test_slow_work_is_announced(shown):
    text, is_terminal = shown
    with doing("measuring a step"):
        during = text()
    assert "measuring a step ..." in during
    if is_terminal:  # it goes
        assert text().endswith("\x1b[2K") or "\x1b[2K" in text()[len(during) :]
    else:
        assert text() == "measuring a step ...\n"


def test_quick_work_is_not_in_a_log(shown):
    text, is_terminal = shown
    with doing("saving", log=False):
        pass
    assert ("saving ..." in text()) == is_terminal


def test_lines_within_lines(shown):
    """An evaluation within a training has progress of its own; afterwards the training's is shown again."""
    text, is_terminal = shown
    progress = Progress(10, 0, 4)
    progress.show(1, VALUES)
    with doing("evaluating"):
        inner = Progress(3, 0, 4)
        inner.show(3, VALUES)
        inner.close()
    progress.show(10, VALUES)
    progress.close()
    assert all(words in text() for words in ("evaluating ...", "step 3/3", "step 10/10"))
    assert terminal.Line._live is None and not terminal.Line._open
    if not is_terminal:
        assert [line.split("  ")[0] for line in text().splitlines()] == [
            "step 1/10",
            "evaluating ...",
            "step 3/3",
            "step 10/10",
        ]


def test_a_log_gets_a_line_every_half_minute_however_long_a_step_is(shown, monkeypatch):
    text, is_terminal = shown
    now = [1000.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    progress = Progress(100, 0, 4)
    for step in range(1, 9):
        now[0] += 20.0
        if progress.due:
            progress.show(step, VALUES)
    progress.close()
    if not is_terminal:
        assert [line.split("  ")[0] for line in text().splitlines()] == [
            "step 2/100",
            "step 4/100",
            "step 6/100",
            "step 8/100",
        ]


def test_other_processes_are_silent(shown, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with doing("measuring a step"):
        pass
    assert shown[0]() == ""


# How long the rest takes


def test_the_first_eta_is_the_plans_and_the_first_step_does_not_count():
    clock = Clock(1000, 250, 100, step=0.2, evaluation=3.0)
    assert clock.left(0) == pytest.approx(1000 * 0.2 + 4 * 3.0)
    clock.step(60.0)  # everything is slow once
    assert clock.left(1) == pytest.approx(999 * 0.2 + 4 * 3.0)
    for _ in range(9):
        clock.step(0.3)
    clock.seconds["save"] = 1.0
    assert clock.left(10) == pytest.approx(990 * 0.3 + 4 * 3.0 + 10 * 1.0)
    assert clock.left(1000) == pytest.approx(3.0 + 1.0)


def test_where_nothing_is_expected_the_first_step_is_all_that_is_known():
    clock = Clock(10, 10, 10)
    clock.step(2.0)
    assert clock.left(1) == pytest.approx(18)
    clock.step(1.0)
    assert clock.left(2) == pytest.approx(8)


def test_an_eta_follows_a_machine_that_becomes_busy():
    clock = Clock(1000, 1000, 1000, step=0.1)
    for _ in range(300):
        clock.step(0.1)
    for _ in range(100):
        clock.step(0.4)
    assert clock.left(400) == pytest.approx(600 * 0.4)


@pytest.mark.parametrize("steps", [1, 6, 100, 120])
@pytest.mark.parametrize("every", [1, 4, 50, 120])
def test_how_often_something_is_still_done(steps, every):
    for step in range(steps):
        after = {s for s in range(step + 1, steps) if s % every == 0} | {steps}
        assert times(step, steps, every) == len(after)


def test_the_engine_does_not_talk(capfd):
    given = {"device": "cpu", "precision": "bf16", "devices": 1}
    launch_fabric(resolve_device(validated(Pretrain, given)).settings)
    assert not logging.getLogger("lightning_fabric.utilities.rank_zero").isEnabledFor(logging.INFO)
    assert capfd.readouterr().err == ""
