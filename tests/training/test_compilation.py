"""What torch.compile may fuse gives the numbers of the code as written, in one piece, and is compiled once."""

from __future__ import annotations

import contextlib
import copy
import unittest.mock
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

from gtsa import methods
from gtsa.core import compilation
from gtsa.core.compilation import compilable, compiling
from gtsa.core.errors import UserError
from gtsa.core.types import Views
from gtsa.data.batches.loader import collate
from gtsa.data.views import augment, augment_batch
from gtsa.data.views.multicrop import MultiCrop
from gtsa.models.backbone import Backbone
from gtsa.training.loop import train_step
from gtsa.training.optim import ScheduledAdamW
from gtsa.training.schedules import Constant

pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # dynamo
SETTINGS: dict[str, dict[str, object]] = {
    "gtsa": {"projector_dim": 16, "out_dim": 16, "predictor_dim": 16, "patch_start": 0.0},
    "dino": {"num_prototypes": 16, "hidden_dim": 16, "bottleneck_dim": 8, "freeze_last_layer": 0.0},
    "ibot": {"num_prototypes": 16, "hidden_dim": 16, "bottleneck_dim": 8, "freeze_last_layer": 0.0},
    "lejepa": {"num_slices": 8, "hidden_dim": 16, "proj_dim": 8},
    "mae": {"decoder_dim": 16, "decoder_depth": 1},
    "paka": {},
    "distill": {"teacher": "random:test_vit"},
}


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    compilation._failed.clear()
    torch._dynamo.reset()


def the_views() -> Views:
    cut = MultiCrop(global_crops_size=64, local_crops_size=32, local_crops_number=2)
    image = torch.randint(0, 256, (3, 96, 80), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    views = collate([cut(image, np.random.default_rng(i)) for i in range(3)])
    return augment.apply(views, torch.device("cpu"), (0.5,) * 3, (0.25,) * 3)


@pytest.mark.parametrize("precision", ["32-true", pytest.param("bf16-mixed", marks=pytest.mark.long)])
@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_a_step_of_every_method_is_compiled_once_and_in_one_piece(name: str, precision: str) -> None:
    torch.manual_seed(0)
    encoder = Backbone("test_vit", 64, drop_path=0.1, arguments={"depth": 2})
    method = methods.load_all()[name](encoder, **SETTINGS[name])
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)  # type: ignore[arg-type]
    module, optimizer = fabric.setup(method, ScheduledAdamW(method, Constant(1e-3), Constant(0.0)))
    module.train()
    views, losses, graphs = the_views(), [], []
    state = {key: value.clone() for key, value in method.state_dict().items()}
    moments = optimizer.optimizer.state_dict()
    for compiled in (False, True):
        method.load_state_dict(state)
        optimizer.optimizer.load_state_dict(moments)
        for step in range(3):
            torch.manual_seed(step)
            with compiling(compiled, pytest.fail, backend="aot_eager"):
                parts, accepted, *_ = train_step(module, optimizer, [views], 1, fabric, step / 3, (step + 1) / 3)
            losses.append(float(parts["loss"]))
            assert accepted
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert not torch._dynamo.utils.counters["graph_break"]
    assert graphs[2] == 0
    assert graphs[4] > 0  # of the second step
    assert graphs[5] == graphs[4]  # nothing is compiled after it
    close = 1e-5 if precision == "32-true" else 2e-2
    assert losses[3:] == pytest.approx(losses[:3], rel=close)


def test_augmentation_in_batches_is_compiled_once_for_all_recipes() -> None:
    cut = MultiCrop(global_crops_size=32, local_crops_number=0)
    image = torch.randint(0, 256, (3, 48, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    graphs = []
    for seed in range(4):
        crops = collate([cut(image, np.random.default_rng([seed, i])) for i in range(4)]).global_crops
        expected = augment_batch.finish(crops, (0.5,) * 3, (0.25,) * 3, True, torch.device("cpu"))
        with compiling(True, pytest.fail, backend="aot_eager"):
            found = augment_batch.finish(crops, (0.5,) * 3, (0.25,) * 3, True, torch.device("cpu"))
        torch.testing.assert_close(found, expected)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs == [2] * 4  # a blend and a change of hue


def test_blocks_of_all_depths_share_their_graphs() -> None:
    torch.manual_seed(0)
    backbone = Backbone("test_vit", 64, drop_path=0.3, arguments={"depth": 4}).train()
    with compiling(True, pytest.fail, backend="aot_eager"):
        backbone.side_by_side([torch.randn(2, 3, 64, 64), torch.randn(3, 3, 32, 32)])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.long
def test_inductor_gives_the_same_losses_and_gradients() -> None:
    torch.manual_seed(0)
    encoder = Backbone("test_vit", 64, drop_path=0.1, arguments={"depth": 2})
    method = methods.load_all()["gtsa"](encoder, **SETTINGS["gtsa"]).train()
    views, found = the_views(), []
    for compiled in (False, True):
        torch.manual_seed(1)
        with compiling(compiled, pytest.fail):
            parts = method(views, 0.5)
            parts["loss"].backward()
        found.append({**parts, **{k: p.grad for k, p in method.named_parameters() if p.grad is not None}})
        method.zero_grad(set_to_none=True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, rtol=1e-4, atol=1e-6)


def test_nothing_is_compiled_outside() -> None:
    doubled = compilable(lambda x: 2 * x)
    assert doubled(torch.ones(2)).tolist() == [2, 2]
    with compiling(False, pytest.fail):
        assert doubled(torch.ones(2)).tolist() == [2, 2]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0


def test_what_cannot_be_compiled_runs_as_written_and_says_so_once() -> None:
    @compilable
    def listed(x: torch.Tensor) -> list[float]:
        return [value * 2 for value in x.tolist() if value > 0]

    lines: list[str] = []
    with compiling(True, lines.append, backend="aot_eager"):
        assert [listed(torch.tensor([-1.0, 3.0])) for _ in range(2)] == [[6.0], [6.0]]
    assert len(lines) == 1
    assert "listed is not compiled: " in lines[0]


def refuses_backward(message: str, module: str) -> Any:
    """A backend that compiles forward passes alone."""

    def fail(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        raise type("LoweringError", (Exception,), {"__module__": module})(message)

    return aot_autograd(fw_compiler=lambda graph, inputs: make_boxed_func(graph.forward), bw_compiler=fail)


def test_where_the_backward_pass_alone_cannot_be_compiled_training_goes_on_and_counts_nothing_twice() -> None:
    torch.manual_seed(0)
    method = methods.load_all()["dino"](Backbone("test_vit", 64, arguments={"depth": 2}), **SETTINGS["dino"])
    fabric = Fabric(accelerator="cpu", devices=1)
    module, optimizer = fabric.setup(method, ScheduledAdamW(method, Constant(1e-3), Constant(0.0)))
    module.train()
    views, states, lines = the_views(), [], list[str]()
    start = {key: value.clone() for key, value in method.state_dict().items()}
    moments = copy.deepcopy(optimizer.optimizer.state_dict())
    for compiled in (False, True):
        method.load_state_dict(start)
        optimizer.optimizer.load_state_dict(copy.deepcopy(moments))
        for step in range(2):
            torch.manual_seed(step)
            with compiling(compiled, lines.append, backend=refuses_backward("no such kernel\nfor this", "vendor")):
                train_step(module, optimizer, [views], 1, fabric, step / 3, (step + 1) / 3)
        states.append({key: value.clone() for key, value in method.state_dict().items()})
    assert sorted(lines) == sorted(set(lines))  # each function once, not once a step
    assert "block is not compiled: LoweringError: no such kernel" in lines
    for key, value in states[0].items():  # weights, and the centres that the forward pass adds to
        torch.testing.assert_close(states[1][key], value, rtol=1e-4, atol=1e-5, msg=key)
    assert not torch.equal(states[0]["centre.value"], start["centre.value"])


def test_a_compiled_function_that_fails_as_it_runs_says_what_to_do() -> None:
    """As an older PyTorch does, which compiles the backward pass only once it is called."""
    doubled = compilable(lambda x: (2 * x).sin())
    x = torch.ones(2, requires_grad=True)
    backend = refuses_backward("out of registers", "triton.compiler")
    with (
        unittest.mock.patch.object(compilation, "_backward_at_once", contextlib.nullcontext),
        pytest.raises(
            UserError, match="a compiled function failed: LoweringError: out of registers; give --compile off"
        ) as raised,
        compiling(True, pytest.fail, backend=backend),
    ):
        doubled(x).sum().backward()
    assert raised.value.code == 6


def test_errors_of_the_function_stay_its_own() -> None:
    @compilable
    def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a @ b

    with compiling(True, pytest.fail, backend="aot_eager"):
        product(torch.ones(2, 2), torch.ones(2, 2))
    with pytest.raises(RuntimeError, match="shape"), compiling(True, lambda line: None, backend="aot_eager"):
        product(torch.ones(2, 2), torch.ones(3, 2))
