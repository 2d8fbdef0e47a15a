"""What many tests need: a small folder of scenes, a small run, and the command line as a user runs it."""

import contextlib
import fcntl
import functools
import hashlib
import io
import os
import signal
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from forking import use_small_samples

TINY = {
    "model": "test_vit",
    "steps": 12,
    "batch_size": 4,
    "hold_out": 6,
    "checkpoint_every": 4,
    "evaluate_every": 6,
    "log_every": 2,
    "report": False,  # its pictures take a second or more
    "views": {"global_crops_size": 48, "local_crops_size": 32, "local_crops_number": 2},
    "gtsa": {"projector_dim": 16, "out_dim": 24, "predictor_dim": 16},
}
SMALL_HEADS = {  # of the other methods
    "dino": {"num_prototypes": 64, "hidden_dim": 32, "bottleneck_dim": 16},
    "ibot": {"num_prototypes": 64, "hidden_dim": 32, "bottleneck_dim": 16},
    "lejepa": {"num_slices": 16, "hidden_dim": 32, "proj_dim": 16},
    "mae": {"decoder_dim": 64, "decoder_depth": 1},
    "paka": {},
    "distill": {"teacher": "random:test_vit"},
}


def scene(seed, width=96, height=72):
    """Blobs and lines on a gradient: something to see everywhere, different for every seed."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    image = np.stack([x / width, y / height, (x + y) / (width + height)], -1) * 255 * rng.random(3)
    for _ in range(8):
        cx, cy, r = rng.integers(0, width), rng.integers(0, height), rng.integers(4, 16)
        image[(x - cx) ** 2 + (y - cy) ** 2 < r * r] = rng.integers(0, 255, 3)
    return Image.fromarray(image.astype(np.uint8))


def make_scenes(folder, count=14):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        scene(i).save(folder / f"scene_{i:02d}.{'png' if i % 2 else 'jpg'}")
    return folder


# Made once, whatever the number of processes that the tests run in; to be read, and copied before it is changed


def shared(factory, name, make):
    """The folder ``name``, made by the first process that asks for it with ``make(folder)``."""
    base = factory.getbasetemp()
    location = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared" / name
    location.parent.mkdir(exist_ok=True)
    with open(location.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = location.with_suffix(".done")
        if not done.exists():
            make(location)
            done.touch()
    return location


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    return shared(tmp_path_factory, "scenes", make_scenes)


@pytest.fixture(scope="session")
def finished(tmp_path_factory, scenes):
    """The folder of a run of TINY that nothing interrupted; whoever changes it copies it first."""
    from gtsa import pretrain

    location = shared(
        tmp_path_factory, "finished", lambda out: pretrain(str(scenes), out=str(out), **TINY | {"report": True})
    )
    before = final_weights(location)
    yield location
    assert final_weights(location) == before, "a test has changed the run that all others are compared with"


@pytest.fixture(scope="session")
def tiny_yaml(tmp_path_factory):
    """TINY as a file for --config."""
    from ruamel.yaml import YAML

    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    with open(path, "w") as file:
        YAML().dump(TINY, file)
    return path


@functools.cache
def arithmetic_inputs():
    import torch

    draw = torch.Generator().manual_seed(0)
    shapes = (2, 64, 19, 48), (32, 64, 3, 3), (96, 48)
    return [torch.randn(shape, generator=draw) for shape in shapes]


def arithmetic():
    """A digest of what this process computes, to the last digit, and of the settings that decide it."""
    import torch
    import torch.nn.functional as F
    from timm.layers import use_fused_attn

    x, kernel, weight = arithmetic_inputs()
    results = [
        F.conv2d(x, kernel, padding=1),
        F.linear(x, weight),
        F.scaled_dot_product_attention(x, x, x),
        F.layer_norm(x, (48,)).softmax(-1).exp(),
    ]
    digest = hashlib.sha256(b"".join(value.numpy().tobytes() for value in results)).hexdigest()[:16]
    return digest, torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(), use_fused_attn()


@pytest.fixture(scope="session")
def _arithmetic_at_start():
    return arithmetic()


@pytest.fixture(autouse=True)
def _arithmetic_stays(_arithmetic_at_start):
    """Runs are compared bit for bit: a test must not change what all others compute after it."""
    yield
    assert arithmetic() == _arithmetic_at_start


@pytest.fixture(autouse=True, scope="session")
def _small_samples():
    use_small_samples()


@contextlib.contextmanager
def many_samples():
    """As many views and draws as a user has: to compare with a process of ``start``, or for a sure verdict."""
    from gtsa.evaluation import intervals
    from gtsa.pretraining import verdict

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verdict, "VIEWS", 64)
        patch.setattr(intervals, "DRAWS", 400)
        yield


@pytest.fixture
def users_samples():
    with many_samples():
        yield


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True, scope="session")
def _own_signals():
    """As in a terminal, whoever started the tests: a job in the background ignores Ctrl-C, nohup SIGHUP."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


# The command line: in this process, forked from a warm one (tests/forking.py), or as a user starts it


def run(*arguments):
    """(exit code, standard output, standard error) of the command line, in this process."""
    from gtsa.cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main.run([str(a) for a in arguments])
    return code, out.getvalue(), err.getvalue()


def start(*arguments, **options):
    """The command line in a process of its own, imports and all."""
    command = [sys.executable, "-m", "gtsa", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def run_apart(*arguments, **options):
    """What ``run`` returns, of a process of its own."""
    process = start(*arguments, **options)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def final_weights(folder):
    """The bytes of all tensors of the newest checkpoint, by file."""
    location = max((folder / "checkpoints").glob("step-*"))
    return {file.name: file.read_bytes() for file in location.glob("*.safetensors")}


# The end of the report: what failed, by area (a file of tests); the last line stays pytest's own


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter):
    yield
    counts = {}
    for kind in ("failed", "error", "passed"):
        for report in terminalreporter.stats.get(kind, ()):
            area = report.nodeid.split("::")[0].removeprefix("tests/").removesuffix(".py")
            counts.setdefault(area, Counter())[kind] += 1
    for line in areas(counts):
        terminalreporter.write_line(line)


def areas(counts):
    """Lines about {area: {failed, error, passed: count}}: one for each area with failures, one for all others."""
    wrong = {area: outcomes for area, outcomes in counts.items() if outcomes["failed"] or outcomes["error"]}
    others = [outcomes for area, outcomes in counts.items() if area not in wrong]
    for area, outcomes in sorted(wrong.items()):
        yield f"FAILED AREA {area}: " + ", ".join(f"{outcomes[kind]} {kind}" for kind in outcomes)
    yield f"{len(others)} {'other ' if wrong else ''}areas without failures: {sum(map(Counter.total, others))} tests passed"
