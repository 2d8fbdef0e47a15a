"""Where crops lie, how they are turned and coloured, and that their pixels are those of the image."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torchvision.transforms.v2 import functional as vision

from gtsa.core.types import Colour
from gtsa.data.views.multicrop import TRIES, MultiCrop, _construct_box

few = settings(deadline=None, max_examples=60)
seeds = st.integers(0, 2**32)
lengths = st.integers(16, 3000)


def rng(seed=0):
    return np.random.default_rng(seed)


def image(width, height, seed=0):
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def shared(a, b):
    """Pixels that two boxes have in common, counted along either axis."""
    across = len(set(range(a[0], a[2])) & set(range(b[0], b[2])))
    return across * len(set(range(a[1], a[3])) & set(range(b[1], b[3])))


def legal(multicrop, width, height, seed):
    """Draws boxes and holds them to everything that must be true of any."""
    globals_, locals_ = multicrop.boxes(width, height, rng(seed))
    assert (len(globals_), len(locals_)) == (multicrop.global_crops_number, multicrop.local_crops_number)
    for x1, y1, x2, y2 in globals_ + locals_:
        assert 0 <= x1 < x2 <= width
        assert 0 <= y1 < y2 <= height
    for i, later in enumerate(globals_):
        assert all(shared(later, earlier) > 0.02 * width * height for earlier in globals_[:i])
    for box in locals_:
        assert all(shared(box, earlier) > 0.01 * width * height for earlier in globals_)
    return globals_, locals_


@few
@given(lengths, lengths, seeds)
@example(3000, 1, 0)
@example(1, 3000, 0)
@example(16, 16, 0)
@example(1, 1, 0)
@example(2, 1, 0)
def test_boxes_lie_in_the_image_and_meet(width, height, seed):
    legal(MultiCrop(), width, height, seed)


@few
@given(st.integers(1, 60), st.integers(1000, 4000), st.integers(1, 5), st.booleans(), seeds)
def test_any_number_of_crops_meets_in_long_images(short, long, globals_, upright, seed):
    multicrop = MultiCrop(global_crops_number=globals_, local_crops_number=3)
    legal(multicrop, *((short, long) if upright else (long, short)), seed)


@few
@given(st.integers(64, 2000), st.floats(0.5, 2), seeds)
def test_shares_and_aspects_are_in_range(width, ratio, seed):
    height = round(width / ratio)
    for boxes, (low, high) in zip(MultiCrop().boxes(width, height, rng(seed)), ((0.3, 1), (0.1, 0.3)), strict=True):
        for x1, y1, x2, y2 in boxes:
            w, h = x2 - x1, y2 - y1
            assert (w - 0.5) * (h - 0.5) <= high * width * height
            assert (w + 0.5) * (h + 0.5) >= low * width * height
            assert (w + 0.5) / (h - 0.5) >= 3 / 4
            assert (w - 0.5) / (h + 0.5) <= 4 / 3


@few
@given(st.integers(16, 60), st.sampled_from([20, 70, 100]), seeds)
def test_long_images_keep_the_share_where_two_globals_are_drawn(short, ratio, seed):
    width, height = short * ratio, short
    globals_, locals_ = MultiCrop().boxes(width, height, rng(seed))
    for boxes, (low, high) in ((globals_, (0.3, 1)), (locals_, (0.1, 0.3))):
        for x1, y1, x2, y2 in boxes:
            w, h = x2 - x1, y2 - y1
            assert (w - 1) * (h - 1) <= high * width * height
            assert (w + 1) * (h + 1) >= low * width * height


def test_constructed_crops_overlap_three_crops_that_hardly_overlap():
    earlier = ((0, 0, 1000, 300), (0, 0, 300, 1000), (271, 271, 1000, 1000))  # 29 x 29 px in common
    actual = {_construct_box(1000, 1000, 0.1, 0.01, earlier, rng(seed)) for seed in range(100)}
    assert all(shared(box, other) > 10_000 for box in actual for other in earlier)
    assert (0, 0, 1000, 1000) in actual
    assert len(actual) > 10


class Counting:
    """Random numbers that count how often they are drawn."""

    def __init__(self):
        self.inner, self.calls = rng(), 0

    def random(self, *shape):
        self.calls += 1
        return self.inner.random(*shape)


@pytest.mark.parametrize(("width", "height"), [(2000, 20), (20, 2000), (4000, 1), (1, 4000), (60000, 16)])
def test_tries_are_bounded(width, height):
    counting, multicrop = Counting(), MultiCrop()
    multicrop.boxes(width, height, counting)
    assert counting.calls <= 10 * (3 * TRIES + 3)


def test_without_a_required_overlap_there_is_one_draw():
    counting = Counting()
    MultiCrop(global_crops_number=1, local_crops_number=0, global_crops_scale=(0.1, 0.2)).boxes(500, 500, counting)
    assert counting.calls == 3  # share, aspect, position


@pytest.mark.parametrize("seed", range(3))
def test_views_are_a_pure_function_of_the_generator(seed):
    picture, multicrop = image(120, 80), MultiCrop(global_crops_size=32, local_crops_size=16)
    before = torch.get_rng_state()
    first, again, other = (multicrop(picture, rng(s)) for s in (seed, seed, seed + 1))
    assert torch.equal(torch.get_rng_state(), before)
    for a, b, c in zip(first.groups, again.groups, other.groups, strict=True):
        for field in dataclasses.fields(a):
            assert torch.equal(getattr(a, field.name), getattr(b, field.name))
        assert not torch.equal(a.boxes, c.boxes)
        assert not torch.equal(a.colours, c.colours)


@few
@given(st.integers(1, 3), st.integers(0, 4), st.integers(2, 40), st.integers(2, 40), seeds)
def test_counts_and_sizes_are_free(globals_, locals_, global_crops_size, local_crops_size, seed):
    multicrop = MultiCrop(globals_, locals_, global_crops_size, local_crops_size)
    views = multicrop(image(50, 40), rng(seed))
    assert len(views.groups) == (2 if locals_ else 1)
    for crops, count, side in zip(
        views.groups, (globals_, locals_), (global_crops_size, local_crops_size), strict=locals_ > 0
    ):
        assert (crops.count, crops.side) == (count, side)
        assert crops.pixels.shape == (1, count, 3, side, side)
        assert crops.boxes.shape == (1, count, 4)
        assert crops.colours.shape == (1, count, len(Colour))
        assert crops.rotations.shape == (1, count)
        dtypes = [getattr(crops, f.name).dtype for f in dataclasses.fields(crops)]
        assert dtypes == [torch.uint8, torch.float64, torch.int64, torch.float32]


@few
@given(st.integers(16, 300), st.integers(16, 300), seeds)
def test_pixels_are_the_box_resized_with_antialiasing(width, height, seed):
    picture = image(width, height)
    for crops in MultiCrop(global_crops_size=48, local_crops_size=24, local_crops_number=2)(picture, rng(seed)).groups:
        for pixels, box in zip(crops.pixels[0], crops.boxes[0].long().tolist(), strict=True):
            x1, y1, x2, y2 = box
            size = [crops.side] * 2
            exact = vision.resized_crop(picture.double(), y1, x1, y2 - y1, x2 - x1, size, antialias=True)
            assert (pixels - exact).abs().max() < 1.5  # rounded to integers after either axis


@few
@given(lengths, lengths, st.integers(1, 2), seeds)
@example(3000, 1, 2, 0)
@example(1, 1, 2, 0)
def test_local_crops_can_lie_inside_all_global_crops(width, height, globals_, seed):
    multicrop = MultiCrop(globals_, 6, local_crops_scale=(0.05, 0.4), local_inside=True)
    globals_, locals_ = legal(multicrop, width, height, seed)
    for box in locals_:
        for other in globals_:
            assert other[0] <= box[0] < box[2] <= other[2]
            assert other[1] <= box[1] < box[3] <= other[3]


@few
@given(st.integers(400, 2000), st.integers(400, 2000), seeds)
def test_crops_inside_keep_their_share_where_it_fits(width, height, seed):
    multicrop = MultiCrop(1, 8, global_crops_scale=(0.8, 1.0), local_crops_scale=(0.1, 0.2), local_inside=True)
    for x1, y1, x2, y2 in multicrop.boxes(width, height, rng(seed))[1]:
        assert 0.095 <= (x2 - x1) * (y2 - y1) / (width * height) <= 0.205


def test_without_a_common_region_local_crops_lie_anywhere():
    multicrop = MultiCrop(
        2, 4, global_crops_scale=(0.05, 0.06), global_overlap=0.0, local_overlap=0.0, local_inside=True
    )
    apart = 0
    for seed in range(20):
        globals_, locals_ = multicrop.boxes(500, 400, rng(seed))
        apart += not shared(*globals_)
        assert all(0 <= x1 < x2 <= 500 and 0 <= y1 < y2 <= 400 for x1, y1, x2, y2 in locals_)
    assert apart > 5


def test_global_crops_can_keep_their_colours():
    """The draws of all else are the same."""
    picture = image(64, 64)
    plain, clean = (
        MultiCrop(
            2, 3, 32, 16, color_jitter=1.0, grayscale=1.0, gaussian_blur=(1.0,) * 3, solarize=(1.0,) * 3, clean_global=c
        )(picture, rng(3))
        for c in (False, True)
    )
    assert (plain.global_crops.colours[..., Colour.ORDER] >= 0).all()
    assert (clean.global_crops.colours[..., Colour.ORDER] == -1).all()
    assert not clean.global_crops.colours[..., [Colour.GRAYSCALE, Colour.SIGMA, Colour.SOLARIZE]].any()
    assert torch.equal(clean.local_crops.colours, plain.local_crops.colours)
    assert (clean.local_crops.colours[..., Colour.SOLARIZE] == 1).all()
    for name in ("boxes", "pixels", "rotations"):
        assert torch.equal(getattr(clean.global_crops, name), getattr(plain.global_crops, name))


def recipes(multicrop, count=4000):
    return multicrop._draw_recipes([2] * count, rng(7))


def rate(hits, expected):
    """A share of independent draws is within five standard deviations of what it should be."""
    return abs(np.mean(hits) - expected) < 5 * math.sqrt(expected * (1 - expected) / len(hits))


def uniform(values, low, high):
    assert low <= values.min() <= values.max() <= high
    return all(rate(values < low + (high - low) * q, q) for q in (0.25, 0.5, 0.75))


def test_turns_are_uniform_and_can_be_left_out():
    picture = image(16, 16)
    rotations = MultiCrop(2000, 1, 2, 2)(picture, rng()).global_crops.rotations[0].numpy()
    assert set(rotations) == {0, 1, 2, 3}
    assert all(rate(rotations == k, 0.25) for k in range(4))
    assert not MultiCrop(200, 1, 2, 2, rotations=False)(picture, rng()).global_crops.rotations.any()


def test_colour_probabilities_are_the_published_ones():
    table = recipes(MultiCrop())
    jittered, grey, blurred = table[:, Colour.ORDER] >= 0, table[:, Colour.GRAYSCALE] > 0, table[:, Colour.SIGMA] > 0
    assert rate(jittered, 0.8)
    assert rate(grey, 0.2)
    assert rate(blurred, 0.2)
    assert rate(grey & blurred, 0.04)
    assert rate(grey & jittered, 0.16)
    assert set(table[:, Colour.GRAYSCALE]) == {0, 1}


def test_colour_strengths_are_the_published_ones():
    table = recipes(MultiCrop())
    for column in (Colour.BRIGHTNESS, Colour.CONTRAST, Colour.SATURATION):
        assert uniform(table[:, column], np.float32(0.2), np.float32(1.8))
    assert uniform(table[:, Colour.HUE], np.float32(-0.2), np.float32(0.2))
    sigma = table[:, Colour.SIGMA]
    assert uniform(sigma[sigma > 0], np.float32(0.1), np.float32(2.0))
    order = table[:, Colour.ORDER]
    assert set(order) == set(range(-1, 24))
    assert all(rate(order[order >= 0] == k, 1 / 24) for k in range(24))


def test_factors_are_never_negative():
    table = recipes(MultiCrop(brightness=1.5))
    assert uniform(table[:, Colour.BRIGHTNESS], 0, 2.5)


def test_colours_can_be_switched_off_and_always_on():
    off = recipes(MultiCrop(color_jitter=0, grayscale=0, gaussian_blur=(0, 0, 0)))
    assert (off[:, Colour.ORDER] == -1).all()
    assert not off[:, [Colour.GRAYSCALE, Colour.SIGMA]].any()
    on = recipes(MultiCrop(color_jitter=1, grayscale=1, gaussian_blur=(1, 1, 1)))
    assert (on[:, [Colour.ORDER]] >= 0).all()
    assert (on[:, [Colour.GRAYSCALE, Colour.SIGMA]] > 0).all()


def test_the_first_crop_the_other_global_ones_and_local_ones_have_their_own_shares():
    multicrop = MultiCrop(2, 3, 2, 2, gaussian_blur=(1, 0.1, 0.5), solarize=(0, 0.2, 0))
    drawn = [multicrop(image(16, 16), rng(seed)) for seed in range(2000)]
    first, second = (torch.cat([v.global_crops.colours[:, n] for v in drawn]).numpy() for n in (0, 1))
    local = torch.cat([v.local_crops.colours[0] for v in drawn]).numpy()
    assert (first[:, Colour.SIGMA] > 0).all() and not first[:, Colour.SOLARIZE].any()
    assert rate(second[:, Colour.SIGMA] > 0, 0.1) and rate(second[:, Colour.SOLARIZE] > 0, 0.2)
    assert rate(local[:, Colour.SIGMA] > 0, 0.5) and not local[:, Colour.SOLARIZE].any()


def test_crops_are_mirrored():
    picture = image(40, 30)
    plain, mirrored = (MultiCrop(3, 2, 32, 16, hflip=share)(picture, rng()) for share in (0.0, 1.0))
    assert torch.equal(plain.global_crops.pixels, mirrored.global_crops.pixels.flip(-1))
    half = MultiCrop(2000, 1, 2, 2, hflip=0.5)(picture, rng()).global_crops
    other = MultiCrop(2000, 1, 2, 2)(picture, rng()).global_crops
    assert rate((half.pixels != other.pixels).flatten(2).any(-1)[0].numpy(), 0.5)
    assert torch.equal(half.boxes, other.boxes)


def test_share_is_uniform_aspect_log_uniform_and_position_uniform():
    free = MultiCrop(1, 3000, local_overlap=0)
    x1, y1, x2, y2 = np.array(free.boxes(3000, 2000, rng())[1], dtype=float).T
    assert uniform((x2 - x1) * (y2 - y1) / 6e6, 0.0995, 0.3005)
    assert uniform(np.log((x2 - x1) / (y2 - y1)), math.log(0.7485), math.log(1.336))
    assert uniform(x1 / (3000 - (x2 - x1)), 0, 1)
    assert uniform(y1 / (2000 - (y2 - y1)), 0, 1)


@few
@given(st.integers(200, 6000), st.floats(1 / 3, 3), st.integers(0, 3), seeds)
def test_detail_enlarges_no_drawn_crop(width, ratio, locals_, seed):
    """At 1/2, 1/4 or 1/8, where detail allows it, every crop has at least as many pixels a side as its output."""
    height = max(200, round(width / ratio))
    multicrop = MultiCrop(local_crops_number=locals_)
    scale = multicrop.detail(width, height)
    assert 0 < scale <= 1
    for part in (2, 4, 8):
        if scale <= 1 / part:
            drawn = multicrop.boxes(math.ceil(width / part), math.ceil(height / part), rng(seed))
            for boxes, side in zip(drawn, (224, 96), strict=True):
                assert all(min(x2 - x1, y2 - y1) >= side for x1, y1, x2, y2 in boxes)


def test_detail_by_hand():
    # the thinnest crop of 0.3 of 4000 x 3000 px has sqrt(0.3 x 12e6 x 3/4) px = 1643.2 a side, of 0.1 948.7 px
    assert MultiCrop(local_crops_number=0).detail(4000, 3000) == pytest.approx(224 / 1643.168)
    assert MultiCrop().detail(4000, 3000) == pytest.approx(224 / 1643.168)
    assert MultiCrop(local_crops_size=224).detail(4000, 3000) == pytest.approx(224 / 948.683)
    assert MultiCrop(aspect=(3 / 4, 4)).detail(4000, 3000) == pytest.approx(224 / math.sqrt(0.3 * 12e6 / 4))
    assert MultiCrop().detail(200, 200) == 1
    assert MultiCrop().detail(30000, 300) == pytest.approx(224 / 300)  # a panorama's crops are as high as it is
    assert MultiCrop().detail(100000, 30) == 1
