"""Two or three processes: what they send in a step, a fault in one of them, and --shard against DDP and a single process."""

from __future__ import annotations

import socket
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from torch.profiler import ProfilerActivity, profile

from forking import Forked
from gtsa import methods
from gtsa.core.compilation import compiling
from gtsa.core.errors import UserError
from gtsa.core.types import Method, Replaced, StepResult, Views
from gtsa.data.batches.loader import collate
from gtsa.data.views import augment
from gtsa.data.views.multicrop import MultiCrop
from gtsa.models.backbone import Backbone
from gtsa.training import sharding
from gtsa.training.devices import check_shard, launch_fabric
from gtsa.training.exchange import Exchange
from gtsa.training.loop import train_step
from gtsa.training.optim import ScheduledAdamW
from gtsa.training.schedules import Constant

HEADS = {"num_prototypes": 16, "hidden_dim": 16, "bottleneck_dim": 8}
SETTINGS: dict[str, dict[str, Any]] = {
    "gtsa": {"projector_dim": 16, "out_dim": 16, "predictor_dim": 16, "patch_start": 0.3},
    "dino": {**HEADS, "freeze_last_layer": 0.3},
    "ibot": {**HEADS, "freeze_last_layer": 0.3, "mask_probability": 1.0},
    "lejepa": {"num_slices": 8, "hidden_dim": 16, "proj_dim": 8},
    "mae": {"decoder_dim": 16, "decoder_depth": 1},
    "paka": {},
    "distill": {"teacher": "random:test_vit"},
}
STEPS = 3


def build(name: str, model: str = "test_vit", **options: Any) -> Method:
    torch.manual_seed(0)
    arguments = {"depth": 2} if model == "test_vit" else {"depth": 2, "embed_dim": 48, "num_heads": 2}
    encoder = Backbone(model, 64, arguments=arguments)
    encoder.recompute = options.pop("recompute", False)
    method: Method = methods.load_all()[name](encoder, **SETTINGS[name])
    return method


def the_views(step: int, rank: int, ranks: int, images: int = 4) -> Views:
    """This process's part of a batch of images."""
    cut = MultiCrop(global_crops_size=64, local_crops_size=32, local_crops_number=2)
    image = torch.randint(0, 256, (3, 96, 80), dtype=torch.uint8, generator=torch.Generator().manual_seed(step))
    drawn = [cut(image, np.random.default_rng(images * step + i)) for i in range(images)]
    each = images // ranks
    return augment.apply(collate(drawn[rank * each :][:each]), torch.device("cpu"), (0.5,) * 3, (0.25,) * 3)


def fabric_of(ranks: int, shard: bool, precision: str = "32") -> Fabric:
    return launch_fabric(SimpleNamespace(device="cpu", devices=ranks, nodes=1, precision=precision), shard)


def train(
    name: str, rank: int, ranks: int, shard: bool = False, spoil: int = -1, precision: str = "32", compiled: str = "",
    images: int = 4,
    **options: Any,
) -> tuple[dict[str, Any], Any]:  # fmt: skip
    """Some steps.

    Args:
        compiled: backend of torch.compile; none: the code as written.
        spoil: a step in which the gradients of the last process alone are not finite; its loss is.
    """
    method = build(name, **options)
    fabric = fabric_of(ranks, shard, precision)
    if shard:
        sharding.shard(method, fabric.device, precision == "bf16")
    optimizer = ScheduledAdamW(method, Constant(1e-2), Constant(0.04), clip=0.1)
    module, wrapped = fabric.setup(method, optimizer)
    module.train()
    parts_of, accepted = [], []
    for step in range(STEPS):
        torch.manual_seed(
            0
        )  # masks are alike in all processes: those of a batch would be drawn in one process otherwise
        views = the_views(step, rank, ranks, images)
        if step == spoil and rank == ranks - 1:
            assert isinstance(method.rotation_head, torch.nn.Module)
            method.rotation_head.register_forward_hook(to_infinity)
        elif spoil >= 0 and isinstance(method.rotation_head, torch.nn.Module):
            method.rotation_head._forward_hooks.clear()
        with compiling(bool(compiled), pytest.fail, backend=compiled):
            parts, one, *_ = train_step(module, wrapped, [views], 1, fabric, step / STEPS, (step + 1) / STEPS)
        parts_of.append({key: float(value) for key, value in parts.items()})
        accepted.append(float(one))
    weights = sharding.gathered(method.state_dict(), True)
    return {"parts": parts_of, "accepted": accepted, "weights": weights}, (module, wrapped, fabric)


def to_infinity(_: object, __: object, output: torch.Tensor) -> None:
    output.register_hook(lambda gradient: gradient * float("inf"))


def together(work: Any, folder: Path, *arguments: Any, ranks: int = 2) -> list[Any]:
    """The results of ``work(rank, *arguments)`` in processes with the environment of torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "tests", "GROUP_RANK": 0}
    shared |= {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "OMP_NUM_THREADS": 1}
    processes = [
        Forked(
            one_process, work, folder, rank, arguments,
            environment={key: str(value) for key, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()},
        )
        for rank in range(ranks)
    ]  # fmt: skip
    for process in processes:
        _, err = process.communicate(timeout=500)  # inductor takes minutes on a busy machine
        assert process.returncode == 0, err
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def one_process(work: Any, folder: Path, rank: int, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    torch.save(work(rank, *arguments), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


# What is sent


def count_collectives(rank: int, names: list[str]) -> dict[str, Any]:
    """{method, micro-batches: (collectives of a step by kind, buckets of gradients)}"""
    counts = {}
    for name in names:
        _, (module, wrapped, fabric) = train(name, rank, 2)
        buckets = module._forward_module._get_ddp_logging_data()["rebuilt_bucket_sizes"].split(",")
        for accumulate in (1, 3):
            batches = [the_views(i, rank, 2) for i in range(accumulate)]
            with profile(activities=[ProfilerActivity.CPU]) as recorded:
                train_step(module, wrapped, batches, accumulate, fabric, 0.9, 0.95)
            kinds = Counter(event.name for event in recorded.events() if event.name.startswith("c10d::"))
            counts[name, accumulate] = dict(kinds), len(buckets)
    return counts


def test_a_step_reduces_gradients_once_and_all_else_in_one_message(tmp_path: Path) -> None:
    """And one for the centres of DINO and iBOT."""
    counts = together(count_collectives, tmp_path, ["gtsa", "ibot"])
    assert counts[0] == counts[1]
    for (name, _), (kinds, buckets) in counts[0].items():
        assert buckets >= 1
        assert kinds == {"c10d::allreduce_": buckets + 1 + (name == "ibot")}, name


# A fault in one process


def train_both_ways(rank: int, name: str, spoil: int, options: dict[str, Any], ranks: int = 2) -> list[dict[str, Any]]:
    """Trained with DDP, then sharded. Only the second is compiled, if ``options`` compile."""
    written = {**options, "compiled": ""}
    return [train(name, rank, ranks, shard, spoil, **(options if shard else written))[0] for shard in (False, True)]


def test_a_gradient_that_is_not_finite_in_one_process_is_skipped_by_all(tmp_path: Path) -> None:
    by_rank = together(train_both_ways, tmp_path, "gtsa", 1, {})
    for first, second in zip(*by_rank, strict=True):  # DDP, then sharded
        assert first["accepted"] == second["accepted"] == [1, 0, 1]
        for key, value in first["weights"].items():
            assert torch.equal(value, second["weights"][key]), key
            assert torch.isfinite(value).all(), key


# Sharded, DDP, and one process


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gtsa", {}),
        *[
            pytest.param(name, {}, marks=pytest.mark.long)
            for name in ("dino", "ibot", "lejepa", "mae", "paka", "distill")
        ],
        pytest.param("gtsa", {"model": "vit_small_patch16_dinov3"}, marks=pytest.mark.long),  # its own forward pass
        pytest.param("gtsa", {"recompute": True}, marks=pytest.mark.long),
        pytest.param("gtsa", {"compiled": "aot_eager"}, marks=pytest.mark.long),
        pytest.param("gtsa", {"compiled": "inductor"}, marks=pytest.mark.long),
        pytest.param("gtsa", {"precision": "bf16"}, marks=pytest.mark.long),
    ],
)
def test_sharded_training_gives_the_numbers_of_ddp_and_of_one_process(
    tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    ddp, sharded = together(train_both_ways, tmp_path, name, -1, options)[0]
    close = 1e-4 if options.get("precision", "32") == "32" else 2e-2
    for expected, actual in zip(ddp["parts"], sharded["parts"], strict=True):
        assert actual == pytest.approx(expected, rel=close, abs=close)
    if name in ("gtsa", "dino", "lejepa", "paka", "distill") and not options:  # others draw masks in each process
        alone, _ = train(name, 0, 1)
        for expected, actual in zip(alone["parts"], sharded["parts"], strict=True):
            assert actual == pytest.approx(expected, rel=close, abs=close)
    start = build(name, **options).state_dict()
    for key, value in ddp["weights"].items():
        if name in ("lejepa", "paka") and key.endswith("encoder.vit.norm.bias"):
            continue  # a shift of all tokens does not change the loss: its gradient is rounding alone
        torch.testing.assert_close(sharded["weights"][key], value, rtol=close, atol=max(close, 2e-3), msg=key)
    assert any(not torch.equal(value, start[key]) for key, value in sharded["weights"].items())


def shards_of(rank: int) -> tuple[list[dict[str, Any]], list[int]]:
    """Trained with DDP, then sharded by three; and the sizes of this process's shards of the tensors it trains."""
    results = train_both_ways(rank, "gtsa", -1, {"images": 6}, 3)
    _, (module, _, _) = train("gtsa", rank, 3, shard=True)
    return results, [p.to_local().numel() for p in module.module.parameters()]


@pytest.mark.long
def test_three_processes_hold_uneven_shards_and_give_the_numbers_of_one(tmp_path: Path) -> None:
    """64 rows do not divide by three, and of a tensor with one row two processes hold nothing."""
    processes = together(shards_of, tmp_path, ranks=3)
    ddp, sharded = processes[0][0]
    alone, _ = train("gtsa", 0, 1, images=6)
    for expected, other, actual in zip(alone["parts"], ddp["parts"], sharded["parts"], strict=True):
        assert other == pytest.approx(expected, rel=1e-4, abs=1e-4)
        assert actual == pytest.approx(expected, rel=1e-4, abs=1e-4)
    for key, value in ddp["weights"].items():
        torch.testing.assert_close(sharded["weights"][key], value, rtol=1e-4, atol=2e-3, msg=key)
    sizes = list(zip(*(held for _, held in processes), strict=True))
    assert any(0 in each for each in sizes)
    assert any(0 < min(each) < max(each) for each in sizes)


# What the processes tell one another


def exchange(rank: int) -> list[Any]:
    """(request to stop, replaced, skipped) after each of six steps; an evaluation follows the fourth."""
    fabric = fabric_of(2, False)
    known, told = Exchange(fabric), []
    for step in range(1, 7):
        replaced = [Replaced(image=step, reason="damaged", by=0)] if (step, rank) in ((1, 1), (4, 0), (6, 1)) else []
        skipped = [10 * step + rank] if step == 3 else []  # both skip a step
        requested = step == 5 and rank == 1
        shared = torch.tensor([requested, bool(replaced)], dtype=torch.float32)
        torch.distributed.all_reduce(shared)  # as with the gradients
        done = StepResult(step, {}, 0.0, 0.0, replaced, skipped, shared)
        stopping = known.share(done, requested, now=step in (4, 6))
        told.append((stopping, [each[0] for each in done.replaced], done.skipped))
    return told


def test_processes_share_requests_and_images_one_step_later_or_at_once_before_an_evaluation(tmp_path: Path) -> None:
    first, second = together(exchange, tmp_path)
    assert first == second
    assert first == [
        (False, [], []),
        (False, [1], []),
        (False, [], [30, 31]),
        (False, [4], []),
        (False, [], []),
        (True, [6], []),
    ]


def hold(rank: int) -> dict[str, Any]:
    """How much of each parameter, gradient and moment a process holds, and the norms by which it clips."""
    _, (module, wrapped, _) = train("gtsa", rank, 2, shard=True)
    trained = [p for p in module.module.parameters() if p.requires_grad]
    states = [wrapped.optimizer.state[p] for p in trained]
    return {
        "whole": sum(p.numel() for p in module.module.parameters()),
        "here": sum(p.to_local().numel() for p in module.module.parameters()),
        "trained": sum(p.to_local().numel() for p in trained),
        "moments": sum(s[k].to_local().numel() for s in states for k in ("exp_avg", "exp_avg_sq")),
    }


def test_each_process_holds_half_of_weights_and_moments(tmp_path: Path) -> None:
    both = together(hold, tmp_path)
    whole = both[0]["whole"]
    assert sum(each["here"] for each in both) == whole
    for each in both:
        assert each["here"] == pytest.approx(whole / 2, rel=0.05)
        assert each["moments"] == 2 * each["trained"]


def test_one_process_and_fp16_are_refused() -> None:
    with pytest.raises(UserError, match="this run has one: give --devices N"):
        check_shard(SimpleNamespace(device="cpu", devices=1, nodes=1, precision="32"))
    with pytest.raises(UserError, match="choose --precision bf16 or 32"):
        check_shard(SimpleNamespace(device="cuda", devices=8, nodes=1, precision="fp16"))
