"""LeJEPA against its algorithm, written out slowly in float64; its batch norm; and over two processes."""

import cmath
import math

import numpy as np
import pytest
import torch

from conftest import run
from forking import Forked
from gtsa.core.errors import UserError
from gtsa.core.settings import Plan, validated
from gtsa.core.types import Crops, Views
from gtsa.methods.lejepa import LeJEPA
from gtsa.methods.parts.batch_norm import BatchNorm
from gtsa.methods.parts.sigreg import draw_directions
from gtsa.models.backbone import Backbone
from gtsa.pretraining import plan
from gtsa.pretraining.settings import Pretrain

SMALL = {"num_slices": 5, "hidden_dim": 12, "proj_dim": 3}


def method(model="vit_tiny_patch16_224", **settings):
    torch.manual_seed(0)
    encoder = Backbone(model, 64, arguments={"depth": 1, "embed_dim": 48, "num_heads": 3})
    return LeJEPA(encoder, **{**SMALL, **settings}).double()


def views(batch=3, globals_=2, locals_=2, seed=1):
    draw = torch.Generator().manual_seed(seed)
    groups = []
    for count, side in ((globals_, 64), (locals_, 32))[: 2 if locals_ else 1]:
        pixels = torch.randn(batch, count, 3, side, side, generator=draw, dtype=torch.float64)
        boxes = torch.zeros(batch, count, 4, dtype=torch.float64)
        groups.append(Crops(pixels, boxes, torch.zeros(batch, count, dtype=torch.int64), torch.empty(0)))
    return Views.of(groups, torch.arange(batch))


def embeddings_by_hand(lejepa, seen):
    """[V, B, D]: every view by itself, then the head, layer after layer, on all rows."""
    tokens = [lejepa.encoder(c.pixels[:, n]).prefix[:, 0].numpy() for c in seen.groups for n in range(c.count)]
    rows = np.concatenate(tokens)
    for layer in lejepa.head:
        if isinstance(layer, torch.nn.Linear):
            rows = rows @ layer.weight.numpy().T + (0 if layer.bias is None else layer.bias.numpy())
        elif isinstance(layer, BatchNorm):
            deviation = np.sqrt(((rows - rows.mean(0)) ** 2).mean(0) + 1e-5)
            rows = (rows - rows.mean(0)) / deviation * layer.weight.numpy() + layer.bias.numpy()
        else:
            rows = np.maximum(rows, 0)
    return rows.reshape(len(tokens), -1, rows.shape[1])


def epps_pulley_by_hand(sample):
    knots = np.linspace(-5, 5, 17)
    errors = [
        abs(sum(cmath.exp(1j * t * x) for x in sample) / len(sample) - math.exp(-t * t / 2)) ** 2
        * math.exp(-t * t / 2)
        for t in knots
    ]  # fmt: skip
    return len(sample) * np.trapezoid(errors, knots)


@pytest.mark.parametrize(("globals_", "locals_"), [(2, 2), (3, 1), (1, 1), (2, 0)])
@torch.no_grad()
def test_the_loss_is_the_published_one(globals_, locals_):
    lejepa, seen = method(sigreg_weight=0.3).eval(), views(globals_=globals_, locals_=locals_)
    for p in lejepa.head.parameters():
        p.add_(0.1 * torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(3)))
    z = embeddings_by_hand(lejepa, seen)
    centres = z[:globals_].mean(0)
    prediction = np.mean([(view - centres) ** 2 for view in z])
    directions = draw_directions(3, 5, 0.25).double().numpy()
    sigreg = np.mean([epps_pulley_by_hand(view @ directions[:, m]) for view in z for m in range(5)])
    parts = lejepa(seen, 0.25)
    assert parts["prediction"].item() == pytest.approx(prediction, rel=1e-9)
    assert parts["sigreg"].item() == pytest.approx(sigreg, rel=1e-6)
    assert parts["loss"].item() == pytest.approx(0.7 * prediction + 0.3 * sigreg, rel=1e-6)


def test_directions_are_drawn_anew_at_every_step():
    lejepa, seen = method().eval(), views()
    values = [lejepa(seen, time)["sigreg"].item() for time in (0.1, 0.1, 0.2)]
    assert values[0] == values[1] != values[2]


def test_no_gradient_is_stopped_at_the_centres():
    """The gradient of the prediction with respect to an embedding is that of the whole formula."""
    lejepa, seen = method(sigreg_weight=0.0), views()
    z = torch.cat(lejepa.embed(seen.groups), 1).detach().requires_grad_()
    lejepa.embed = lambda groups: [z[:, :2], z[:, 2:]]
    assert torch.autograd.gradcheck(lambda _: lejepa(seen, 0.5)["prediction"], (z,))


def collapse(weight):
    """Standard deviation of the embeddings over images, after some steps."""
    lejepa, seen = method(sigreg_weight=weight, num_slices=64, hidden_dim=32).float(), views(batch=32)
    seen = seen.each(lambda crops: crops.each(lambda t: t.float() if t.dtype == torch.float64 else t))
    optimizer = torch.optim.AdamW(lejepa.parameters(), lr=3e-3)
    for step in range(40):
        optimizer.zero_grad()
        lejepa(seen, step / 40)["loss"].backward()
        optimizer.step()
    with torch.no_grad():
        return lejepa.embed(seen.groups)[0].mean(1).std(0).mean().item()


def test_sigreg_prevents_collapse():
    assert collapse(0.0) < 0.1
    assert collapse(0.2) > 0.5


def test_the_mean_of_the_patches_is_embedded_where_there_is_no_cls_token():
    with_cls, without = method(), method("vit_base_patch16_siglip_224")
    assert (with_cls.encoder.pooling, without.encoder.pooling) == ("cls", "mean")
    assert without.encoder.num_prefix_tokens == 0
    tokens = without.encoder(views().global_crops.pixels[:, 0])
    assert torch.equal(without.encoder.pooled(tokens), tokens.patches.mean((1, 2)))
    assert without(views(), 0.5)["loss"].isfinite()


@pytest.mark.parametrize(
    "settings", [{"sigreg_weight": -0.1}, {"sigreg_weight": 1.5}, {"num_slices": 0}, {"hidden_dim": 0}, {"proj_dim": 0}]
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        method(**settings)


def test_the_weight_is_the_published_one_where_the_automatic_batch_is():
    for images, weight in ((38, 0.1), (1023, 0.1), (1024, 0.05), (118_287, 0.05)):
        ready = Plan(validated(Pretrain, {"method": "lejepa", "device": "cpu", "devices": 1}), {})
        plan.resolve_method(ready, LeJEPA.auto_settings, images)
        plan.resolve_budget(ready, images, LeJEPA.base_lr)
        assert ready.settings.lejepa.sigreg_weight == weight
        assert (ready.settings.batch_size >= 128) == (weight == 0.05)


def test_one_image_at_a_time_is_refused(tmp_path, scenes):
    arguments = ("--data", scenes, "--out", tmp_path / "run", "--method", "lejepa", "--batch-size", "4")
    code, _, err = run("pretrain", *arguments, "--accumulate", "4")
    assert code == 2
    assert "the method lejepa needs at least 2 images at a time on a device, not 1" in err
    assert not (tmp_path / "run").exists()


# Batch norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_norm_is_torchs(dtype):
    rows = (3 * torch.randn(20, 6, generator=torch.Generator().manual_seed(0)) + 1).to(dtype)
    ours, torchs = BatchNorm(6), torch.nn.BatchNorm1d(6, track_running_stats=False)
    with torch.no_grad():
        ours.weight.copy_(torch.linspace(0.5, 2, 6)), ours.bias.copy_(torch.linspace(-1, 1, 6))
    torchs.load_state_dict(ours.state_dict())
    for training in (True, False):
        assert torch.equal(ours.train(training)(rows), torchs.train(training)(rows))
    assert not list(ours.buffers())


# Several processes


def half_of(folder, rank):
    """What one of two processes does with its half of a batch."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    lejepa = method().train()
    seen = views(batch=4).each(lambda crops: crops.each(lambda t: t[2 * rank : 2 * rank + 2] if len(t) else t))
    parts = lejepa(seen, 0.5)
    parts["loss"].backward()
    values = {name: value.detach() for name, value in parts.items()}
    torch.save((values, {name: p.grad for name, p in lejepa.named_parameters()}), folder / f"{rank}.pt")
    torch.distributed.barrier()


def test_two_processes_have_the_losses_and_the_gradients_of_one(tmp_path):
    both = [Forked(half_of, tmp_path, rank) for rank in range(2)]
    for process in both:
        _, err = process.communicate()
        assert process.returncode == 0, err
    values, gradients = zip(*(torch.load(tmp_path / f"{rank}.pt") for rank in range(2)), strict=True)
    lejepa = method().train()
    parts = lejepa(views(batch=4), 0.5)
    parts["loss"].backward()
    for name, value in parts.items():
        torch.testing.assert_close((values[0][name] + values[1][name]) / 2, value.detach())
    for name, p in lejepa.named_parameters():
        torch.testing.assert_close((gradients[0][name] + gradients[1][name]) / 2, p.grad, msg=name)
