"""The contract of every evaluation in gtsa/evaluation/evaluators."""

import inspect
from functools import cache

import numpy as np
import pytest
import torch

from evaluating import labelled, make_context, noise
from gtsa.core.settings import validated
from gtsa.core.settings_file import read_yaml, to_yaml
from gtsa.data.labels import IGNORE, Boxes
from gtsa.evaluation import evaluators
from gtsa.evaluation.evaluator import Evaluator
from gtsa.evaluation.settings import EvaluatorSettings
from gtsa.models.backbone import Backbone

EVALUATORS = evaluators.load_all()
TRAIN, VAL, SIDE = 12, 6, 64
SMALL = {  # settings that make an evaluation quick; without an entry here it has its defaults
    "clusters": {"k": 4, "dimensions": 8, "size": 64, "repeats": 2},
    "detection": {"scale": 64, "steps": 2, "batch_size": 2, "width": 16},
    "finetune": {"epochs": 2.0, "batch_size": 8, "warmup": 1.0, "resize": 64, "crop": 64},
    "health": {"resize": 64, "crop": 64},
    "in_context": {"size": 64, "memory": 100},
    "instances": {"size": 64, "k": 3},
    "knn": {"k": (3, 5), "resize": 64, "crop": 64},
    "linear": {"steps": 10, "resize": 64, "crop": 64},
    "linear_segmentation": {"size": 64},
    "orientation": {"size": 64, "memory": 100, "k": 5},
    "position": {"size": 64, "memory": 100, "k": 5},
    "rotation": {"resize": 64, "crop": 64, "size": 64},
    "segmentation": {"size": 64, "steps": 3, "batch_size": 2},
}
TOGETHER = {"clusters"}  # fits something on all evaluation images together, so it depends on their order
ORDER = [3, 0, 5, 1, 4, 2]


def targets(kind, count, seed):
    draw = np.random.default_rng(seed)
    if kind == "classes":
        return [i % 7 for i in range(count)]
    if kind == "multilabel":
        return [torch.from_numpy(draw.random(7) < 0.5) for _ in range(count)]
    if kind == "masks":
        masks = [torch.from_numpy(draw.integers(0, 7, (4, 4))).repeat_interleave(16, 0) for _ in range(count)]
        masks = [mask.repeat_interleave(16, 1) for mask in masks]
        for mask in masks:
            mask[:5] = IGNORE
        return masks
    if kind == "boxes":
        return [boxes(draw) for _ in range(count)]
    return None


def boxes(draw, n=2):
    corners = torch.from_numpy(draw.integers(0, 30, (n, 2)))
    actual = torch.cat([corners, corners + 20], dim=1)
    masks = torch.zeros(n, SIDE, SIDE, dtype=torch.bool)
    for mask, (x1, y1, x2, y2) in zip(masks, actual.tolist(), strict=True):
        mask[y1:y2, x1:x2] = True
    classes = torch.from_numpy(draw.integers(0, 7, n))
    return Boxes(
        actual.float(), classes, masks, torch.zeros(n, dtype=torch.bool), masks.sum((1, 2)).float(),
        torch.from_numpy(draw.choice(10**6, n, replace=False)),
    )  # fmt: skip


@cache
def sets(kind):
    more = {"category_ids": tuple(range(1, 8)), "has_masks": True} if kind == "boxes" else {}
    classes = () if kind == "none" else "abcdefg"
    return [
        labelled(
            noise(count, SIDE, seed), targets(kind, count, seed), kind, classes,
            **more, **({"image_ids": tuple(range(10, 10 + count))} if kind == "boxes" else {}),
        )
        for count, seed in ((TRAIN, 0), (VAL, 1))
    ]  # fmt: skip


@cache
def backbone():
    torch.manual_seed(0)
    return Backbone("test_vit", 64).eval()


def kinds():
    return [(name, kind) for name, maker in EVALUATORS.items() for kind in maker.label_kinds]


@cache
def evaluated(name, kind, order=tuple(range(VAL)), run=0):
    """The evaluator, and PerImage of the images in this order; another ``run`` evaluates again."""
    evaluator = EVALUATORS[name](**SMALL.get(name, {}))
    train, val = sets(kind)
    torch.manual_seed(run), np.random.seed(run)
    return evaluator, evaluator(
        backbone(), train if evaluator.uses_train_set else None, val.take(order), make_context(seed=3)
    )


def same(a, b, exact=True):
    if isinstance(a, torch.Tensor):
        if exact:
            return torch.equal(a, b)
        return torch.allclose(a.double(), b.double(), rtol=1e-3, atol=1e-4 * max(1.0, float(a.double().abs().max())))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key], exact) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y, exact) for x, y in zip(a, b, strict=True))
    return a == (b if exact or not isinstance(a, float) else pytest.approx(b, rel=1e-3, abs=1e-4))


def chosen(per_image, which):
    return {
        name: values[which] if isinstance(values, torch.Tensor) else [values[i] for i in which]
        for name, values in per_image.items()
    }


def test_evaluations_are_listed():
    assert {"knn", "linear", "finetune", "rotation", "health"} <= set(EVALUATORS)


@pytest.mark.parametrize("name", EVALUATORS)
def test_is_an_evaluator_with_plain_settings_and_help(name, tmp_path):
    maker = EVALUATORS[name]
    assert issubclass(maker, Evaluator)
    assert (inspect.getdoc(inspect.getmodule(maker)) or "").splitlines()[0].count("?") >= 1, (
        "the first line of the module is a question"
    )
    settings = validated(EvaluatorSettings[name], {})
    for key, field in type(settings).model_fields.items():
        assert field.description, f"{key} has no help in the docstring of {name}"
    (tmp_path / "settings.yaml").write_text(to_yaml(settings))
    assert validated(EvaluatorSettings[name], read_yaml(tmp_path / "settings.yaml")) == settings
    maker(**dict(settings))


@pytest.mark.parametrize(("name", "kind"), kinds())
class TestEvaluation:
    def test_leaves_the_backbone_as_it_was(self, name, kind):
        before = {key: value.clone() for key, value in backbone().state_dict().items()}
        flags = [p.requires_grad for p in backbone().parameters()]
        evaluated(name, kind)
        assert same(before, dict(backbone().state_dict()))
        assert not backbone().training
        assert flags == [p.requires_grad for p in backbone().parameters()]
        assert all(p.grad is None for p in backbone().parameters())

    def test_the_same_seed_gives_the_same_results(self, name, kind):
        (_, first), (_, again) = evaluated(name, kind), evaluated(name, kind, run=1)
        assert same(first, again)

    def test_results_are_of_every_image_and_metrics_follow_from_any_of_them(self, name, kind):
        evaluator, per_image = evaluated(name, kind)
        assert per_image
        assert all(len(values) == VAL for values in per_image.values())
        for which in (list(range(VAL)), [0, 2, 3, 5], [1, 4], [4, 4, 2, 0, 0]):
            metrics = evaluator.metrics(chosen(per_image, which))
            assert set(evaluator.other_metrics) <= set(metrics)  # none is a name that was mistyped
            assert metrics
            assert all(type(value) is float for value in metrics.values())

    def test_results_do_not_depend_on_the_order_of_images(self, name, kind):
        if name in TOGETHER:
            pytest.skip("fits something on all evaluation images together")
        evaluator, per_image = evaluated(name, kind)
        _, shuffled = evaluated(name, kind, order=tuple(ORDER))
        assert same(chosen(per_image, ORDER), shuffled, exact=False)
        assert evaluator.metrics(shuffled) == pytest.approx(
            evaluator.metrics(per_image), rel=1e-3, abs=1e-3, nan_ok=True
        )
