"""What runs on a GPU is what runs on a CPU, but for the last digits. Skipped where there is no GPU."""

import copy
import json
import math

import pytest
import torch
from lightning_fabric import Fabric

from conftest import TINY
from contract.test_evaluations import SMALL, backbone, kinds, sets
from contract.test_methods import views
from gtsa import methods
from gtsa.core.types import Colour, Crops, Views
from gtsa.data.views import augment
from gtsa.data.views.recipe import ORDERS
from gtsa.evaluation import evaluators
from gtsa.evaluation.context import EvalContext
from gtsa.models.backbone import Backbone
from gtsa.pretraining.pretrain import pretrain
from gtsa.training.devices import PRECISIONS
from gtsa.training.loop import train_step
from gtsa.training.optim import ScheduledAdamW
from gtsa.training.schedules import Constant

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
RATE = 1e-3
LEARNT_LATE = {"detection", "finetune"}  # a few steps from random weights: the last digits decide the detections


@pytest.fixture(autouse=True)
def _whole_digits(monkeypatch):
    """A GPU's convolutions keep ten bits of a number by default."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def stepped(name, device, precision="32"):
    """Parts of two steps on the same views, and the student's weights after them; without drop path, whose draws are
    the device's own."""
    fabric = Fabric(accelerator=device, devices=1, precision=PRECISIONS[precision])
    torch.manual_seed(0)
    kind = methods.load_all()[name]
    given = dict.fromkeys(kind.given_weights, "random:test_vit")
    method = kind(Backbone("vit_tiny_patch16_224", 64, arguments={"depth": 2}), **given)
    module, wrapped = fabric.setup(method, ScheduledAdamW(method, Constant(RATE), Constant(0.04)))
    module.train()
    seen = views().each(lambda crops: crops.each(lambda tensor: tensor.to(fabric.device)))
    actual = []
    for step in range(2):
        torch.manual_seed(step)  # of masks, which are drawn on the host
        parts, accepted, *_ = train_step(module, wrapped, [seen], 1, fabric, 0.5 + step / 10, 0.6 + step / 10)
        assert accepted == 1
        actual.append({name: float(value) for name, value in parts.items()})
    weights = torch.cat([p.detach().cpu().flatten() for p in method.encoders["student"].parameters()])
    return actual, weights


@pytest.mark.parametrize("name", sorted(methods.load_all()))
def test_a_step_is_that_of_the_cpu(name):
    (here, weights), (there, same) = stepped(name, "cpu"), stepped(name, "cuda")
    for mine, reference in zip(here, there, strict=True):
        assert reference == pytest.approx(mine, rel=2e-3, abs=1e-5)
    assert float((weights - same).abs().max()) < 2 * 2 * RATE  # Adam's first steps are of the size of the rate
    assert float((weights - same).abs().mean()) < RATE / 10


@pytest.mark.parametrize("name", sorted(methods.load_all()))
def test_bf16_is_near(name):
    (full, _), (half, _) = (stepped(name, "cuda", precision) for precision in ("32", "bf16"))
    assert half[0]["loss"] == pytest.approx(full[0]["loss"], rel=0.05)


def test_augmentation_is_that_of_the_cpu():
    draw = torch.Generator().manual_seed(0)
    count, side = len(ORDERS), 24
    pixels = torch.randint(0, 256, (count, 2, 3, side, side), dtype=torch.uint8, generator=draw)
    colours = torch.rand(count, 2, len(Colour), generator=draw)
    colours[..., Colour.ORDER] = torch.arange(count)[:, None]
    colours[..., Colour.HUE] -= 0.5
    colours[..., Colour.GRAYSCALE] = (colours[..., Colour.GRAYSCALE] > 0.8).float()
    colours[..., Colour.SOLARIZE] = (colours[..., Colour.SOLARIZE] > 0.8).float()
    rotations = torch.randint(4, (count, 2), generator=draw)
    seen = Views.of([Crops(pixels, torch.zeros(count, 2, 4, dtype=torch.float64), rotations, colours)])
    here, there = (
        augment.apply(seen, torch.device(device), (0.5,) * 3, (0.25,) * 3).global_crops for device in ("cpu", "cuda")
    )
    assert there.pixels.device.type == there.boxes.device.type == there.rotations.device.type == "cuda"
    far = (there.pixels.cpu() - here.pixels).abs() > 1e-3
    assert float(far.double().mean()) < 1e-3  # a value beside the threshold of solarisation, a hue beside a sector


def metrics_on(device, name, kind):
    torch.manual_seed(0)
    evaluator = evaluators.load_all()[name](**SMALL.get(name, {}))
    train, val = sets(kind)
    fabric = Fabric(accelerator=device, devices=1)
    network = copy.deepcopy(backbone()).to(fabric.device)
    per_image = evaluator(
        network, train if evaluator.uses_train_set else None, val, EvalContext(fabric, batch_size=16, seed=3)
    )
    return evaluator.metrics(per_image)


@pytest.mark.parametrize(("name", "kind"), kinds())
def test_evaluations_give_the_metrics_of_the_cpu(name, kind):
    here, there, again = (metrics_on(device, name, kind) for device in ("cpu", "cuda", "cuda"))
    assert there.keys() == here.keys()
    if name != "clusters":
        assert there == pytest.approx(again, rel=1e-4, abs=1e-4, nan_ok=True)
    for figure, value in there.items():
        if name in LEARNT_LATE or math.isnan(here[figure]):
            assert math.isfinite(value) or math.isnan(here[figure])
        else:
            assert value == pytest.approx(here[figure], rel=0.05, abs=3.0), figure


@pytest.mark.parametrize("method", sorted(methods.load_all()))
def test_pretraining_takes_bf16_by_itself_and_resumes_bit_for_bit(tmp_path, scenes, method):
    settings = {key: value for key, value in TINY.items() if key not in methods.load_all() or key == method}
    given = dict.fromkeys(methods.load_all()[method].given_weights, "random:test_vit")
    settings |= {"method": method, "deterministic": True, **({method: given} if given else {})}
    whole = pretrain(str(scenes), **settings, out=str(tmp_path / "whole"))
    assert "precision: bf16" in (whole.folder / "config.yaml").read_text()
    pretrain(str(scenes), **settings, out=str(tmp_path / "part"))
    for step in (8, 12):  # as if it had been killed after step 4
        for step_folder in (tmp_path / "part" / "checkpoints").glob(f"step-*{step:02d}"):
            for file in step_folder.iterdir():
                file.unlink()
            step_folder.rmdir()
    again = pretrain(str(scenes), **settings, out=str(tmp_path / "part"), resume=True)
    losses = [
        [json.loads(line)["loss"] for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
        for run in (whole, again)
    ]
    assert losses[0] == losses[1]
    kept = [max((run.folder / "checkpoints").glob("step-*")) / "objective.safetensors" for run in (whole, again)]
    assert kept[0].read_bytes() == kept[1].read_bytes()
