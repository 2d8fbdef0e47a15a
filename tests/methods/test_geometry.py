"""Boxes, quarter-turns and pooling, against torchvision.ops.roi_align, torch.rot90 and hand-computed values."""

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torchvision.ops import roi_align

from gtsa.methods.parts.geometry import inside, overlap, patch_centres, pool, rotate_boxes, rotate_maps

few = settings(deadline=None, max_examples=100)
rotations = st.integers(0, 3)
cells_ = st.integers(1, 11)
sides = st.integers(1, 16)


@st.composite
def intervals(draw, length):
    """[low, high) in [0, length]: any, tiny, at the border, whole."""
    low = draw(st.one_of(st.just(0.0), st.floats(0, length * 0.999)))
    high = draw(st.one_of(st.just(float(length)), st.floats(low, length), st.floats(1e-5, 0.9).map(lambda d: low + d)))
    high = min(high, float(length))
    assume(high - low > 1e-6)
    return low, high


@st.composite
def cases(draw, square=False):
    """A random map [h, w, 3], a box in it, and a number of cells outside the band in which ceil() may flip."""
    height = draw(sides)
    width = height if square else draw(sides)
    (x1, x2), (y1, y2) = draw(intervals(width)), draw(intervals(height))
    cells = draw(cells_)
    for extent in (x2 - x1, y2 - y1):
        ratio = extent / cells
        assume(round(ratio) == 0 or abs(ratio - round(ratio)) > 1e-9)
    maps = torch.randn(height, width, 3, dtype=torch.float64, generator=seeded(draw(st.integers(0, 99))))
    return maps, torch.tensor([x1, y1, x2, y2], dtype=torch.float64), cells


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def aligned(maps, box, cells):
    """torchvision's RoIAlign of one map [h, w, C] -> [cells, cells, C]."""
    pooled = roi_align(maps.permute(2, 0, 1)[None], [box[None]], cells, sampling_ratio=-1, aligned=True)
    return pooled[0].permute(1, 2, 0)


def turned(maps, k):
    return torch.rot90(maps, k, (0, 1))


def close(a, b):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= 1e-12


@few
@given(cases(), rotations)
def test_pooled_and_rotated_is_roi_align_and_rot90(case, k):
    maps, box, cells = case
    close(rotate_maps(pool(maps, box[None], cells), torch.tensor([k]))[0], turned(aligned(maps, box, cells), k))


@few
@given(cases(), rotations)
def test_gradients_are_those_of_roi_align_and_rot90(case, k):
    maps, box, cells = case
    maps.requires_grad_()
    weight = torch.randn(cells, cells, 3, dtype=torch.float64, generator=seeded(1))
    ours = (rotate_maps(pool(maps, box[None], cells), torch.tensor([k]))[0] * weight).sum()
    reference = (turned(aligned(maps, box, cells), k) * weight).sum()
    close(*(torch.autograd.grad(loss, maps)[0] for loss in (ours, reference)))


@pytest.mark.parametrize("cells", [1, 2, 7, 10, 14, 20])
def test_whole_map_is_roi_align(cells):
    maps = torch.randn(14, 14, 5, dtype=torch.float64, generator=seeded(0))
    box = torch.tensor([0.0, 0, 14, 14], dtype=torch.float64)
    close(pool(maps, box[None], cells)[0], aligned(maps, box, cells))


def test_cell_of_one_sample_is_the_bilinear_value():
    maps = torch.tensor([[0.0, 1], [2, 3]], dtype=torch.float64)[..., None]
    assert pool(maps, torch.tensor([[0.0, 0, 2, 2]]), 2).flatten().tolist() == [0, 1, 2, 3]
    assert pool(maps, torch.tensor([[0.5, 0.5, 1.5, 1.5]]), 1).item() == 1.5
    assert pool(maps, torch.tensor([[0.5, 0.0, 1.5, 1.0]]), 1).item() == 0.5


@few
@given(sides, cells_, st.floats(-1e-9, 1e-9), st.floats(0, 1e-9))
@example(14, 7, -1e-15, 0.0)  # 14 + 1e-15 over 7 cells wants a third sample a bin
@example(10, 10, 0.0, 2e-15)
def test_constant_map_stays_constant_whatever_the_rounding(side, cells, low, more):
    box = torch.tensor([[low, low, side + more, side + more]], dtype=torch.float64)
    close(pool(torch.ones(side, side, 1, dtype=torch.float64), box, cells), torch.ones(1, cells, cells, 1).double())


def test_pool_takes_leading_dimensions():
    maps = torch.randn(2, 3, 6, 6, 4, dtype=torch.float64, generator=seeded(0))
    low, size = (torch.rand(2, 3, 5, 2, dtype=torch.float64, generator=seeded(s)) * 3 for s in (1, 2))
    boxes = torch.cat([low, low + size], -1)
    pooled = pool(maps, boxes, 4)
    assert pooled.shape == (2, 3, 5, 4, 4, 4)
    for b, v, n in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(5)).tolist():
        close(pooled[b, v, n], aligned(maps[b, v], boxes[b, v, n], 4))


@few
@given(cases(square=True), rotations)
def test_pooling_commutes_with_rotation(case, k):
    maps, box, cells = case
    side, k_ = maps.shape[0], torch.tensor([k])
    of_turned = pool(turned(maps, k), rotate_boxes(box[None], k_, side), cells)
    close(of_turned, rotate_maps(pool(maps, box[None], cells), k_))


@given(st.integers(1, 9), st.lists(st.integers(-5, 9), min_size=1, max_size=5))
@few
def test_rotate_maps_is_rot90(side, ks):
    maps = torch.randn(len(ks), side, side, 2, generator=seeded(side))
    for given_, k, out in zip(maps, ks, rotate_maps(maps, torch.tensor(ks)), strict=True):
        assert torch.equal(out, turned(given_, k))


@given(st.integers(-4, 8), st.integers(-4, 8))
@few
def test_rotations_are_the_cyclic_group_of_order_four(i, j):
    a, b, both, none = (torch.tensor([k]) for k in (i, j, i + j, 0))
    boxes = torch.randint(0, 800, (1, 4), generator=seeded(3)).double() / 8
    maps = torch.randn(1, 5, 5, 2, generator=seeded(4))
    assert torch.equal(rotate_boxes(rotate_boxes(boxes, a, 100), b, 100), rotate_boxes(boxes, both, 100))
    assert torch.equal(rotate_maps(rotate_maps(maps, a), b), rotate_maps(maps, both))
    assert torch.equal(rotate_boxes(boxes, none, 100), boxes)
    assert torch.equal(rotate_maps(maps, none), maps)
    if (i - j) % 4:
        assert not torch.equal(rotate_maps(maps, a), rotate_maps(maps, b))


@given(st.data(), st.integers(1, 20), rotations)
@few
def test_rotate_boxes_follows_a_rectangle_in_a_rotated_image(data, side, k):
    x1, y1 = (data.draw(st.integers(0, side - 1)) for _ in range(2))
    x2, y2 = data.draw(st.integers(x1 + 1, side)), data.draw(st.integers(y1 + 1, side))
    image = torch.zeros(side, side)
    image[y1:y2, x1:x2] = 1
    rows, columns = turned(image, k).nonzero(as_tuple=True)
    actual = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert rotate_boxes(torch.tensor([x1, y1, x2, y2]), torch.tensor(k), side).tolist() == [int(v) for v in actual]


def test_rotate_boxes_broadcasts_turns():
    boxes = torch.rand(2, 3, 5, 4, generator=seeded(0))
    ks = torch.tensor([[0, 1, 2], [3, 0, 1]])
    out = rotate_boxes(boxes, ks[..., None], 1.0)
    for b in range(2):
        for v in range(3):
            assert torch.equal(out[b, v], rotate_boxes(boxes[b, v], ks[b, v].expand(5), 1.0))


def test_inside_by_hand():
    crop = torch.tensor([10.0, 20, 110, 70])  # 100 x 50 px, resized to 200 x 200: scales 2 and 4
    assert inside(torch.tensor([30.0, 30, 60, 50]), crop, 200).tolist() == [40, 40, 100, 120]
    assert inside(crop, crop, 200).tolist() == [0, 0, 200, 200]
    assert inside(torch.tensor([0.0, 0, 10, 20]), crop, 200).tolist() == [-20, -80, 0, 0]


def test_overlap_by_hand():
    a, b = torch.tensor([0.0, 0, 10, 10]), torch.tensor([4.0, -5, 20, 6])
    assert overlap(a, b).tolist() == [4, 0, 10, 6]
    assert overlap(b, a).tolist() == [4, 0, 10, 6]
    apart = overlap(a, torch.tensor([12.0, 3, 15, 7]))
    assert apart[2] - apart[0] == -2
    assert overlap(torch.zeros(2, 1, 4), torch.zeros(3, 4)).shape == (2, 3, 4)


@few
@given(st.integers(0, 10**6), st.integers(60, 200), st.integers(60, 200), st.integers(1, 8))
def test_positions_agree_with_the_colours_of_a_picture(seed, width, height, grid):
    """Red rises to the right and green downwards, so the mean colour of a patch tells where its centre lies."""
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    rng = np.random.default_rng(seed)
    x1, y1 = rng.integers(0, width // 2), rng.integers(0, height // 2)
    x2, y2 = rng.integers(x1 + 16, width + 1), rng.integers(y1 + 16, height + 1)
    rotations = int(rng.integers(4))
    side = 8 * grid
    cut = torch.stack([x, y])[None, :, y1:y2, x1:x2].double()
    crop = torch.nn.functional.interpolate(cut, (side, side), mode="bilinear", antialias=True)[0]
    seen = torch.rot90(crop, rotations, (-2, -1))
    means = torch.nn.functional.avg_pool2d(seen, 8).flatten(1).T
    box = torch.tensor([x1, y1, x2, y2], dtype=torch.float64)
    actual = patch_centres(box, torch.tensor(rotations), side, grid)
    assert actual.shape == (grid * grid, 2)
    assert (actual - means).abs().max() < 0.6  # px: interpolation holds the border


def test_positions_by_hand():
    box = torch.tensor([10.0, 20, 30, 60])
    assert patch_centres(box, torch.tensor(0), 8, 2).tolist() == [[15, 30], [25, 30], [15, 50], [25, 50]]
    assert patch_centres(box, torch.tensor(1), 8, 2).tolist() == [
        [25, 30],
        [25, 50],
        [15, 30],
        [15, 50],
    ]  # right edge on top
