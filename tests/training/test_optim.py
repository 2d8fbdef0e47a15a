"""AdamW with schedules, clipping of each tensor, and steps left out on the device's word."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gtsa.training.optim import ScheduledAdamW, clip_each, schedule_layers, split_by_decay
from gtsa.training.schedules import Constant, Cosine

few = settings(deadline=None, max_examples=40)


def network(dtype=torch.float64):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 5), nn.LayerNorm(5)).to(dtype)
    model.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)
    model.scale = nn.Parameter(torch.tensor(2.0, dtype=dtype))
    return model


def gradients_of(seed, model, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.grad = scale * torch.randn(p.shape, dtype=torch.float64, generator=generator).to(p.dtype)


def state(optimizer):
    return [v.clone() for s in optimizer.state.values() for v in s.values()]


@few
@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=6), st.floats(0.01, 10))
def test_clipping_is_torchs_of_every_tensor_by_itself(scales, largest):
    generator = torch.Generator().manual_seed(0)
    ours = [s * torch.randn(3, i + 1, dtype=torch.float64, generator=generator) for i, s in enumerate(scales)]
    parameters = [nn.Parameter(g.clone()) for g in ours]
    expected = []
    for parameter, gradient in zip(parameters, ours, strict=True):
        parameter.grad = gradient.clone()
        expected.append(nn.utils.clip_grad_norm_(parameter, largest))
    norms = clip_each(ours, largest)
    torch.testing.assert_close(norms, torch.stack(expected), rtol=1e-12, atol=0)
    for gradient, parameter in zip(ours, parameters, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-12, atol=0)
        assert gradient.norm() <= largest


def test_clipping_by_hand():
    gradients = [torch.tensor([3.0, 4.0]), torch.tensor([[0.3], [0.4]]), torch.zeros(2)]
    assert clip_each(gradients, 1.0).tolist() == pytest.approx([5, 0.5, 0])
    assert gradients[0].tolist() == pytest.approx([0.6, 0.8], rel=1e-6)
    assert torch.equal(gradients[1], torch.tensor([[0.3], [0.4]]))
    assert not gradients[2].any()


def test_zero_switches_clipping_off():
    gradients = [torch.tensor([300.0, 400.0])]
    assert clip_each(gradients, 0.0).tolist() == [500]
    assert gradients[0].tolist() == [300, 400]


def test_one_bad_tensor_shows_in_its_norm_alone():
    gradients = [torch.tensor([float("nan"), 1]), torch.tensor([float("inf"), 1]), torch.tensor([3.0, 4.0])]
    assert clip_each(gradients, 1.0).isfinite().tolist() == [False, False, True]
    assert gradients[2].tolist() == pytest.approx([0.6, 0.8], rel=1e-6)


def test_groups_are_by_dimension():
    model = network()
    decayed, plain = ScheduledAdamW(model, Constant(0.1), Constant(0.3)).param_groups
    expected = {name for name, p in model.named_parameters() if p.ndim > 1 and p.requires_grad}
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)] for p in decayed["params"]} == expected == {"0.weight", "2.weight"}
    assert {names[id(p)] for p in plain["params"]} == {"0.bias", "2.bias", "3.weight", "3.bias", "scale"}
    for clipped in (decayed, plain):
        assert clipped["betas"] == (0.9, 0.999)


def test_exempt_parameters_are_not_decayed_and_the_order_stays():
    model = network()
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, spared = split_by_decay(model.named_parameters(), lambda name: name == "2.weight")
    order = [name for name, p in model.named_parameters() if p.requires_grad]
    assert [names[id(p)] for p in decayed["params"]] == ["0.weight"] and decayed["decayed"] is True
    assert [names[id(p)] for p in spared["params"]] == [name for name in order if name != "0.weight"]
    assert spared["decayed"] is False


def test_layers_learn_at_their_own_rates():
    model = network()
    layers = [
        (0.25, {"params": [model[0].weight], "decayed": True}),
        (1.0, {"params": [model[2].bias], "decayed": False}),
    ]
    optimizer = ScheduledAdamW(schedule_layers(layers, lambda scale: Cosine(scale, 0.0)), Constant(0.1), Constant(0.3))
    optimizer.set_time(0.5)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.1 * 0.125, 0.1 * 0.5])
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.3, 0.0]


def test_schedules_set_rate_and_decay():
    optimizer = ScheduledAdamW(network(), Cosine(1.0, 0.0), Cosine(0.04, 0.4))
    for time, rate, decay in ((0.0, 1, 0.04), (0.5, 0.5, 0.22), (1.0, 0, 0.4)):
        optimizer.set_time(time)
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([rate] * 2)
        assert [g["weight_decay"] for g in optimizer.param_groups] == pytest.approx([decay, 0])


def test_steps_are_those_of_adamw_by_its_formula():
    model = network()
    optimizer = ScheduledAdamW(model, Constant(0.01), Constant(0.3), betas=(0.8, 0.9))
    optimizer.set_time(0.0)
    trained = [p for p in model.parameters() if p.requires_grad]
    expected = [p.detach().clone() for p in trained]
    first, second = ([torch.zeros_like(p) for p in trained] for _ in range(2))
    for step in (1, 2, 3):
        gradients_of(step, model)
        optimizer.step()
        for i, p in enumerate(trained):
            first[i] = 0.8 * first[i] + 0.2 * p.grad
            second[i] = 0.9 * second[i] + 0.1 * p.grad**2
            decay = 0.3 if p.ndim > 1 else 0
            unbiased = first[i] / (1 - 0.8**step), second[i] / (1 - 0.9**step)
            expected[i] = expected[i] * (1 - 0.01 * decay) - 0.01 * unbiased[0] / (unbiased[1].sqrt() + 1e-8)
    for p, value in zip(trained, expected, strict=True):
        torch.testing.assert_close(p.detach(), value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1.0])
def test_found_inf_leaves_parameters_and_moments_alone(bad):
    model = network(torch.float32)
    optimizer = ScheduledAdamW(model, Constant(0.01), Constant(0.3))
    optimizer.set_time(0.0)
    for step in range(2):
        gradients_of(step, model)
        optimizer.found_inf = torch.tensor(0.0)
        optimizer.step()
    kept, moments = copy.deepcopy(model.state_dict()), state(optimizer)
    gradients_of(2, model, bad)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(kept.values(), model.state_dict().values(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(moments, state(optimizer), strict=True))
    gradients_of(2, model)
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    assert not torch.equal(kept["0.weight"], model.state_dict()["0.weight"])


def test_a_step_left_out_does_not_count():
    models = [network(torch.float32) for _ in range(2)]
    optimizers = [ScheduledAdamW(m, Constant(0.01), Constant(0.3)) for m in models]
    for optimizer in optimizers:
        optimizer.set_time(0.0)
    for step, skipped in ((0, 0.0), (7, 1.0), (1, 0.0)):
        for i, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            if i == 0 or not skipped:
                gradients_of(step, model)
                optimizer.found_inf = torch.tensor(skipped)
                optimizer.step()
    assert torch.equal(models[0][0].weight, models[1][0].weight)


def test_gradients_leave_out_what_has_none():
    model = network()
    optimizer = ScheduledAdamW(model, Constant(0.01), Constant(0.3))
    assert optimizer.gradients == []
    model[0].bias.grad = torch.ones(4, dtype=torch.float64)
    assert [g.tolist() for g in optimizer.gradients] == [[1, 1, 1, 1]]


def test_a_module_of_one_kind_of_parameters_has_one_group():
    assert len(ScheduledAdamW(nn.LayerNorm(3), Constant(0.1), Constant(0.3)).param_groups) == 1
