"""Linear probes against scikit-learn and torchmetrics, and on sets whose answer is known."""

import signal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from torchmetrics.functional.classification import multiclass_accuracy, multilabel_average_precision

from evaluating import Stub, cells, coloured, labelled, make_context, noise
from gtsa.core.errors import UserError
from gtsa.evaluation.evaluators.linear import Heads, Linear, mean_average_precision, tenth

SMALL = {"resize": 32, "crop": 32}
QUICK = {"steps": 60, "learning_rates": (1e-3, 1e-2), **SMALL}


def colours(images):
    """Two numbers a patch that tell little more than its colour."""
    return cells(images).unflatten(-1, (3, -1)).mean(-1)


def problem(n=150, width=5, classes=3, seed=0):
    """Random features [n, 1, D] with classes that overlap: an optimum that is finite."""
    draw = np.random.default_rng(seed)
    x = draw.standard_normal((n, width))
    y = (x @ draw.standard_normal((width, classes)) + 2 * draw.standard_normal((n, classes))).argmax(1)
    return torch.from_numpy(x).float()[:, None], torch.from_numpy(y)


def taught(features, targets, classes, several=False, steps=400, learning_rates=(5.0,), blocks=(1,)):
    task = Linear(learning_rates=learning_rates, blocks=blocks, steps=steps, batch_size=len(features))
    heads = Heads(task.pairs, features.shape[-1], classes, several, 0)
    task._train(heads, features, targets, torch.arange(len(features)), make_context())
    return heads


def test_reaches_the_optimum_of_logistic_regression():
    x, y = problem()
    heads = taught(x, y, 3)
    oracle = LogisticRegression(C=np.inf, tol=1e-9, max_iter=1000).fit(x[:, 0], y)
    np.testing.assert_allclose(heads.probabilities(heads.scores(x, 0)), oracle.predict_proba(x[:, 0]), atol=1e-3)


def test_reaches_the_optimum_of_logistic_regression_for_several_classes():
    x, _ = problem()
    draw = np.random.default_rng(1)
    y = torch.from_numpy(x[:, 0].numpy() @ draw.standard_normal((5, 2)) + 2 * draw.standard_normal((150, 2)) > 0)
    heads = taught(x, y, 2, several=True, learning_rates=(10.0,))
    oracle = [LogisticRegression(C=np.inf, tol=1e-9).fit(x[:, 0], y[:, c]).predict_proba(x[:, 0])[:, 1] for c in (0, 1)]
    np.testing.assert_allclose(heads.probabilities(heads.scores(x, 0)), np.stack(oracle, 1), atol=1e-3)


def test_every_pair_learns_by_gradient_descent_with_momentum_of_its_own():
    x = torch.randn(40, 4, 3, generator=torch.Generator().manual_seed(0))
    y = torch.arange(40) % 3
    steps, learning_rates = 50, (0.02, 0.3)
    heads = taught(x, y, 3, steps=steps, learning_rates=learning_rates, blocks=(1, 4))
    start = Heads(heads.pairs, 3, 3, False, 0)
    for pair, (rate, blocks) in enumerate(heads.pairs):
        w, b = (p.detach().double().clone().requires_grad_() for p in (start.weights[pair], start.biases[pair]))
        inputs, momentum = x[:, -blocks:].flatten(1).double(), [0.0, 0.0]
        for step in range(steps):
            loss = torch.nn.functional.cross_entropy(inputs @ w.T + b, y)
            now = rate * 40 / 256 * (1 + np.cos(np.pi * step / steps)) / 2
            with torch.no_grad():
                for i, (p, g) in enumerate(zip((w, b), torch.autograd.grad(loss, (w, b)), strict=True)):
                    momentum[i] = 0.9 * momentum[i] + 0.1 * g
                    p -= now * 10 * momentum[i] / (1 - 0.9 ** (step + 1))
        torch.testing.assert_close(heads.weights[pair].detach().double(), w.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(heads.biases[pair].detach().double(), b.detach(), rtol=1e-4, atol=1e-5)


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 30).flatmap(
        lambda n: st.tuples(
            st.lists(st.lists(st.integers(-2, 2), min_size=3, max_size=3), min_size=n, max_size=n),  # many ties
            st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=n, max_size=n),
        )
    )
)
def test_average_precision_is_scikit_learns(case):
    scores, truth = torch.tensor(case[0]).float(), torch.tensor(case[1])
    with_positives = [c for c in range(3) if truth[:, c].any()]
    actual = mean_average_precision(scores, truth)
    if not with_positives:
        assert np.isnan(actual)
        return
    oracle = np.mean([average_precision_score(truth[:, c], scores[:, c]) for c in with_positives])
    assert actual == pytest.approx(oracle, abs=1e-12)


def test_metrics_equal_torchmetrics_on_random_scores():
    draw = torch.Generator().manual_seed(0)
    scores, truth = torch.randn(300, 12, generator=draw), torch.randint(12, (300,), generator=draw)
    metrics = Linear().metrics({"scores": scores, "truth": truth})
    for k in (1, 5):
        oracle = multiclass_accuracy(scores, truth, 12, average="micro", top_k=k)
        assert metrics[f"top{k}"] == pytest.approx(100 * float(oracle), abs=1e-4)
    several = torch.rand(300, 12, generator=draw) < 0.2
    oracle = multilabel_average_precision(scores.sigmoid(), several.long(), 12, average="macro")
    assert Linear().metrics({"scores": scores, "truth": several}) == {
        "mAP": pytest.approx(100 * float(oracle), abs=1e-4)
    }
    assert list(Linear().metrics({"scores": scores[:, :5], "truth": truth % 5})) == ["top1"]


def four_colours(per=10, seeds=(0, 1), classes="abcd"):
    kinds = [i % 4 for i in range(4 * per)]
    return [labelled(coloured(kinds, seed=seed), kinds, classes=classes) for seed in seeds]


def test_all_right_where_features_solve_it():
    task = Linear(**QUICK)
    assert task.metrics(task(Stub(colours), *four_colours(), make_context())) == {"top1": 100.0}
    kinds = [i % 4 for i in range(40)]
    rows = [torch.tensor([k == 0, k == 1, k in (0, 2)]) for k in kinds]
    sets = [labelled(coloured(kinds, seed=seed), rows, "multilabel", "abc") for seed in (0, 1)]
    assert task.metrics(task(Stub(colours), *sets, make_context())) == {"mAP": pytest.approx(100)}


def test_chance_where_labels_are_shuffled():
    draw = np.random.default_rng(0)
    sets = [labelled(d.source.images, draw.permutation(d.targets).tolist(), classes="abcd") for d in four_colours(20)]
    task = Linear(**QUICK)
    share = task.metrics(task(Stub(colours), *sets, make_context()))["top1"]
    assert abs(share - 25) < 100 * 3 * (0.25 * 0.75 / 80) ** 0.5  # three standard deviations


def test_the_evaluation_images_choose_nothing():
    train, val = four_colours(5)
    other = labelled(val.source.images, val.targets[::-1], classes="abcd")
    task = Linear(**{**QUICK, "steps": 5})
    scores = [task(Stub(colours), train, data, make_context())["scores"] for data in (val, other)]
    assert torch.equal(*scores)


@given(st.lists(st.integers(0, 4), min_size=2, max_size=300), st.integers(0, 9))
@settings(max_examples=50, deadline=None)
def test_a_tenth_of_every_class_is_held_out(classes, seed):
    targets = torch.tensor(classes)
    chosen = tenth(targets, seed)
    assert chosen.sum() == max(1, round(len(classes) / 10))
    assert torch.equal(chosen, tenth(targets, seed))
    stride = len(classes) / int(chosen.sum())
    for kind in set(classes):
        images, out = (targets == kind).sum(), (chosen & (targets == kind)).sum()
        assert abs(out - images / stride) < 1 + 1e-9


def test_other_images_are_held_out_for_another_seed():
    targets = torch.arange(200) % 4
    assert not torch.equal(tenth(targets, 0), tenth(targets, 1))
    assert tenth(torch.nn.functional.one_hot(targets).bool(), 0)[targets == 2].sum() == 5


def test_a_training_that_was_stopped_ends_where_the_other_one_does(tmp_path, monkeypatch):
    train, val = four_colours(5)
    task = Linear(**QUICK)
    whole = task(Stub(colours), train, val, make_context(folder=tmp_path / "whole"))["scores"]
    forward, seen = Heads.forward, []

    def stopping(self, views, time):
        seen.append(time)
        if len(seen) == 23:
            signal.raise_signal(signal.SIGUSR1)
        return forward(self, views, time)

    monkeypatch.setattr(Heads, "forward", stopping)
    with pytest.raises(UserError, match="stopped on request at step 23 of 60") as stopped:
        task(Stub(colours), train, val, make_context(folder=tmp_path / "parts"))
    assert stopped.value.code == 75
    parts = task(Stub(colours), train, val, make_context(folder=tmp_path / "parts"))["scores"]
    assert torch.equal(whole, parts)
    assert len(seen) == 60
    with pytest.raises(UserError, match="another folder"):
        task(Stub(colours), val, train, make_context(folder=tmp_path / "parts"))


def test_invalid_values_are_refused():
    for wrong in (
        {"learning_rates": ()},
        {"learning_rates": (0.0,)},
        {"blocks": (0,)},
        {"steps": 0},
        {"batch_size": 0},
    ):
        with pytest.raises(UserError, match="linear: "):
            Linear(**wrong)
    one = labelled(noise(1), [0])
    with pytest.raises(UserError, match="one training image is too few"):
        Linear(**QUICK)(Stub(colours), one, one, make_context())


@pytest.mark.parametrize("learning_rates", [(1e-9, 1e-2), (1e-2, 1e-9)])
def test_the_pair_with_most_held_out_images_right_is_chosen(learning_rates, monkeypatch):
    messages = []
    monkeypatch.setattr("gtsa.evaluation.evaluators.linear.say", messages.append)
    task = Linear(**{**QUICK, "learning_rates": learning_rates})
    assert task.metrics(task(Stub(colours), *four_colours(), make_context())) == {"top1": 100.0}
    assert "learning rate 0.01 on" in messages[0] and "chosen on 4 images" in messages[0]


def test_of_equal_accuracy_the_lower_loss_is_chosen():
    heads = Heads([(0.1, 1), (0.2, 1), (0.3, 1)], 2, 2, False, 0)
    with torch.no_grad():
        for weight, scale in zip(heads.weights, (1.0, 3.0, -9.0), strict=True):
            weight.copy_(scale * torch.eye(2))
    quality = heads.quality(torch.eye(2)[:, None], torch.tensor([0, 1]))
    assert quality.argmax() == 1 and quality.argmin() == 2
