"""Over-clustering: what it solves exactly, chance, how few patches it can do with, and that it repeats itself."""

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.metrics import confusion_matrix
from test_dense import PALETTE, Colours, blocks, labelled, make_context, painted, perfect, stripes

from gtsa.core.errors import UserError
from gtsa.core.seeds import generator
from gtsa.data.labels import IGNORE
from gtsa.evaluation.evaluators.clusters import Clusters
from gtsa.models.backbone import Backbone


def answer(data, backbone=None, settings=None, **options):
    evaluator = Clusters(**{"size": 64, "repeats": 2, **(settings or {})})
    per_image = evaluator(backbone or Colours(), None, data, make_context(**options))
    return per_image, evaluator.metrics(per_image)


@pytest.mark.parametrize("k", [4, 7, 500])
def test_colours_are_clusters(k):
    masks = stripes(8, 64, 64)
    per_image, actual = answer(labelled(painted(masks), masks), settings={"k": k})
    assert perfect(actual)
    assert per_image["hit"].shape == (8, 2, len(PALETTE))


def test_every_pixel_that_is_a_patch():
    masks = blocks(4)
    assert perfect(answer(labelled(painted(masks), masks), settings={"k": 12, "size": 256})[1])


def test_one_cluster_is_the_most_frequent_class():
    masks = [torch.tensor([[0] * 16, [1] * 16, [1] * 16, [IGNORE] * 16]).repeat(8, 1) for _ in range(3)]
    actual = answer(labelled(painted(masks), masks), settings={"k": 1})[1]
    assert actual == pytest.approx({"mIoU": 100 / 3, "mAcc": 50, "aAcc": 200 / 3, "clusters": 1})


def test_shuffled_labels_give_chance():
    actual = answer(labelled(painted(blocks(6)), blocks(6, seed=1)), settings={"k": 4, "size": 256})[1]
    deviation = 100 * (0.25 * 0.75 / (6 * 16 * 16)) ** 0.5
    assert 25 <= actual["aAcc"] < 25 + 5 * deviation  # the best of four classes for each cluster


def test_the_whole_evaluation_again():
    """Standardised, PCA and k-means in float64; with 16 px images brought to 16 times their size, cells are pixels."""
    torch.manual_seed(0)
    backbone = Backbone("test_vit", 64).eval()
    masks = blocks(3)
    masks[1][4:9] = IGNORE
    data, kept = labelled(painted(masks), masks), {}
    settings = {"k": 9, "size": 256, "dimensions": 5, "repeats": 1}
    per_image, actual = answer(data, backbone, settings, on_prediction=kept.__setitem__)
    mean, std = (torch.tensor(values)[:, None, None] for values in backbone.normalisation)
    pixels = torch.stack(
        [
            torch.nn.functional.interpolate(p[None], (256, 256), mode="bicubic", antialias=True)[0]
            for p in painted(masks)
        ]
    )
    with torch.no_grad():
        tokens = backbone((pixels / 255 - mean) / std).patches.flatten(0, 2).double().numpy()
    components = PCA(5, svd_solver="full").fit_transform((tokens - tokens.mean(0)) / tokens.std(0))
    truth = torch.stack(masks).flatten().numpy()
    known = truth != IGNORE
    start = int(generator(0, 5, 1).integers(2**31))
    clusters = KMeans(9, n_init=1, random_state=start).fit_predict(components)
    matched = confusion_matrix(clusters[known], truth[known], labels=range(9))[:, :4].argmax(1)[clusters]
    assert torch.stack([kept[i] for i in range(3)]).flatten().tolist() == matched.tolist()
    confusion = confusion_matrix(truth[known], matched[known], labels=range(4))
    assert per_image["hit"].sum((0, 1)).tolist() == confusion.diagonal().tolist()
    assert per_image["predicted"].sum((0, 1)).tolist() == confusion.sum(0).tolist()
    assert actual["aAcc"] == pytest.approx(100 * confusion.diagonal().sum() / known.sum())


def test_fewer_patches_than_clusters(capsys):
    masks = stripes(1, 32, 32)
    actual = answer(labelled(painted(masks), masks), settings={"size": 32})[1]
    assert actual["clusters"] == 1  # four patches, five are needed for each
    assert "1 instead of 500" in " ".join(capsys.readouterr().out.split())


def test_a_seed_gives_the_same_on_any_batch():
    masks = [torch.from_numpy(np.random.default_rng(i).integers(0, 3, (30, 41))) for i in range(6)]
    rng = np.random.default_rng(9)
    pixels = [torch.from_numpy(rng.integers(0, 256, (3, 30, 41))).byte() for _ in range(6)]
    data, settings = labelled(pixels, masks, 3), {"k": 6, "repeats": 3}
    first, again, other = (answer(data, settings=settings, seed=5, batch_size=b)[0] for b in (4, 4, 1))
    assert all(torch.equal(first[name], again[name]) and torch.equal(first[name], other[name]) for name in first)
    assert not torch.equal(first["predicted"], answer(data, settings=settings, seed=6)[0]["predicted"])
    assert not torch.equal(first["predicted"][:, 0], first["predicted"][:, 1])  # every repeat has its own start


def test_masks_without_labels():
    masks = stripes(4, 64, 64)
    masks[2] = torch.full((64, 64), IGNORE)
    assert perfect(answer(labelled(painted(masks), masks))[1])
    with pytest.raises(UserError, match="no pixel"):
        answer(labelled(painted(masks), [masks[2]] * 4))


def test_it_does_not_learn():
    assert not Clusters.uses_train_set
    assert Clusters.label_kinds == ("masks",)
