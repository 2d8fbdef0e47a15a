"""Logistic regression on patches: scikit-learn's result, convergence, and the same figure from the same tokens."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from test_dense import Colours, blocks, labelled, make_context, painted, stripes

from conftest import run
from gtsa.core.errors import UserError
from gtsa.evaluation import dense, logistic, retrieval
from gtsa.evaluation.evaluators.linear_segmentation import LinearSegmentation
from gtsa.evaluation.token_cache import TokenCache
from gtsa.models.backbone import Backbone


def problem(seed, samples, width, classes):
    """Inputs of uneven scale, and how many of 16 pixels are of each class; some samples have fewer, and one none."""
    draw = np.random.default_rng(seed)
    inputs = draw.normal(size=(samples, width)) * draw.uniform(0.1, 10, width) + draw.normal(size=width)
    favourite = (inputs @ draw.normal(size=(width, classes))).argmax(1)
    counts = draw.multinomial(8, np.full(classes, 1 / classes), samples)
    counts[np.arange(samples), favourite] += draw.integers(0, 9, samples)
    counts[0] = 0
    return inputs.astype(np.float32), counts.astype(np.float32)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 4), st.sampled_from([1e-1, 1e-3]))
def test_it_is_scikit_learns_logistic_regression(seed, classes, l2):
    """Every sample is written out once for each class, weighted by its pixels."""
    inputs, counts = (values.astype(np.float64) for values in problem(seed, 60, 5, classes))
    head = logistic.fit(torch.from_numpy(inputs.copy()), torch.from_numpy(counts), l2, 1e-7, 1000)
    standardised = (inputs - inputs.mean(0)) / inputs.std(0)
    rows, labels = np.nonzero(counts)
    weights = counts[rows, labels]
    twice = 2 if classes == 2 else 1  # of two classes scikit-learn has the difference: half the penalty
    reference = LogisticRegression(C=twice / (l2 * weights.sum()), tol=1e-8, max_iter=5000)
    reference.fit(standardised[rows], labels, sample_weight=weights)
    expected = reference.predict_log_proba(standardised)
    actual = head(torch.from_numpy(inputs)).log_softmax(-1).numpy()
    assert actual == pytest.approx(expected, abs=1e-4)
    squares = (reference.coef_**2).sum() / twice
    loss = -(counts * expected).sum() / counts.sum() + l2 / 2 * squares
    assert head.loss == pytest.approx(loss, abs=1e-7)
    assert head.gradient <= 1e-7


def test_columns_that_do_not_vary_change_nothing():
    inputs, counts = (torch.from_numpy(values) for values in problem(0, 80, 4, 3))
    more = torch.cat([inputs, torch.full((80, 1), 7.0)], dim=1)
    one, other = (logistic.fit(values.clone(), counts, 1e-2, 1e-6, 1000) for values in (inputs, more))
    assert torch.isfinite(other.weight).all()
    assert one(inputs).log_softmax(-1).numpy() == pytest.approx(other(more).log_softmax(-1).numpy(), abs=1e-3)


def test_parts_of_the_rows_add_up(monkeypatch):
    inputs, counts = (torch.from_numpy(values) for values in problem(1, 100, 4, 3))
    whole = logistic.fit(inputs.clone(), counts, 1e-2, 1e-6, 1000)
    monkeypatch.setattr(logistic, "ROWS", 7)
    parts = logistic.fit(inputs.clone(), counts, 1e-2, 1e-6, 1000)
    assert whole.loss == pytest.approx(parts.loss, abs=1e-7)
    assert whole.weight.numpy() == pytest.approx(parts.weight.numpy(), rel=1e-2, abs=1e-3)


# The evaluation


def metrics(train, val, backbone=None, given=None, **options):
    evaluator = LinearSegmentation(**(given or {}))
    return evaluator.metrics(evaluator(backbone or Colours(), train, val, make_context(**options)))


def coloured(make, images, **options):
    masks = make(images, **options)
    return labelled(painted(masks), masks)


def test_colours_are_separated_exactly():
    train, val = coloured(stripes, 6, height=96), coloured(stripes, 5, height=96, seed=1)
    actual = metrics(train, val, given={"size": 96, "l2": 1e-5})
    assert actual["aAcc"] > 99 and actual["mIoU"] > 98  # scores of two classes do not cross exactly at a border
    assert actual["training loss"] < 0.1 and actual["iterations"] > 3


def test_shuffled_labels_give_chance():
    train = labelled(painted(blocks(12)), blocks(12, seed=1))
    val = labelled(painted(blocks(6, seed=2)), blocks(6, seed=3))
    assert metrics(train, val, given={"size": 256})["aAcc"] == pytest.approx(25, abs=4)


def test_it_says_whether_it_converged(capsys):
    data = coloured(blocks, 4)
    metrics(data, data, given={"size": 256, "steps": 1})
    assert "NOT CONVERGED after 1 iterations" in capsys.readouterr().out
    metrics(data, data, given={"size": 256})
    assert "linear_segmentation: converged after" in capsys.readouterr().out


def test_neither_seed_nor_order_of_the_images_matters_beyond_rounding():
    torch.manual_seed(0)
    backbone = Backbone("test_vit", 64).eval()
    train, val = coloured(blocks, 6), coloured(blocks, 3, seed=1)
    one = metrics(train, val, backbone, {"size": 64}, seed=1)
    other = metrics(train.take([3, 5, 0, 1, 4, 2]), val, backbone, {"size": 64}, seed=2)
    assert one["mIoU"] == pytest.approx(other["mIoU"], abs=0.5)
    assert one["training loss"] == pytest.approx(other["training loss"], abs=1e-4)


@pytest.mark.parametrize("wrong", [{"size": 0}, {"l2": -1.0}, {"patches": 0}, {"tolerance": 0.0}, {"steps": 0}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(UserError, match="linear_segmentation: size, patches and steps must be at least 1"):
        LinearSegmentation(**wrong)


# The cache of tokens


class Counting(Colours):
    def __init__(self):
        super().__init__()
        self.seen = 0

    def forward(self, pixels):
        self.seen += len(pixels)
        return super().forward(pixels)


def test_the_network_sees_no_image_twice(tmp_path):
    train, val = coloured(blocks, 4), coloured(blocks, 3, seed=1)
    backbone, plain = Counting(), metrics(train, val, given={"size": 64})
    results = [metrics(train, val, backbone, {"size": 64}, cache=TokenCache(tmp_path / "tokens")) for _ in range(2)]
    assert backbone.seen == 7
    assert results[0] == results[1]
    assert results[0]["mIoU"] == pytest.approx(plain["mIoU"], abs=0.5)


def test_tokens_are_known_by_size_and_rotation(tmp_path):
    backbone, cache = Counting(), TokenCache(tmp_path)
    context = make_context(cache=cache)
    pixels = torch.randn(2, 3, 48, 32)
    for seen in (pixels, pixels.rot90(1, (-2, -1)), pixels[..., :32, :], pixels):
        tokens = dense.patch_tokens(backbone, seen, context)
        expected = Colours()(seen).patches
        assert tokens.dtype == torch.float32 and tokens.equal(expected.half().float())
    assert backbone.seen == 6
    again = TokenCache(tmp_path)
    assert again(lambda _: pytest.fail("they are known"), pixels).equal(tokens)
    assert len(retrieval.sample_patches(backbone, coloured(blocks, 2), context, 64, 100)[0]) == 32


def test_the_command_gives_the_same_figure_from_the_same_cache(tmp_path, scenes):
    """Masks of light and dark; the second call reads all tokens from the cache of the first."""
    from PIL import Image

    masks = tmp_path / "masks"
    masks.mkdir()
    for path in scenes.iterdir():
        light = np.asarray(Image.open(path).convert("L")) > 90
        Image.fromarray(light.astype(np.uint8)).save(masks / f"{path.stem}.png")
    reports = []
    for number in range(2):
        code, out, err = run(
            *("evaluate", "random:test_vit", "--task", "linear_segmentation", "in_context", "--folds", 2),
            *("--train", scenes, masks, "--linear-segmentation.size", 64, "--in-context.size", 64, "--device", "cpu"),
            *("--cache", tmp_path / "cache", "--out", tmp_path / f"{number}.json"),
        )
        assert code == 0, err
        assert "training loss" in out
        reports.append(json.loads((tmp_path / f"{number}.json").read_text())["results"])
    first, second = ([entry["metrics"] for entry in report] for report in reports)
    assert first == second and first[0]["mIoU"] > 50
    (folder,) = (tmp_path / "cache").iterdir()
    assert folder.name.endswith("-32") and list(folder.glob("*.safetensors"))
    (tmp_path / "file").touch()
    code, _, err = run(
        *("evaluate", "random:test_vit", "--task", "in_context", "--folds", 2, "--train", scenes, masks),
        *("--device", "cpu", "--cache", tmp_path / "file"),
    )
    assert code == 6 and "--cache" in err and "give another folder" in err
