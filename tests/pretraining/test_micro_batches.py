"""Micro-batches: what fits is tried, a trial leaves nothing behind, and the parts of a step give the step."""

import json
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning_fabric import Fabric

from gtsa import methods, pretrain
from gtsa.core.settings import validated
from gtsa.core.settings_file import read_yaml
from gtsa.core.types import Draw
from gtsa.data.batches.loader import ViewSet, collate
from gtsa.data.views import augment
from gtsa.data.views.multicrop import MultiCrop
from gtsa.methods.gtsa import GTSA
from gtsa.models.backbone import Backbone
from gtsa.pretraining import micro_batches
from gtsa.pretraining.cost import Cost
from gtsa.pretraining.settings import METHODS, Pretrain
from gtsa.training.devices import resolve_device
from gtsa.training.loop import train_step
from gtsa.training.optim import ScheduledAdamW
from gtsa.training.schedules import Constant

CUT = MultiCrop(global_crops_size=48, local_crops_size=32, local_crops_number=2)
HEADS = {"num_prototypes": 16, "hidden_dim": 16, "bottleneck_dim": 8}
SETTINGS = {"gtsa": {"projector_dim": 16, "out_dim": 16, "predictor_dim": 16}, "dino": HEADS}


def build(name):
    torch.manual_seed(0)
    return methods.load_all()[name](Backbone("test_vit", 48, arguments={"depth": 2}), **SETTINGS[name])


def views():
    noise = torch.Generator().manual_seed(0)
    images = [torch.randint(0, 256, (3, 64, 72), dtype=torch.uint8, generator=noise) for _ in range(4)]
    source = SimpleNamespace(read=lambda index, detail=None: images[index], range16=(0.0, 65535.0))
    return ViewSet(source, list(range(4)), CUT, 0)


def prepare(batch):
    return augment.apply(batch, torch.device("cpu"), (0.5,) * 3, (0.25,) * 3)


@given(st.integers(1, 64), st.integers(0, 80), st.data())
def test_the_largest_micro_batch_that_fits_is_found_from_wherever_the_plan_begins(batch, capacity, data):
    allowed = [n for n in range(1, batch + 1) if batch % n == 0]
    planned = data.draw(st.sampled_from(allowed))
    parts, tried = micro_batches._try(allowed, planned, lambda n: batch // n <= capacity)
    fitting = [n for n in allowed if batch // n <= capacity]
    assert (parts, tried) == ((fitting[0], True) if fitting else (batch, False))


def resolved(fits, bytes_image=2**20, free=100 * 2**20, **settings):
    ready = resolve_device(validated(Pretrain, {"batch_size": 64, "device": "cpu", **settings}))
    micro_batches.resolve_accumulate(ready, Cost(0.0, 0.0, 0.0, bytes_image, 0), free, fits)
    return ready.settings.accumulate, ready.reasons.get("accumulate")


def test_the_plan_is_tried_unless_a_step_is_small_or_the_user_chose():
    seen = []

    def fits(images):
        seen.append(images)
        return images <= 20

    assert resolved(fits, bytes_image=2**18) == (1, "a step fits in memory")  # 16 of 70 MiB
    assert resolved(fits, accumulate=2) == (2, None)
    assert not seen
    assert resolved(fits) == (4, "100 MiB of memory free; as tried, 16 images at a time fit")
    assert seen == [64, 32, 16]
    assert resolved(lambda images: False) == (64, "100 MiB of memory free; as tried, 1 images at a time do not fit")
    assert resolved(fits, bytes_image=2**24) == (4, "100 MiB of memory free; as tried, 16 images at a time fit")


def test_a_trial_leaves_nothing_behind(monkeypatch):
    monkeypatch.setattr(micro_batches, "TRIED", ("cpu",))
    monkeypatch.setattr(micro_batches, "free_memory", lambda device: 2**20)
    method, sizes = build("dino"), []
    forward = type(method).forward

    def limited(self, batch, time):
        sizes.append(len(batch.global_crops.pixels))
        parts = forward(self, batch, time)
        if sizes[-1] > 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return parts

    monkeypatch.setattr(type(method), "forward", limited)
    state = {key: value.clone() for key, value in method.state_dict().items()}
    fits = micro_batches.trial(method, views(), prepare, Fabric(accelerator="cpu", devices=1))
    assert [fits(count) for count in (6, 5, 1)] == [False, True, True]
    assert sizes == [6, 5, 1]
    assert all(torch.equal(value, state[key]) for key, value in method.state_dict().items())
    assert not method.centre.accumulated.any()
    assert all(p.grad is None for p in method.parameters())
    monkeypatch.setattr(type(method), "forward", lambda self, batch, time: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        fits(1)


def test_a_cpu_is_not_asked():
    assert micro_batches.trial(build("gtsa"), views(), prepare, Fabric(accelerator="cpu", devices=1)) is None


def test_a_run_splits_its_steps_where_the_plan_was_wrong(monkeypatch, tmp_path, scenes):
    monkeypatch.setattr(micro_batches, "TRIED", ("cpu",))
    monkeypatch.setattr(micro_batches, "free_memory", lambda device: 30 * 2**20)
    forward, sizes = GTSA.forward, []

    def limited(self, batch, time):
        sizes.append(len(batch.global_crops.pixels))
        if self.training and sizes[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(self, batch, time)

    monkeypatch.setattr("gtsa.pretraining.cost.MANY", 2)
    monkeypatch.setattr(GTSA, "forward", limited)
    small = {"model": "test_vit", "views": {"global_crops_size": 48, "local_crops_size": 32, "local_crops_number": 2}}
    small |= {"gtsa": SETTINGS["gtsa"], "hold_out": 0, "report": False}
    pretrain(str(scenes), out=str(tmp_path / "run"), steps=2, batch_size=8, device="cpu", workers=0, **small)
    assert read_yaml(tmp_path / "run" / "config.yaml")["accumulate"] == 4
    assert max(sizes) > 2  # it was tried
    rows = {row["name"]: row for row in json.loads((tmp_path / "run" / "plan.json").read_text())}
    assert rows["micro-batches"]["reason"] == "30 MiB of memory free; as tried, 2 images at a time fit"


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_micro_batches_give_the_step_of_the_whole_batch(name):
    """Without stochastic depth and masks, which are drawn for each micro-batch."""
    batch, weights = [views()[Draw(0, i)] for i in range(4)], []
    for count in (1, 2, 4):
        method = build(name)
        fabric = Fabric(accelerator="cpu", devices=1)
        groups = [{"params": [p for p in method.parameters() if p.requires_grad], "eps": 1.0}]  # not signs of gradients
        module, optimizer = fabric.setup(method, ScheduledAdamW(groups, Constant(0.1), Constant(0.0)))
        module.train()
        parts = [prepare(collate(batch[i::count])) for i in range(count)]
        for step in range(2):
            result, *_ = train_step(module, optimizer, parts, count, fabric, 0.5 + step / 4, 0.75 + step / 4)
        weights.append({**method.state_dict(), "loss": result["loss"]})
    for others in weights[1:]:
        for key, value in weights[0].items():
            torch.testing.assert_close(others[key], value, rtol=1e-3, atol=1e-4, msg=key)
    assert min(METHODS[each].constants["min_images"] for each in SETTINGS) == 1
