"""Instance classification from pooled tokens: known answers, an oracle, and supercategories."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from evaluating import Stub, labelled, make_context, noise
from gtsa.core.errors import UserError
from gtsa.data.labels import Boxes
from gtsa.evaluation.evaluators.instances import Instances, covered

SMALL = {"k": 3, "size": 32}


def scenes(count, seed, shuffled=False, classes=4):
    """Two plain squares a picture, each of its class's colour; the background is dark."""
    draw, images, targets = np.random.default_rng(seed), [], []
    hues = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0]])
    for _ in range(count):
        pixels, masks = np.zeros((3, 32, 32), np.uint8), torch.zeros(2, 32, 32, dtype=torch.bool)
        kinds = draw.integers(0, classes, 2)
        for n, kind in enumerate(kinds):
            top = 16 * n + int(draw.integers(0, 5))
            pixels[:, top : top + 10, 4:20] = hues[kind][:, None, None]
            masks[n, top : top + 10, 4:20] = True
        if shuffled:
            kinds = draw.integers(0, classes, 2)
        images.append(torch.from_numpy(pixels))
        crowd = torch.zeros(2, dtype=torch.bool)
        targets.append(Boxes(torch.zeros(2, 4), torch.from_numpy(kinds), masks, crowd, torch.ones(2), torch.arange(2)))
    return labelled(images, targets, "boxes", "abcd", has_masks=True)


def colours(images):
    return images.unfold(2, 2, 2).unfold(3, 2, 2).mean((-2, -1)).permute(0, 2, 3, 1)


def evaluate_instances(train, val, **settings):
    task = Instances(**{**SMALL, **settings})
    return task.metrics(task(Stub(colours, 2), train, val, make_context()))


def test_all_images_are_classified_if_colour_decides():
    assert evaluate_instances(scenes(20, 0), scenes(10, 1)) == {"accuracy": 100.0, "mean accuracy": 100.0}


def test_chance_where_labels_are_shuffled():
    actual = evaluate_instances(scenes(60, 0, True), scenes(60, 1, True))["accuracy"]
    assert abs(actual - 25) < 4 * 100 * (0.25 * 0.75 / 120) ** 0.5


def test_it_is_scikit_learns_nearest_neighbours():
    draw = np.random.default_rng(0)
    weights = torch.from_numpy(draw.normal(size=(12, 6))).float()

    def see(images):
        cells = images.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).flatten(3)
        return torch.tanh(cells @ weights)

    train, val = scenes(25, 2, True), scenes(15, 3, True)
    for data, seed in ((train, 4), (val, 5)):
        data.source.images = noise(len(data), seed=seed)  # all objects differ, so that none are equally near
    task = Instances(k=7, size=32)
    per_image = task(Stub(see, 2), train, val, make_context())
    vectors, truth = [], []
    for data in (train, val):
        rows, kinds = [], []
        for i in range(len(data)):
            pixels = (data.read(i)[None].float() / 255 - 0.5) / 0.25
            tokens, objects = see(pixels)[0].numpy(), data.target(i)
            for n in range(2):
                share = objects.masks[n].numpy().reshape(16, 2, 16, 2).mean((1, 3))
                vector = (tokens * share[..., None]).sum((0, 1)) / share.sum()
                rows.append(vector / np.linalg.norm(vector)), kinds.append(int(objects.classes[n]))
        vectors.append(np.array(rows)), truth.append(np.array(kinds))

    def votes(distance):  # euclidean of unit vectors
        return np.exp((1 - distance**2 / 2) / 0.07)

    oracle = KNeighborsClassifier(7, weights=votes).fit(vectors[0], truth[0])
    right = (oracle.predict(vectors[1]) == truth[1]).mean()
    assert task.metrics(per_image)["accuracy"] == pytest.approx(100 * right)
    assert per_image["true"].sum(1).tolist() == [2] * 15
    per_class = [(oracle.predict(vectors[1]) == truth[1])[truth[1] == c].mean() for c in np.unique(truth[1])]
    assert task.metrics(per_image)["mean accuracy"] == pytest.approx(100 * np.mean(per_class))


def test_supercategories_are_predicted_if_the_file_has_them():
    train, val = scenes(20, 0), scenes(10, 1)
    for data in (train, val):
        object.__setattr__(data, "groups", ("warm", "cold", "cold", "warm"))
    per_image = Instances(**SMALL)(Stub(colours, 2), train, val, make_context())
    assert per_image["true"].shape == (10, 2)
    assert Instances(**SMALL, groups=False)(Stub(colours, 2), train, val, make_context())["true"].shape == (10, 4)


def test_shares_of_cells_by_hand_and_without_crowds():
    masks = torch.zeros(3, 4, 4, dtype=torch.bool)
    masks[0, :2, :2], masks[1, 1:3, :] = True, True
    masks[2] = True
    objects = Boxes(
        torch.zeros(3, 4), torch.arange(3), masks, torch.tensor([False, False, True]), torch.ones(3), torch.arange(3)
    )
    assert covered(objects, (2, 2)).tolist() == [[[1, 0], [0, 0]], [[0.25, 0.25], [0.25, 0.25]]]


def test_impossible_settings_are_refused():
    boxes = scenes(4, 0)
    object.__setattr__(boxes, "has_masks", False)
    with pytest.raises(UserError, match="every instance needs a mask, and these labels have only boxes"):
        evaluate_instances(boxes, boxes)
    with pytest.raises(UserError, match="below that"):
        evaluate_instances(scenes(2, 0), scenes(2, 1), k=4)
    with pytest.raises(UserError, match="at least 1"):
        Instances(k=0)
