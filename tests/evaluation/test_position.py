"""The position probe, of features that are known by construction, and against computations by hand."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from test_dense import Colours, blocks, labelled, make_context, painted
from test_orientation import Features, noise, placed

import evaluating
from conftest import run
from gtsa.core.errors import UserError
from gtsa.evaluation.evaluators.in_context import InContext
from gtsa.evaluation.evaluators.position import Position, _are_near
from gtsa.models.backbone import IMAGENET

SMALL = {"size": 128, "memory": 2000, "k": 5}
GRID = 8


def evaluate(backbone, train, val, **more):
    task = Position(**{**SMALL, **more})
    return task.metrics(task(backbone, train, val, make_context()))


def coloured(images, **options):
    masks = blocks(images, cells=GRID, **options)
    return labelled(painted(masks), masks)


def mixed(strength):
    """Colours of the content, and ``strength`` times the position."""
    return Features(lambda pixels: torch.cat([Colours()(pixels).patches, strength * placed(pixels)], dim=-1), 6)


def chance():
    """The share of near patches, counted by hand: at most one row and one column away in a grid of 8 x 8."""
    cells = [(row, column) for row in range(GRID) for column in range(GRID)]
    return 100 * np.mean([abs(a - c) <= 1 and abs(b - d) <= 1 for a, b in cells for c, d in cells])


def test_features_of_the_position_alone():
    metrics = evaluate(Features(placed, 3), noise(6, 0), noise(4, 1))
    assert metrics["position R2"] == pytest.approx(1, abs=1e-6)
    assert metrics["position bias"] == pytest.approx(100, abs=1e-4)
    assert metrics["excess of near matches"] == pytest.approx(100 - chance(), abs=2)
    assert metrics["excess without position mean"] < 30


def test_features_of_the_content_alone():
    metrics = evaluate(Colours(), noise(40, 0), noise(20, 1))
    assert -0.05 < metrics["position R2"] < 0.05
    assert -6 < metrics["position bias"] < 1  # the means of 40 images explain nothing of others
    assert metrics["excess of near matches"] == pytest.approx(0, abs=4)


def test_positions_hide_the_content_and_their_mean_can_be_taken_off():
    """Three training images: a patch of the same position is of another class most of the time."""
    train, val = coloured(3), coloured(6, seed=1)
    metrics = evaluate(mixed(100.0), train, val, k=1)
    assert metrics["position bias"] > 99
    assert metrics["excess of near matches"] > 50
    assert metrics["in-context mIoU"] < 60 < 80 < metrics["in-context mIoU without position mean"]
    assert evaluate(mixed(0.0), train, val, k=1)["in-context mIoU"] == 100


def test_position_bias_by_hand():
    train, val, backbone = noise(5, 0), noise(3, 1), mixed(1.0)
    metrics = evaluate(backbone, train, val)
    mean, std = (torch.tensor(value)[:, None, None] for value in IMAGENET)
    one, other = (
        backbone((torch.stack(data.source.pixels).float() / 255 - mean) / std).patches.double().numpy()
        for data in (train, val)
    )
    unexplained = ((other - one.mean(0)) ** 2).sum()
    total = ((other - one.mean((0, 1, 2))) ** 2).sum()
    assert metrics["position bias"] == pytest.approx(100 * (1 - unexplained / total), abs=1e-3)


def test_matches_by_hand():
    """The nearest of all training patches, found in numpy; the memory holds all of them."""
    train, val, backbone = noise(4, 0), noise(2, 1), mixed(2.0)
    metrics = evaluate(backbone, train, val)
    mean, std = (torch.tensor(value)[:, None, None] for value in IMAGENET)
    one, other = (
        F.normalize(backbone((torch.stack(data.source.pixels).float() / 255 - mean) / std).patches, dim=-1).numpy()
        for data in (train, val)
    )
    nearest = (other.reshape(-1, 6) @ one.reshape(-1, 6).T).argmax(1) % GRID**2
    own = np.tile(np.arange(GRID**2), 2)
    near = (abs(nearest // GRID - own // GRID) <= 1) & (abs(nearest % GRID - own % GRID) <= 1)
    assert metrics["excess of near matches"] == pytest.approx(100 * near.mean() - chance(), abs=1e-6)


def test_the_mask_metric_is_that_of_in_context():
    train, val = coloured(6), coloured(3, seed=1)
    retrieval = InContext(**SMALL)
    expected = retrieval.metrics(retrieval(mixed(3.0), train, val, make_context()))
    assert evaluate(mixed(3.0), train, val)["in-context mIoU"] == pytest.approx(expected["mIoU"], abs=1e-6)


@given(st.integers(1, 40), st.integers(1, 40), st.data())
def test_near_is_a_tenth_of_the_grid_or_one_patch(height, width, data):
    one, other = (data.draw(st.integers(0, height * width - 1)) for _ in range(2))
    rows, columns = abs(one // width - other // width), abs(one % width - other % width)
    expected = rows <= max(1, height // 10) and columns <= max(1, width // 10)
    actual = _are_near(torch.tensor([one]), torch.tensor([other]), height, width)
    assert bool(actual) == expected == bool(_are_near(torch.tensor([other]), torch.tensor([one]), height, width))


def test_it_needs_no_labels(tmp_path, scenes):
    code, out, err = run(
        *("evaluate", "random:test_vit", "--task", "position", "--train", scenes, "--folds", 2, "--device", "cpu"),
        *("--position.size", 64, "--position.memory", 100),
    )
    assert code == 0, err
    assert "position R2" in out and "excess of near matches" in out and "mIoU" not in out


@pytest.mark.parametrize("wrong", [{"k": 0}, {"memory": 0}, {"size": 0}, {"temperature": 0.0}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(UserError, match="position: k, memory and size must be at least 1"):
        Position(**wrong)


def test_too_little_is_refused():
    with pytest.raises(UserError, match="position: one training image is too few"):
        evaluate(Colours(), coloured(1), coloured(1))
    with pytest.raises(UserError, match="position: --position.size 16 is a single patch"):
        evaluate(Colours(), coloured(2), coloured(1), size=16)
    data = evaluating.labelled(evaluating.noise(3), kind="none")
    assert "position R2" in evaluate(Colours(), data, data, size=32)
