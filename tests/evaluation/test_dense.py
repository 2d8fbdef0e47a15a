"""Pixels counted, upsampled, seen through windows and retrieved, against independent computations; and stubs for dense tests."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning_fabric import Fabric
from torch import nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex, MulticlassRecall

from gtsa.core.errors import UserError
from gtsa.core.types import Tokens
from gtsa.data.labels import IGNORE, Labelled
from gtsa.evaluation import dense, retrieval
from gtsa.evaluation.context import EvalContext
from gtsa.evaluation.retrieval import Memory, build_memory, class_shares
from gtsa.models.backbone import IMAGENET

PALETTE = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0]], dtype=torch.uint8)


class Colours(nn.Module):
    """A backbone whose patch tokens are the patches' mean colours."""

    patch_size, embed_dim, normalisation = 16, 3, IMAGENET

    def forward(self, pixels):
        assert not pixels.shape[-1] % self.patch_size and not pixels.shape[-2] % self.patch_size
        patches = F.avg_pool2d(pixels, self.patch_size).permute(0, 2, 3, 1)
        return Tokens(patches, patches.new_empty(len(pixels), 0, self.embed_dim))


class Pictures:
    """A source of images that are there already."""

    def __init__(self, pixels):
        self.pixels, self.range16 = pixels, (0.0, 65535.0)

    def name(self, index):
        return f"{index}.png"

    def read(self, index, detail=None):
        return self.pixels[index]


def labelled(pixels, masks, classes=4):
    names = tuple(f"class {i}" for i in range(classes))
    return Labelled(Pictures(pixels), range(len(pixels)), masks, "masks", names, "digest")


def painted(masks):
    """Images whose colours are the classes; black where nothing is labelled."""
    palette = torch.cat([PALETTE, torch.zeros(1, 3, dtype=torch.uint8)])
    return [palette[mask].permute(2, 0, 1).contiguous() for mask in masks]


def stripes(images, height=48, width=96, patch=16, seed=0):
    """Masks of upright stripes, each of one patch: at their borders bilinear scores change sides exactly."""
    rng = np.random.default_rng(seed)
    rows = [torch.from_numpy(rng.integers(0, len(PALETTE), -(-width // patch))) for _ in range(images)]
    return [row.repeat_interleave(patch)[:width].expand(height, width).contiguous() for row in rows]


def blocks(images, cells=16, seed=0):
    """Random masks of ``cells`` x ``cells`` px: brought to 16 times their size, each pixel is a patch."""
    rng = np.random.default_rng(seed)
    return [torch.from_numpy(rng.integers(0, len(PALETTE), (cells, cells))) for _ in range(images)]


def make_context(**settings):
    return EvalContext(Fabric(accelerator="cpu", devices=1), **{"batch_size": 4, **settings})


def perfect(metrics):
    return all(metrics[name] == 100 for name in ("mIoU", "mAcc", "aAcc"))


# counting


@given(st.integers(2, 6), st.integers(1, 4), st.integers(0, 2**31), st.floats(0, 0.9))
@settings(deadline=None, max_examples=40)
def test_metrics_equal_torchmetrics(classes, images, seed, ignored):
    rng = np.random.default_rng(seed)
    kinds = rng.integers(1, classes + 1, 2)  # often some class is in neither, or in one alone
    guess, truth = (torch.from_numpy(rng.integers(0, kind, (images, 7, 5))) for kind in kinds)
    truth[torch.from_numpy(rng.random(truth.shape) < ignored)] = IGNORE
    truth[0, 0, 0] = 0
    actual = dense.metrics(
        dense.stack_counts([dense.count_pixels(g, t, classes) for g, t in zip(guess, truth, strict=True)])
    )
    options = {"num_classes": classes, "ignore_index": IGNORE, "validate_args": False}
    iou = MulticlassJaccardIndex(average="macro", **options)(guess, truth)
    recall = MulticlassRecall(average=None, **options)(guess, truth)[truth[truth != IGNORE].unique()].mean()
    right = MulticlassAccuracy(average="micro", **options)(guess, truth)
    assert [actual[name] / 100 for name in ("mIoU", "mAcc", "aAcc")] == pytest.approx(
        [float(iou), float(recall), float(right)], abs=1e-6
    )


def test_metrics_by_hand():
    guess = [torch.tensor([[0, 0, 1]]), torch.tensor([[1, 2, 0]])]
    truth = [torch.tensor([[0, 1, 1]]), torch.tensor([[1, IGNORE, 0]])]
    per_image = dense.stack_counts([dense.count_pixels(g, t, 4) for g, t in zip(guess, truth, strict=True)])
    assert per_image["predicted"].tolist() == [[2, 1, 0, 0], [1, 1, 0, 0]]
    # class 0: 2 hits of 3 guesses and 2 true; class 1: 2 of 2 and 3; classes 2 and 3 occur on no labelled pixel
    expected = {"mIoU": 100 * 2 / 3, "mAcc": 100 * (1 + 2 / 3) / 2, "aAcc": 80}
    assert dense.metrics(per_image) == pytest.approx(expected)


def test_repeats_are_averaged_metric_by_metric():
    rng = np.random.default_rng(0)
    truth = torch.from_numpy(rng.integers(0, 3, (2, 4, 4)))
    guess = torch.from_numpy(rng.integers(0, 3, (5, 2, 4, 4)))
    each = [
        dense.stack_counts([dense.count_pixels(g, t, 3) for g, t in zip(repeat, truth, strict=True)])
        for repeat in guess
    ]
    together = {name: torch.stack([one[name] for one in each], 1) for name in each[0]}
    means = {name: np.mean([dense.metrics(one)[name] for one in each]) for name in ("mIoU", "mAcc", "aAcc")}
    assert dense.metrics(together) == pytest.approx(means)


def test_ignored_masks_count_for_nothing():
    nothing = dense.count_pixels(torch.zeros(4, 4, dtype=torch.int64), torch.full((4, 4), IGNORE), 2)
    with pytest.raises(UserError, match="no pixel") as caught:
        dense.metrics(dense.stack_counts([nothing]))
    assert caught.value.code == 3
    something = dense.count_pixels(torch.tensor([[0, 1]]), torch.tensor([[0, 1]]), 2)
    assert perfect(dense.metrics(dense.stack_counts([nothing, something])))


# from maps to pixels


@pytest.mark.parametrize(
    ("seen", "size"), [((32, 48), (32, 48)), ((30, 45), (30, 45)), ((32, 32), (48, 20)), ((7, 3), (7, 3))]
)
def test_scores_are_upsampled_between_the_centres_of_patches(seen, size):
    h, w = (-(-side // 16) for side in seen)
    y, x = torch.meshgrid(16 * torch.arange(h) + 8.0, 16 * torch.arange(w) + 8.0, indexing="ij")
    actual = dense.upsampled(torch.stack([y, x]), seen, size, 16)
    assert actual.shape == (2, *size)
    for axis, cells in enumerate((h, w)):
        centres = (torch.arange(size[axis]) + 0.5) * seen[axis] / size[axis]
        expected = centres.clamp(8, 16 * cells - 8)  # beyond the outer centres: as at them
        line = actual[axis].select(1 - axis, 0)
        assert torch.allclose(line, expected, atol=1e-4)


@pytest.mark.parametrize(("window", "stride"), [(48, 32), (32, 32), (32, 16), (512, 336)])
def test_windows_of_a_network_without_context_are_the_whole(window, stride):
    pixels = torch.rand(2, 3, 80, 112, generator=torch.Generator().manual_seed(0))

    def score(seen):
        assert max(seen.shape[-2:]) <= window
        return F.avg_pool2d(seen, 4)  # a quarter of a patch a cell

    assert torch.allclose(dense.score_windows(score, pixels, window, stride), F.avg_pool2d(pixels, 4), atol=1e-6)


def test_windows_overlap_with_equal_weights():
    def score(seen):
        return seen.mean((1, 2, 3), keepdim=True).expand(-1, 1, seen.shape[-2] // 16, seen.shape[-1] // 16)

    pixels = torch.tensor([0.0, 1, 2]).repeat_interleave(16).expand(1, 3, 16, 48)
    assert torch.allclose(dense.score_windows(score, pixels, 32, 16)[0, 0, 0], torch.tensor([0.5, 1.0, 1.5]))


def test_images_are_padded_with_their_own_border():
    pixels = torch.rand(1, 3, 17, 30)
    actual = dense.padded(pixels, 16)
    assert actual.shape == (1, 3, 32, 32)
    assert torch.equal(actual[..., :17, :30], pixels)
    assert torch.equal(actual[..., 17:, :30], pixels[..., -1:, :].expand(-1, -1, 15, -1))


@pytest.mark.parametrize("size", [0, 64])
def test_judging_is_the_same_in_batches_of_any_size(size):
    masks = [
        mask[:h, :w]
        for mask, (h, w) in zip(stripes(5, 90, 96), [(64, 96), (64, 96), (17, 33), (90, 31), (64, 96)], strict=True)
    ]
    data, kept = labelled(painted(masks), masks), {}

    def score(pixels):
        return F.avg_pool2d(pixels, 16).repeat(1, 2, 1, 1)[:, :4]

    def predict(batch, on_prediction):
        return dense.classify_pixels(
            score, Colours(), data, make_context(batch_size=batch, on_prediction=on_prediction), size
        )

    alone, together = predict(1, lambda *_: None), predict(4, kept.__setitem__)
    assert all(torch.equal(alone[name], together[name]) for name in ("hit", "predicted", "true"))
    assert [(i, kept[i].shape, kept[i].dtype) for i in kept] == [(i, m.shape, torch.uint8) for i, m in enumerate(masks)]
    for row, mask in enumerate(masks):
        assert together["predicted"][row].tolist() == [int((kept[row] == c).sum()) for c in range(4)]
        assert together["true"][row].tolist() == [int((mask == c).sum()) for c in range(4)]


# retrieval


@given(st.integers(1, 80), st.integers(2, 9), st.integers(1, 12), st.integers(0, 2**31))
@settings(deadline=None, max_examples=30)
def test_retrieval_is_brute_force(size, classes, k, seed):
    rng = np.random.default_rng(seed)
    tokens, queries = (
        v / np.linalg.norm(v, axis=1, keepdims=True) for v in (rng.normal(size=(size, 6)), rng.normal(size=(11, 6)))
    )
    labels = rng.dirichlet(np.ones(classes), size)
    expected = np.zeros((11, classes))
    for row, query in enumerate(queries):
        similarity = np.array([np.dot(query, token) for token in tokens])
        nearest = sorted(range(size), key=lambda i: -similarity[i])[:k]
        weights = np.exp([similarity[i] / 0.02 for i in nearest])
        for i, weight in zip(nearest, weights / weights.sum(), strict=True):
            expected[row] += weight * labels[i]
    memory = Memory(torch.from_numpy(tokens), torch.from_numpy(labels))
    actual = memory(torch.from_numpy(queries), k, 0.02)
    assert np.allclose(actual.numpy(), expected, rtol=0, atol=1e-12)
    single = Memory(memory.tokens.float(), memory.labels.float())(torch.from_numpy(queries).float(), k, 0.02)
    assert np.allclose(single.numpy(), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (7, 13), (64, 5)])
def test_chunks_change_nothing(monkeypatch, rows, columns):
    rng = torch.Generator().manual_seed(0)
    memory = Memory(
        F.normalize(torch.randn(50, 8, generator=rng, dtype=torch.float64), dim=-1),
        torch.rand(50, 3, generator=rng, dtype=torch.float64),
    )
    queries = F.normalize(torch.randn(20, 8, generator=rng, dtype=torch.float64), dim=-1)
    whole = memory(queries, 10, 0.02)
    monkeypatch.setattr(retrieval, "ROWS", rows)
    monkeypatch.setattr(retrieval, "COLUMNS", columns)
    assert torch.allclose(memory(queries, 10, 0.02), whole, rtol=0, atol=1e-12)


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(0, 2**31))
@settings(deadline=None, max_examples=30)
def test_soft_labels_are_shares_of_labelled_pixels(h, w, patch, seed):
    mask = torch.from_numpy(np.random.default_rng(seed).integers(IGNORE, 3, (h * patch, w * patch)))
    actual = class_shares(mask, patch, 3).view(h, w, 3)
    for row in range(h):
        for column in range(w):
            pixels = mask[row * patch : (row + 1) * patch, column * patch : (column + 1) * patch].flatten().tolist()
            known = [c for c in pixels if c != IGNORE]
            expected = [known.count(c) / len(known) if known else 0 for c in range(3)]
            assert actual[row, column].tolist() == pytest.approx(expected)


def gradients(images, size=64):
    """Images in which no patch is like another."""
    rng = torch.Generator().manual_seed(1)
    return [
        F.interpolate(torch.rand(1, 3, 4, 4, generator=rng) * 255, size, mode="nearest")[0].byte()
        for _ in range(images)
    ]


def test_memory_is_bounded_seeded_and_spread_evenly():
    masks = [torch.full((64, 64), i % 4) for i in range(6)]
    masks[5][:, 16:] = IGNORE  # four labelled patches alone
    data = labelled(gradients(6), masks)

    def small(most, **settings):
        return build_memory(Colours(), data, make_context(**settings), 64, most)

    for most in (1, 5, 6, 20, 33):
        memory = small(most)
        assert len(memory.tokens) == len(memory.labels) <= most
        assert torch.allclose(memory.tokens.norm(dim=1), torch.ones(len(memory.tokens)))
        assert torch.equal(memory.labels.sum(1), torch.ones(len(memory.labels)))
    rows = small(20).labels.sum(0).tolist()  # three or four an image; classes 0 and 1 have two images each
    assert sum(rows) == 20
    assert all(low <= row <= high for row, (low, high) in zip(rows, [(6, 8), (6, 8), (3, 4), (3, 4)], strict=True))
    everything = small(10_000)
    assert len(everything.tokens) == 5 * 16 + 4
    assert len(everything.tokens.unique(dim=0)) == 84  # none twice
    assert torch.equal(small(20).tokens, small(20, batch_size=1).tokens)
    assert not torch.equal(small(20).tokens, small(20, seed=1).tokens)


def test_masks_without_labelled_pixels_are_reported():
    data = labelled(gradients(2), [torch.full((64, 64), IGNORE)] * 2)
    with pytest.raises(UserError, match="no pixel of the training masks") as caught:
        build_memory(Colours(), data, make_context(), 64, 10)
    assert caught.value.code == 3


def test_means_are_over_the_classes_to_report():
    """Three classes: IoU 1/2, 1/2 and 0; the third one is left out of the means, but its pixels stay false."""
    truth = [torch.tensor([[0, 0, 1, 2]])]
    guess = [torch.tensor([[0, 2, 1, 1]])]
    counts = [dense.count_pixels(g, t, 3) for g, t in zip(guess, truth, strict=True)]
    data = Labelled(None, [0], truth, "masks", ("a", "b", "c"), "digest", report_classes=("a", "b"))
    some, every = dense.metrics(dense.stack_counts(counts, data)), dense.metrics(dense.stack_counts(counts))
    assert every["mIoU"] == pytest.approx(100 * (1 / 2 + 1 / 2 + 0) / 3)
    assert some["mIoU"] == pytest.approx(100 * (1 / 2 + 1 / 2) / 2)
    assert some["mAcc"] == pytest.approx(100 * (1 / 2 + 1) / 2) and every["mAcc"] == pytest.approx(50)
    assert some["aAcc"] == every["aAcc"] == 50
    assert len(dense.per_class(dense.stack_counts(counts, data))["IoU"]) == 3
