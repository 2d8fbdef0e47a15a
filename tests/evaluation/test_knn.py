"""k-nearest neighbours against scikit-learn's, and on sets whose answer is known."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from evaluating import Stub, cells, coloured, labelled, make_context, noise
from gtsa.core.errors import UserError
from gtsa.evaluation import retrieval
from gtsa.evaluation.evaluators import knn
from gtsa.evaluation.evaluators.knn import KNN
from gtsa.evaluation.retrieval import nearest, votes_of

SMALL = {"resize": 32, "crop": 32}


def sets(classes=7, train=120, val=60, seed=0):
    draw = np.random.default_rng(seed)
    targets = draw.integers(0, classes, train + val).tolist()
    images, names = noise(train + val, seed=seed), [f"class {i}" for i in range(classes)]
    return (
        labelled(images[:train], targets[:train], classes=names),
        labelled(images[train:], targets[train:], classes=names),
    )


def vectors(data):
    """Mean tokens, worked out in numpy: the mean over patches of the normalised pixels of a patch."""
    pixels = np.stack([image.numpy() for image in data.source.images]).astype(np.float64)
    patches = ((pixels / 255 - 0.5) / 0.25).reshape(len(pixels), 3, 4, 8, 4, 8)
    return patches.mean((2, 4)).reshape(len(pixels), -1)


@pytest.mark.parametrize("k", [1, 10, 20, 100])
def test_equals_scikit_learn_on_random_features(k):
    train, val = sets()
    kept = {}
    per_image = KNN(k=(k,), **SMALL)(Stub(cells), train, val, make_context(on_prediction=kept.__setitem__))
    oracle = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07))
    oracle.fit(vectors(train), train.targets)
    shares, truth = oracle.predict_proba(vectors(val)), np.array(val.targets)
    np.testing.assert_allclose(torch.stack([kept[i] for i in range(len(val))]), shares, atol=2e-4)
    right = oracle.predict(vectors(val)) == truth
    assert per_image[f"top1, k = {k}"].tolist() == right.tolist()
    best = np.argsort(-shares, kind="stable")[:, :5]
    voted = np.take_along_axis(shares, best, 1) > 0  # which of the classes without a vote comes fifth means nothing
    assert per_image[f"top5, k = {k}"].tolist() == ((best == truth[:, None]) & voted).any(1).tolist()


def test_all_right_where_features_solve_it_and_chance_where_labels_are_shuffled():
    kinds = [i % 4 for i in range(40)]
    train, val = (labelled(coloured(kinds, seed=seed), kinds, classes="abcd") for seed in (0, 1))
    task = KNN(k=(5,), **SMALL)
    assert task.metrics(task(Stub(cells), train, val, make_context())) == {"top1, k = 5": 100.0}
    draw = np.random.default_rng(0)
    shuffled = [labelled(d.source.images, draw.permutation(d.targets).tolist(), classes="abcd") for d in (train, val)]
    by_chance = task.metrics(task(Stub(cells), *shuffled, make_context()))["top1, k = 5"]
    assert abs(by_chance - 25) < 100 * 3 * (0.25 * 0.75 / 40) ** 0.5  # three standard deviations


def test_top5_is_reported_only_for_enough_classes():
    five, six = (KNN(k=(3,), **SMALL)(Stub(cells), *sets(classes, 20, 9), make_context()) for classes in (5, 6))
    assert list(five) == ["top1, k = 3"]
    assert list(six) == ["top1, k = 3", "top5, k = 3"]


def test_more_neighbours_than_images_are_left_out_aloud(monkeypatch):
    messages = []
    monkeypatch.setattr(knn, "say", messages.append)
    per_image = KNN(**SMALL)(Stub(cells), *sets(train=50, val=5), make_context())
    assert list(per_image) == ["top1, k = 20", "top5, k = 20", "top1, k = 10", "top5, k = 10"]
    assert messages == ["knn: k = 100, 200 left out: there are 50 training images"]
    with pytest.raises(UserError, match=r"there are 9 training images; give --knn\.k"):
        KNN(**SMALL)(Stub(cells), *sets(train=9, val=5), make_context())


@pytest.mark.parametrize("wrong", [{"k": ()}, {"k": (0,)}, {"temperature": 0.0}])
def test_settings_that_mean_nothing_are_refused(wrong):
    with pytest.raises(UserError, match="knn: k must be at least 1"):
        KNN(**wrong)


def test_chunks_change_nothing(monkeypatch):
    draw = torch.Generator().manual_seed(0)
    memory, queries = (torch.nn.functional.normalize(torch.randn(n, 8, generator=draw), dim=-1) for n in (50, 33))
    whole = nearest(queries, memory, 7)
    monkeypatch.setattr(retrieval, "ROWS", 4)
    monkeypatch.setattr(retrieval, "COLUMNS", 13)
    parts = nearest(queries, memory, 7)
    assert torch.equal(whole[1], parts[1])
    torch.testing.assert_close(whole[0], parts[0])


def test_votes_by_hand_at_any_temperature():
    similarity, classes = torch.tensor([[0.9, 0.8, 0.7]]), torch.tensor([[1, 0, 0]])
    votes = votes_of(similarity, classes, 3, 0.1)[0]
    torch.testing.assert_close(votes, torch.tensor([np.exp(-1) + np.exp(-2), 1.0, 0.0], dtype=torch.float32))
    assert votes_of(similarity, classes, 3, 1e-6)[0].tolist() == [0.0, 1.0, 0.0]  # exp(0.9 / 1e-6) is no number
