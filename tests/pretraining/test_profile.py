"""gtsa profile: phases that leave no gap, and advice that follows from what was measured."""

import itertools
import json

import pytest
import torch
from lightning_fabric import Fabric

from conftest import SMALL_HEADS, TINY, run
from gtsa.core.types import Views
from gtsa.data.loader import StepSampler, ViewSet
from gtsa.data.multicrop import MultiCrop
from gtsa.methods import load_all
from gtsa.models.backbone import Backbone
from gtsa.pretraining import machine, profile_table, step_phases
from gtsa.pretraining.step_phases import Stopwatch
from gtsa.training.loop import fit
from gtsa.training.optim import ScheduledAdamW
from gtsa.training.schedules import Constant

SMALL = {name: value for name, value in TINY.items() if name in ("model", "batch_size", "views", "gtsa")}


class Images:
    """A source of noise."""

    def read(self, index, detail=None):
        draw = torch.Generator().manual_seed(index)
        return torch.randint(0, 256, (3, 72, 96), dtype=torch.uint8, generator=draw)


def ticking():
    """A clock that advances by one at each look."""
    counter = itertools.count()
    return lambda: float(next(counter))


def test_phases_exclude_one_another_and_leave_no_gap():
    watch = Stopwatch(ticking())
    watch.on = True
    with watch.phase("a"):  # 0
        with watch.phase("b"):  # 1: a had one tick
            pass  # 2: b had one
        with watch.phase("b"), watch.phase("c"):  # 3: a had a second one; 4: b had a second one
            pass  # 5: c had one; 6: b had a third one
        # 7: a had a third one
    assert dict(watch.seconds) == {"a": 3, "b": 3, "c": 1}
    assert dict(watch.calls) == {"a": 1, "b": 2, "c": 1}


def test_a_stopwatch_that_is_off_asks_no_clock():
    watch = Stopwatch(lambda: pytest.fail("the clock was asked"))
    with watch.phase("a"):
        pass
    assert watch.timed("b", lambda x: x + 1)(1) == 2
    assert not watch.seconds and not watch.calls


def test_what_follows_a_phase_has_a_name():
    watch = Stopwatch(ticking())
    watch.on = True
    work = watch.timed("backward", lambda: None, then="clipping")
    with watch.phase("other"):  # 0
        work()  # 1, 2
    assert dict(watch.seconds) == {"other": 1, "backward": 1, "clipping": 1}


def steps_of(name, watch, accumulate=1, **options):
    """Steps of a method on noise, in phases, as gtsa profile makes them."""
    encoder = Backbone("test_vit", 48)
    method = load_all()[name](encoder, **options)
    fabric = Fabric(accelerator="cpu", devices=1)
    module, optimizer = fabric.setup(method, ScheduledAdamW(method, Constant(1e-4), Constant(0.0)))
    step_phases.watch_method(watch, method)
    step_phases.watch_engine(watch, fabric, optimizer)
    views = ViewSet(Images(), range(8), MultiCrop(2, 2, 48, 32), 0)
    sampler = StepSampler(8, 4, 100, 50, accumulate=accumulate)

    def prepare(batch: Views) -> Views:
        return batch.each(
            lambda crops: type(crops)(crops.pixels.float() / 255, crops.boxes, crops.rotations, crops.colours)
        )

    return method, fit(
        module, optimizer, step_phases.read_batches(watch, views, sampler),
        step_phases.watch_prepare(watch, prepare, torch.device("cpu")), fabric=fabric, steps=100, start=50, accumulate=accumulate,
    )  # fmt: skip


TEACHERS = [step_phases.TEACHER, step_phases.FOLLOW]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", ["gtsa", *SMALL_HEADS])
def test_every_step_is_split_without_a_gap(name, accumulate):
    torch.manual_seed(0)
    watch = Stopwatch(ticking())
    options = SMALL["gtsa"] if name == "gtsa" else SMALL_HEADS[name]
    _, steps = steps_of(name, watch, accumulate, **options)
    plain, split = step_phases.watched_steps(steps, watch, 3)
    assert plain == [1, 1, 1]  # nothing asked the clock within
    assert len(split) == 3
    # Every tick within a step belongs to a phase: entering and leaving the outermost one adds a tick each.
    assert sum(watch.seconds.values()) == sum(split) + 2 * len(split)
    calls = {name: count / 3 for name, count in watch.calls.items()}
    assert calls[step_phases.DECODE] == 4
    assert calls[step_phases.CUT] == calls[step_phases.COPY] == accumulate
    assert calls[step_phases.AUGMENT] == calls[step_phases.LOSSES] == calls[step_phases.BACKWARD] == accumulate
    assert calls[step_phases.OPTIMISER] == calls[step_phases.FOLLOW] == 1
    assert calls[step_phases.STUDENT] >= accumulate
    assert (calls.get(step_phases.TEACHER, 0) >= accumulate) == (name != "mae")
    assert watch.seconds[step_phases.CLIP] > 0
    assert set(watch.seconds) <= set(step_phases.PHASES)


def test_heads_and_encoders_belong_to_their_network():
    torch.manual_seed(0)
    watch = Stopwatch(ticking())
    method, _ = steps_of("gtsa", watch, **SMALL["gtsa"])
    watch.on = True
    maps = torch.zeros(1, 3, 3, method.student.encoder.embed_dim)
    for module, phase in [
        (method.student.projector, step_phases.STUDENT),
        (method.teacher.projector, step_phases.TEACHER),
    ]:
        watch.calls.clear()
        module(maps)
        assert dict(watch.calls) == {phase: 1}
    watch.calls.clear()
    method.teacher.encoder(torch.zeros(1, 3, 48, 48))
    assert set(watch.calls) == {step_phases.TEACHER}


# Advice

RESULT = {
    "device": "cpu", "cores": 8, "workers": 0, "batch_size": 10, "precision": "32", "compile": "off", "step_ms": 1000.0,
    "loading_share": 0.05, "loading_ms_per_image": {"decode": 3.0, "cut": 2.0}, "matrix_tflops": 1.0,
    "share_of_matrix_rate": 0.7, "memory": {"peak": 2**30, "total": 2**32, "share": 0.25}, "trials": [],
}  # fmt: skip


def test_workers_that_keep_up():
    assert profile_table.workers_needed(RESULT) == 0  # images take 5 %
    slow = {**RESULT, "loading_share": 0.5, "loading_ms_per_image": {"decode": 80.0, "cut": 20.0}}
    assert profile_table.workers_needed(slow) == 3  # 1.1 x 10 x 100 ms in 500 ms
    assert profile_table.workers_needed({**slow, "workers": 3}) == 0
    (line,) = [line for line in profile_table.advice({**slow, "cores": 2}) if "smaller" in line and "store" in line]
    assert "3 workers would be needed" in line and "80.0 ms" in line


def test_only_measured_gains_are_recommended():
    trials = [
        {"flags": "--precision bf16", "ratio": 0.4, "remark": ""},
        {"flags": "--workers 2", "ratio": 1.3, "remark": ""},
    ]
    lines = profile_table.advice({**RESULT, "trials": trials})
    assert lines[0].startswith("--workers 2: measured 1.30 times as fast")
    assert not any(line.startswith("--precision") for line in lines)
    assert "no gain was measured with --precision bf16" in lines
    assert profile_table.advice(RESULT)[0].startswith("nothing: the machine's matrix rate is nearly reached")


def test_bounds_name_loader_or_step():
    assert profile_table.bounds(RESULT)[0].startswith("bound: the step; images take 5 %")
    assert profile_table.bounds({**RESULT, "loading_share": 0.4})[0].startswith("bound: the loader")
    assert "1.0 GiB of 4.0 GiB (25 %)" in profile_table.bounds(RESULT)[2]


def test_the_processor_is_asked_for_bf16(tmp_path, monkeypatch):
    for text, expected in [
        ("flags : fpu avx2 avx512f", False),
        ("flags : avx512_bf16 fpu", True),
        ("flags : amx_bf16", True),
    ]:
        file = tmp_path / "cpuinfo"
        file.write_text(text)
        monkeypatch.setattr(machine, "CPU", file)
        assert machine.has_bf16(torch.device("cpu")) is expected
    monkeypatch.setattr(machine, "CPU", tmp_path / "none")
    assert machine.has_bf16(torch.device("cpu")) is False


# The command


def test_the_command_as_users_run_it(scenes, tiny_yaml, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = tmp_path / "reports" / "profile.json"
    code, out, err = run("profile", "--data", scenes, "--config", tiny_yaml, "--measured-steps", 1, "--json", report)
    assert (code, err) == (0, "")
    result = json.loads(report.read_text())
    assert abs(sum(row["ms"] for row in result["phases"]) / result["split_step_ms"] - 1) < 0.05
    assert sum(row["share"] for row in result["phases"]) == pytest.approx(1)
    assert (result["model"], result["batch_size"], result["views"]) == ("test_vit", 4, [2, 48, 2, 32])
    for row in result["phases"]:
        assert row["phase"] in out
    assert "bound: " in out and "what to change:" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["reports"]  # nothing else is written


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--data", "nowhere"], 3, "nowhere"),
        (["--model", "vit_nothing"], 2, "vit_nothing"),
        (["--measured-steps", "0"], 2, "--measured-steps 0: at least 1"),
        (["--batch-size", "0"], 2, "batch_size"),
        (["--out", "runs/x"], 2, "--out"),
        (["--views.hflip", "0.5"], 2, "hflip"),
    ],
)
def test_wrong_inputs_are_answered_as_for_pretrain(arguments, code, words):
    actual, _, err = run("profile", *arguments)
    assert (actual, words in err) == (code, True), err


def test_a_report_that_cannot_be_written_is_an_error(scenes, tiny_yaml, tmp_path):
    file = tmp_path / "file"
    file.touch()
    code, out, err = run("profile", "--data", scenes, "--config", tiny_yaml, "--json", file / "profile.json")
    assert code == 6 and "give another file" in err
    assert "measuring" not in out
