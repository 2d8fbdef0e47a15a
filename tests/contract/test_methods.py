"""What every method in gtsa/methods has to do."""

import inspect

import pytest
import torch

from gtsa import methods
from gtsa.core.settings import validated
from gtsa.core.types import Crops, Method, Views
from gtsa.models.backbone import Backbone
from gtsa.pretraining.settings import MethodSettings
from gtsa.pretraining.verdict import SCORES

METHODS = methods.load_all()


def small(maker):
    torch.manual_seed(0)
    given = dict.fromkeys(maker.given_weights, "random:test_vit")
    return maker(Backbone("vit_tiny_patch16_224", 64, drop_path=0.2, arguments={"depth": 2}), **given)


def views(batch=3, globals_=2, locals_=2):
    torch.manual_seed(1)
    groups = []
    for count, side in ((globals_, 64), (locals_, 32)):
        boxes = torch.tensor([0.0, 0, 80, 60], dtype=torch.float64).repeat(batch, count, 1)
        boxes[..., :2] += torch.arange(count)[:, None] * 3
        rotations = torch.randint(4, (batch, count))
        groups.append(Crops(torch.randn(batch, count, 3, side, side), boxes, rotations, torch.empty(0)))
    return Views.of(groups, torch.arange(batch))


def test_all_methods_are_discovered():
    assert {"gtsa", "dino", "ibot", "lejepa", "mae", "paka"} <= set(METHODS)


@pytest.mark.parametrize("name", METHODS)
class TestMethod:
    def test_is_a_method_with_plain_settings(self, name):
        assert issubclass(METHODS[name], Method)
        assert next(iter(inspect.signature(METHODS[name]).parameters)) == "encoder"
        settings = validated(MethodSettings[name], {})
        for key, field in type(settings).model_fields.items():
            assert field.description, f"{key} has no help in the docstring of {name}"

    def test_rules_about_settings_name_settings(self, name):
        settings = set(MethodSettings[name].model_fields)
        rules = METHODS[name].idle_settings
        assert {*rules, *(other for others in rules.values() for other in others)} <= settings
        assert set(METHODS[name].min_images_with) <= settings

    def test_losses_are_finite_scalars_and_reach_the_student_alone(self, name):
        method = small(METHODS[name]).train()
        parts = method(views(), 0.5)
        assert all(part.ndim == 0 and torch.isfinite(part) for part in parts.values())
        parts["loss"].backward()
        student = method.encoders["student"]
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in student.parameters())
        if method.encoders["teacher"] is not student:
            assert all(p.grad is None for p in method.encoders["teacher"].parameters())

    def test_the_legend_explains_every_part_of_the_progress_line(self, name):
        method = small(METHODS[name]).train()
        parts = [part for part in method(views(), 0.5) if not part.endswith("_accuracy")]
        shown = [part for part in parts if part != "loss"] or ["loss"]
        named = {
            word for entry in method.legend.split(";") for word in entry.partition("=")[0].replace(",", " ").split()
        }
        assert set(shown) <= named, "one entry for each: NAME = WHAT; ..."

    def test_the_loss_is_a_mean_over_the_batch(self, name, monkeypatch):
        if METHODS[name].min_images > 1:
            pytest.skip("its loss depends on the whole batch")
        monkeypatch.setattr(torch, "rand", lambda *shape: torch.full(shape, 0.3))  # all images draw alike
        method = small(METHODS[name]).eval()
        whole, one = views(batch=4), views(batch=4)
        halves = [
            one.each(lambda c, part=part: c.each(lambda t: t[part] if len(t) else t))
            for part in (slice(2), slice(2, 4))
        ]
        with torch.no_grad():
            together = method(whole, 0.5)["loss"]
            apart = sum(method(half, 0.5)["loss"] for half in halves) / 2
        torch.testing.assert_close(together, apart)

    def test_the_teacher_follows_and_stays_in_evaluation_mode(self, name):
        method = small(METHODS[name]).train()
        if method.encoders["teacher"] is method.encoders["student"]:
            return
        assert not method.encoders["teacher"].training
        teacher = [p.clone() for p in method.encoders["teacher"].parameters()]
        with torch.no_grad():
            for p in method.encoders["student"].parameters():
                p.add_(1)
        method.after_step(0.4, 0.5, torch.tensor(0.0))
        assert all(torch.equal(a, b) for a, b in zip(teacher, method.encoders["teacher"].parameters(), strict=True))
        method.after_step(0.4, 0.5, torch.tensor(1.0))
        assert not any(torch.equal(a, b) for a, b in zip(teacher, method.encoders["teacher"].parameters(), strict=True))

    def test_the_same_seed_gives_the_same_step(self, name):
        losses = []
        for _ in range(2):
            method = small(METHODS[name]).train()
            torch.manual_seed(5)
            losses.append(method(views(), 0.5)["loss"].item())
        assert losses[0] == losses[1]

    def test_diagnoses_are_per_image(self, name):
        metrics = small(METHODS[name]).eval().diagnose(views())
        assert next(iter(metrics)) in SCORES
        assert all(values.shape == (3,) and torch.isfinite(values).all() for values in metrics.values())
