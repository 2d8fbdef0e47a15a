"""Several processes through torchrun: the same views, and a run that trains and resumes."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys

import pytest
import torch

import gtsa
from conftest import run
from gtsa import checkpoint
from gtsa.cli import run as in_process
from gtsa.core import Alone, Remedy
from gtsa.pretrain import _remedy

WORKER = """
import hashlib, json, os, sys
import torch
from lightning_fabric import Fabric
from gtsa.data import StepSampler, ViewSet, loader
from gtsa.sources import open_source
from gtsa.views import MultiCrop

rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
source = open_source(sys.argv[1])
views = ViewSet(source, range(len(source)), MultiCrop(global_size=64, local_size=32, local_crops=2), seed=3)
drawn = {}
for step, batch in enumerate(loader(views, StepSampler(len(source), 8, 5, 0, rank, ranks), workers=1)):
    for row, image in enumerate(batch.images.tolist()):
        parts = [getattr(c, name)[row] for c in batch.groups for name in ("pixels", "boxes", "turns", "colours")]
        digest = hashlib.sha256(b"".join(p.numpy().tobytes() for p in parts)).hexdigest()
        drawn.setdefault(str(step), []).append([image, digest])
with open(os.path.join(sys.argv[2], f"{ranks}-{rank}.json"), "w") as file:
    json.dump(drawn, file)
"""


def torchrun(processes, *command, **options):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*launch, *map(str, command)], capture_output=True, text=True, timeout=300, env=environment, **options
    )


def test_1_2_and_4_processes_draw_identical_views(tmp_path, scenes):
    (tmp_path / "worker.py").write_text(WORKER)
    streams = []
    for processes in (1, 2, 4):
        done = torchrun(processes, tmp_path / "worker.py", scenes, tmp_path)
        assert done.returncode == 0, done.stderr
        ranks = [json.loads((tmp_path / f"{processes}-{rank}.json").read_text()) for rank in range(processes)]
        streams.append({step: [draw for rank in ranks for draw in rank[step]] for step in ranks[0]})
    assert streams[0] == streams[1] == streams[2]
    assert [len(batch) for batch in streams[0].values()] == [8] * 5


@pytest.mark.parametrize("processes", [2])
def test_two_processes_train_and_resume(tmp_path, scenes, tiny_yaml, processes):
    out = tmp_path / "run"
    arguments = ["-m", "gtsa", "pretrain", "--config", tiny_yaml, "--data", scenes, "--out", out]
    done = torchrun(processes, *arguments, "--steps", 8)
    assert done.returncode == 0, done.stderr
    assert "2 x cpu" in done.stdout
    losses = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in losses] == [2, 4, 6, 8]
    done = torchrun(processes, "-m", "gtsa", "pretrain", "--out", out, "--resume", "--steps", 12)
    assert done.returncode == 0, done.stderr
    assert "resumed from step-00000008" in done.stdout
    assert [p.name for p in (out / "exports" / "timm").iterdir()]
    code, _, err = run("pretrain", "--out", out, "--resume", "--learning-rate", "1")
    assert code == 2, err


def test_two_processes_share_dinos_centre(tmp_path, scenes, tiny_yaml):
    """The centre is of the logits of the whole batch, whoever made them."""
    config = tmp_path / "run.yaml"
    heads = "dino: {prototypes: 64, hidden: 32, bottleneck: 16}\ndrop_path: 0.0\n"  # depth is drawn in each process
    config.write_text(tiny_yaml.read_text().replace("steps: 12", "steps: 4") + "method: dino\n" + heads)
    found = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        done = torchrun(processes, "-m", "gtsa", "pretrain", "--config", config, "--data", scenes, "--out", out)
        assert done.returncode == 0, done.stderr
        tensors, _ = checkpoint.read(checkpoint.newest(out / "checkpoints")[0])
        found.append(tensors["objective"]["centre.value"])
    assert found[0].abs().max() > 1e-3
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


def survive(folder, kind):
    """A process whose partner is killed, in a run that is stopped by whatever that raises."""
    rank = int(os.environ["RANK"])
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.distributed.barrier()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        if kind == "tensors":
            torch.distributed.all_reduce(torch.ones(1))
        else:
            torch.distributed.broadcast_object_list([None], src=1)
    except Exception as error:
        remedy = _remedy(error, "out")
        (folder / "told").write_text(
            repr(error) if remedy is None else f"{remedy.code} {type(remedy).__name__} {remedy}"
        )


@pytest.mark.parametrize("kind", ["tensors", "objects"])
def test_a_process_whose_partner_is_killed_says_so(tmp_path, monkeypatch, kind):
    both = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        both.append(multiprocessing.get_context("fork").Process(target=survive, args=(tmp_path, kind)))
        both[-1].start()
    for process in both:
        process.join(60)
    assert both[1].exitcode == -signal.SIGKILL
    told = (tmp_path / "told").read_text()
    assert told.startswith("6 Alone another process of this run ended")


def test_whoever_is_left_tells_though_the_first_process_is_gone(monkeypatch, capfd):
    """Of other remedies, which all processes share, the first one tells."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    for kind, line in ((Alone, "gtsa: words\n"), (Remedy, "")):

        def ended(*_, kind=kind):
            raise kind("words", 6)

        monkeypatch.setattr(gtsa, "check", ended)
        assert in_process(["check", "."]) == 6
        assert capfd.readouterr().err == line
