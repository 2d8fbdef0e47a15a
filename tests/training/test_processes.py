"""Several processes through torchrun: the same views, and a run that trains and resumes."""

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

import gtsa
from conftest import TINY, make_scenes, run
from forking import Forked, fork
from gtsa.cli.main import run as in_process
from gtsa.core.errors import ProcessLost, UserError
from gtsa.pretraining.open_run import user_error
from gtsa.training import checkpoint


def draw_views(data, folder, rank, ranks):
    """What one of several processes does: digests of all views that it draws in five steps."""
    from gtsa.data.batches.loader import StepSampler, ViewSet, loader
    from gtsa.data.sources import open_source
    from gtsa.data.views.multicrop import MultiCrop

    source = open_source(data)
    views = ViewSet(
        source, range(len(source)), MultiCrop(global_crops_size=64, local_crops_size=32, local_crops_number=2), seed=3
    )
    drawn = {}
    for step, batch in enumerate(loader(views, StepSampler(len(source), 8, 5, 0, rank, ranks), workers=1)):
        for row, image in enumerate(batch.images.tolist()):
            parts = [
                getattr(c, name)[row] for c in batch.groups for name in ("pixels", "boxes", "rotations", "colours")
            ]
            digest = hashlib.sha256(b"".join(p.numpy().tobytes() for p in parts)).hexdigest()
            drawn.setdefault(str(step), []).append([image, digest])
    (folder / f"{ranks}-{rank}.json").write_text(json.dumps(drawn))


def torchrun(processes, *command):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*launch, *map(str, command)], capture_output=True, text=True, timeout=300, env=environment)


def together(processes, *arguments):
    """The command line in forked processes with the environment variables of torchrun; their exit codes and outputs."""
    begun = begin(processes, *arguments)
    outputs = [process.communicate() for process in begun]
    return [process.returncode for process in begun], outputs


def begin(processes, *arguments):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "tests", "GROUP_RANK": 0}
    environment |= {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "OMP_NUM_THREADS": 1}
    return [
        fork(*arguments, environment={k: str(v) for k, v in {**environment, "RANK": rank, "LOCAL_RANK": rank}.items()})
        for rank in range(processes)
    ]


def test_1_2_and_4_processes_draw_identical_views(tmp_path, scenes):
    all_ = [(rank, ranks) for ranks in (1, 2, 4) for rank in range(ranks)]
    begun = [Forked(draw_views, str(scenes), tmp_path, rank, ranks) for rank, ranks in all_]
    for process in begun:
        _, err = process.communicate()
        assert process.returncode == 0, err
    streams = []
    for processes in (1, 2, 4):
        ranks = [json.loads((tmp_path / f"{processes}-{rank}.json").read_text()) for rank in range(processes)]
        streams.append({step: [draw for rank in ranks for draw in rank[step]] for step in ranks[0]})
    assert streams[0] == streams[1] == streams[2]
    assert [len(batch) for batch in streams[0].values()] == [8] * 5


def test_two_processes_train_and_resume(tmp_path, scenes, tiny_yaml):
    """The first part as a user starts it."""
    out = tmp_path / "run"
    arguments = ["-m", "gtsa", "pretrain", "--config", tiny_yaml, "--data", scenes, "--out", out]
    done = torchrun(2, *arguments, "--steps", 8)
    assert done.returncode == 0, done.stderr
    assert "2 x cpu" in done.stdout
    losses = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in losses] == [2, 4, 6, 8]
    codes, outputs = together(2, "pretrain", "--out", out, "--resume", "--steps", 12)
    assert codes == [0, 0], outputs
    assert "resumed from step-00000008" in "".join(out for out, _ in outputs)
    assert [p.name for p in (out / "exports" / "timm").iterdir()]
    code, _, err = run("pretrain", "--out", out, "--resume", "--learning-rate", "1")
    assert code == 2, err


def test_two_processes_share_dinos_centre(tmp_path, scenes, tiny_yaml):
    """The centre is of the logits of the whole batch, whoever made them."""
    config = tmp_path / "run.yaml"
    heads = "dino: {num_prototypes: 64, hidden_dim: 32, bottleneck_dim: 16}\ndrop_path: 0.0\n"  # depth is drawn in each process
    config.write_text(tiny_yaml.read_text().replace("steps: 12", "steps: 4") + "method: dino\n" + heads)
    actual = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        codes, outputs = together(processes, "pretrain", "--config", config, "--data", scenes, "--out", out)
        assert codes == [0] * processes, outputs
        tensors, _ = checkpoint.read(checkpoint.newest(out / "checkpoints")[0])
        actual.append(tensors["objective"]["centre.value"])
    assert actual[0].abs().max() > 1e-3
    torch.testing.assert_close(actual[1], actual[0], rtol=1e-4, atol=1e-6)


def test_two_processes_share_sinkhorns_batch(tmp_path, scenes, tiny_yaml):
    """Targets are of the rows of all processes. The first process alone measures a step and evaluates."""
    config = tmp_path / "run.yaml"
    heads = "dino: {num_prototypes: 64, hidden_dim: 32, bottleneck_dim: 16, targets: sinkhorn}\n"
    config.write_text(tiny_yaml.read_text().replace("steps: 12", "steps: 4") + f"method: dino\n{heads}{SAME}")
    for processes in (1, 2):
        out = tmp_path / str(processes)
        codes, outputs = together(processes, "pretrain", "--config", config, "--data", scenes, "--out", out)
        assert codes == [0] * processes, outputs
    assert losses_of(tmp_path / "2") == pytest.approx(losses_of(tmp_path / "1"), rel=1e-4)


SAME = "drop_path: 0.0\n"  # depth is drawn in each process


def resume_from_4(run_folder, copy, *arguments, processes):
    """Resumes a copy of a run as it was after four steps; its losses from there on."""
    shutil.copytree(run_folder, copy)
    for path in checkpoint.listing(copy / "checkpoints"):
        if path.name != checkpoint.name(4):
            shutil.rmtree(path)
    codes, outputs = together(processes, "pretrain", "--out", copy, "--resume", *arguments)
    assert codes == [0] * processes, outputs
    assert "resumed from step-00000004" in "".join(out for out, _ in outputs)
    return losses_of(copy)


def losses_of(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines}


@pytest.fixture
def sharded(tmp_path, scenes, tiny_yaml):
    """A run of two sharded processes, and the losses of one process with the same batches."""
    config = tmp_path / "run.yaml"
    config.write_text(tiny_yaml.read_text().replace("steps: 12", "steps: 8") + SAME)
    gtsa.pretrain(str(scenes), out=str(tmp_path / "one"), **TINY | {"steps": 8, "drop_path": 0.0})
    command = ["pretrain", "--config", config, "--data", scenes, "--out", tmp_path / "sharded"]
    codes, outputs = together(2, *command, "--shard", "--keep-checkpoints", "5")
    assert codes == [0, 0], outputs
    return tmp_path / "sharded", losses_of(tmp_path / "one"), command


@pytest.mark.long
def test_a_sharded_run_has_the_losses_of_one_process_which_resumes_it(tmp_path, sharded):
    folder, expected, _ = sharded
    assert losses_of(folder) == pytest.approx(expected, rel=1e-3)
    resumed = resume_from_4(folder, tmp_path / "alone", processes=1)
    assert resumed == pytest.approx(expected, rel=1e-3)
    assert list(resumed) == [2, 4, 6, 8]
    ours, theirs = (checkpoint.read(checkpoint.newest(f / "checkpoints")[0])[0] for f in (folder, tmp_path / "one"))
    assert {k: {n: t.shape for n, t in v.items()} for k, v in ours.items()} == {
        k: {n: t.shape for n, t in v.items()} for k, v in theirs.items()
    }


@pytest.mark.long
def test_a_checkpoint_is_resumed_with_and_without_shards(tmp_path, sharded):
    folder, expected, _ = sharded
    for name, source, flags in (
        ("ddp", folder, ()),
        ("shards", folder, ("--shard",)),
        ("shards-of-one", tmp_path / "one", ("--shard",)),
    ):
        assert resume_from_4(source, tmp_path / name, *flags, processes=2) == pytest.approx(expected, rel=1e-3), name


@pytest.mark.long
@pytest.mark.parametrize("flags", [(), ("--shard",)])
def test_two_processes_stop_when_one_is_told_to_and_resume_after_a_kill(tmp_path, sharded, flags):
    _, expected, command = sharded
    command = [*command[:-1], tmp_path / "stopped", *flags]
    both = begin(2, *command)
    wait_for(lambda: (tmp_path / "stopped/config.yaml").exists() or both[0].poll() is not None)
    both[1].send_signal(signal.SIGUSR1)  # it waits for a step
    for process in both:
        process.communicate()
    assert [process.returncode for process in both] == [75, 75]
    both = begin(2, *command, "--resume", *(("--keep-checkpoints", "5")))
    wait_for(lambda: (tmp_path / "stopped/checkpoints/step-00000004").exists() or both[0].poll() is not None)
    for process in both:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    codes, outputs = together(2, *command, "--resume")
    assert codes == [0, 0], outputs
    assert losses_of(tmp_path / "stopped") == pytest.approx(expected, rel=1e-3)


@pytest.mark.long
def test_adaptation_is_sharded_with_its_reference(tmp_path, sharded, finished):
    """The initial encoder, which Gram anchoring compares with, is sharded too. --eval saves the best network."""
    _, _, command = sharded
    labelled = ["--eval", "knn", "--eval-folds", "2", "--eval-train", classes(tmp_path / "classes")]
    losses = []
    for name, flags in (("whole", ()), ("shards", ("--shard",))):
        out = tmp_path / name
        codes, outputs = together(2, *command[:-1], out, "--init", finished, "--overwrite", *labelled, *flags)
        assert codes == [0, 0], outputs
        assert (out / "best" / "checkpoints").is_dir()
        losses.append(losses_of(out))
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def classes(folder):
    for n in range(2):
        make_scenes(folder / str(n), 12)
    return folder


def test_shard_of_one_process_is_refused(tmp_path, scenes):
    code, _, err = run("pretrain", "--data", scenes, "--out", tmp_path / "run", "--shard", "--device", "cpu")
    assert code == 2
    assert "this run has one: give --devices N" in err
    assert not (tmp_path / "run").exists()


def wait_for(condition):
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("waited for a minute")


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
        caught = user_error(error, "out")
        (folder / "reported").write_text(
            repr(error) if caught is None else f"{caught.code} {type(caught).__name__} {caught}"
        )


@pytest.mark.parametrize("kind", ["tensors", "objects"])
def test_a_process_whose_partner_is_killed_says_so(tmp_path, kind):
    both = [Forked(survive, tmp_path, kind, environment={"RANK": str(rank)}) for rank in range(2)]
    for process in both:
        process.communicate()
    assert both[1].returncode == -signal.SIGKILL
    message = (tmp_path / "reported").read_text()
    assert message.startswith("6 ProcessLost another process of this run ended")


def test_a_remaining_process_reports_that_the_first_process_is_gone(monkeypatch, capfd):
    """Of other remedies, which all processes share, the first one tells."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    for kind, line in ((ProcessLost, "gtsa: words\n"), (UserError, "")):

        def ended(*_, kind=kind):
            raise kind("words", 6)

        monkeypatch.setattr(gtsa, "check", ended)
        assert in_process(["check", "."]) == 6
        assert capfd.readouterr().err == line
