"""The loop: its guard against non-finite numbers, and micro-batches."""

import copy
from collections import deque

import pytest
import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins import MixedPrecision
from torch import nn

from gtsa.core.errors import UserError
from gtsa.core.types import Crops, Objective, Views
from gtsa.training.loop import fit
from gtsa.training.optim import ScheduledAdamW
from gtsa.training.schedules import Constant


class Regression(Objective):
    """Predicts the mean pixel of each image; ``wrong`` says at which calls what becomes non-finite."""

    def __init__(self, wrong=(), what="loss"):
        super().__init__()
        self.layer = nn.Linear(12, 1).double()
        self.shadow = copy.deepcopy(self.layer).requires_grad_(False)
        self.wrong, self.what, self.calls = set(wrong), what, 0
        self.accepted = []

    def forward(self, views, time):
        x = views.global_crops.pixels.flatten(1)
        error = (self.layer(x)[:, 0] - x.mean(1)) ** 2
        loss = error.mean()
        if self.calls in self.wrong:
            loss = loss * float("nan") if self.what == "loss" else spoil(loss)
        self.calls += 1
        return {"loss": loss}

    def after_step(self, time, next_time, accepted):
        self.accepted.append(float(accepted))
        with torch.no_grad():
            for mine, reference in zip(self.shadow.parameters(), self.layer.parameters(), strict=True):
                mine.lerp_(reference, 0.5 * float(accepted))


class Spoil(torch.autograd.Function):
    """Finite forwards, infinite backwards."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("inf")


spoil = Spoil.apply


def batches(steps, size=4, parts=1):
    for step in range(steps):
        pixels = torch.randn(size, 1, 3, 2, 2, generator=torch.Generator().manual_seed(step)).double()
        for part in pixels.chunk(parts):
            crops = Crops(part, torch.zeros(len(part), 1, 4), torch.zeros(len(part), 1), torch.empty(0))
            yield Views(crops, images=torch.arange(len(part)) + 100 * step)


def train(objective, steps, parts=1, skips=None):
    torch.manual_seed(0)
    optimizer = ScheduledAdamW(objective, Constant(0.01), Constant(0.04), clip=3.0)
    fabric = Fabric(accelerator="cpu", devices=1, precision="64-true")
    module, wrapped = fabric.setup(objective, optimizer)
    return fit(
        module, wrapped, batches(steps, parts=parts), lambda v: v,
        fabric=fabric, steps=steps, accumulate=parts, skips=skips,
    ), optimizer  # fmt: skip


def everything(objective, optimizer):
    moments = [v for state in optimizer.state.values() for v in state.values()]
    return [p.detach().clone() for p in objective.parameters()] + [m.clone() for m in moments]


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_touches_nothing(what):
    objective = Regression(wrong={3}, what=what)
    steps, optimizer = train(objective, 6)
    before, skipped = None, []
    for done in steps:
        now = everything(objective, optimizer)
        if done.step == 4:  # the step with the fault
            assert all(torch.equal(a, b) for a, b in zip(before, now, strict=True))
        elif before is not None:
            assert not all(torch.equal(a, b) for a, b in zip(before, now, strict=True))
        before = now
        assert all(torch.isfinite(t).all() for t in now)
        skipped += done.skipped
    assert objective.accepted == [1, 1, 1, 0, 1, 1]
    assert skipped == [300, 301, 302, 303]  # the images of that step


def test_fifty_faults_leave_no_trace():
    skips = deque()
    objective = Regression(wrong=set(range(60, 3060, 60)), what="gradient")
    steps, optimizer = train(objective, 3060, skips=skips)
    for _ in steps:
        pass
    assert objective.accepted.count(0.0) == 50
    assert all(torch.isfinite(t).all() for t in everything(objective, optimizer))


def test_three_in_a_hundred_end_the_run():
    steps, _ = train(Regression(wrong={5, 50, 90}), 200)
    with pytest.raises(UserError, match="diverged") as caught:
        for done in steps:
            assert done.step < 93
    assert caught.value.code == 5


def test_fp16_scales_and_its_overflows_are_no_faults():
    """With a scaler whose scale is far too large: it comes down, nothing non-finite passes, no step counts as lost."""
    objective = Regression()
    objective.layer.float(), objective.shadow.float()
    optimizer = ScheduledAdamW(objective, Constant(0.01), Constant(0.04), clip=3.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=1000)
    precision = MixedPrecision("16-mixed", device="cpu", scaler=scaler)
    fabric = Fabric(accelerator="cpu", devices=1, plugins=[precision])
    module, wrapped = fabric.setup(objective, optimizer)
    before, skips = everything(objective, optimizer)[0], deque()
    steps = fit(module, wrapped, map(single, batches(60)), lambda v: v, fabric=fabric, steps=60, skips=skips)
    skipped = [done.skipped for done in steps]
    assert objective.accepted[:5] == [0] * 5
    assert objective.accepted[-20:] == [1] * 20
    assert scaler.get_scale() < 2.0**30
    assert not skips
    assert not any(skipped)
    now = everything(objective, optimizer)
    assert not torch.equal(before, now[0])
    assert all(torch.isfinite(t).all() for t in now)


def single(views):
    return views.each(lambda crops: crops.each(lambda t: t.float() if t.dtype == torch.float64 else t))


def test_micro_batches_give_the_same_weights():
    whole, parts = Regression(), Regression()
    parts.load_state_dict(whole.state_dict())
    for _ in train(whole, 5)[0]:
        pass
    for _ in train(parts, 5, parts=4)[0]:
        pass
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_out_of_memory_says_what_to_do():
    objective = Regression()
    steps, _ = train(objective, 2)
    objective.forward = lambda views, time: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(UserError, match="--accumulate 2") as caught:
        next(steps)
    assert caught.value.code == 6
