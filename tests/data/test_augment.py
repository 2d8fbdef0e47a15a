"""Colour, rotation and normalisation of batches, against torchvision on one crop after the other."""

from functools import partial
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ImageOps
from torchvision.transforms.v2 import functional as vision

from gtsa.core.types import Crops, Views
from gtsa.data.views import augment, augment_batch, augment_crop

few = settings(deadline=None, max_examples=30)
CPU = torch.device("cpu")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PLAIN = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
JITTER = [vision.adjust_brightness, vision.adjust_contrast, vision.adjust_saturation, vision.adjust_hue]
factors = st.floats(0, 2)


def pixels(seed, *shape):
    """uint8, with grey, black, white and fully saturated pixels among them."""
    x = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    x[..., 0, 0], x[..., 0, 1] = 0, 255
    x[..., 1, 0] = 77
    x[..., 0, 1, 1], x[..., 1:, 1, 1] = 255, 0
    return x


def close(a, b, atol=2e-6):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def crops(recipes, rotations, seed=0, side=12):
    """One crop for each recipe, as [B = n, 1] crops."""
    n = len(rotations)
    return Crops(
        pixels(seed, n, 1, 3, side, side),
        torch.rand(n, 1, 4, dtype=torch.float64),
        torch.tensor(rotations)[:, None],
        torch.tensor(recipes, dtype=torch.float32)[:, None],
    )


BATCHED = partial(augment_batch.finish, device=CPU)
WAYS = pytest.mark.parametrize("way", [augment_crop.finish, BATCHED], ids=["by crop", "in batches"])
NEUTRAL = (1.0, 1.0, 1.0, 0.0)


def finished(way, recipes, rotations, mean=MEAN, std=STD, **options):
    """The crops as cut, and their pixels one after the other after augmentation on a CPU in either way."""
    given_ = crops(recipes, rotations, **options)
    return given_, way(given_, mean, std, True).flatten(0, 1)


def recipe_of(*, jitter=None, value=None, order=0, grey=0, sigma=0.0, solarize=0):
    """A recipe with a single operation of colour jitter, whose other operations change nothing."""
    values = [value if name == jitter else neutral for name, neutral in enumerate(NEUTRAL)]
    return (*values, -1 if jitter is None else order, grey, sigma, solarize)


@WAYS
@pytest.mark.parametrize("jitter", range(3), ids=["brightness", "contrast", "saturation"])
@few
@given(a=factors, b=factors, seed=st.integers(0, 99))
def test_factor_is_torchvisions(way, jitter, a, b, seed):
    recipes = [recipe_of(jitter=jitter, value=value) for value in (a, b)]
    given_, out = finished(way, recipes, [0, 0], *PLAIN, seed=seed)
    x = given_.pixels[:, 0].float() / 255
    close(out, torch.stack([JITTER[jitter](x[0], a), JITTER[jitter](x[1], b)]), 1e-5)


@WAYS
@few
@given(st.floats(-0.5, 0.5), st.floats(-0.5, 0.5), st.integers(0, 99))
def test_hue_is_torchvisions(way, a, b, seed):
    given_, out = finished(way, [recipe_of(jitter=3, value=value) for value in (a, b)], [0, 0], *PLAIN, seed=seed)
    x = given_.pixels[:, 0].float() / 255
    close(out, torch.stack([vision.adjust_hue(x[0], a), vision.adjust_hue(x[1], b)]), 1e-5)


@WAYS
def test_grey_is_torchvisions(way):
    given_, out = finished(way, [recipe_of(grey=1)] * 4, [0] * 4, *PLAIN)
    close(out, vision.rgb_to_grayscale(given_.pixels[:, 0].float() / 255, 3))


@WAYS
@few
@given(st.floats(0.1, 2), st.floats(0.1, 2), st.integers(2, 20))
def test_blur_is_torchvisions(way, a, b, side):
    given_, out = finished(way, [recipe_of(sigma=s) for s in (a, b)], [0, 0], *PLAIN, side=side)
    width = 2 * min(6, side - 1) + 1
    x = given_.pixels[:, 0].float() / 255
    reference = [vision.gaussian_blur(x[i], [width, width], [s, s]) for i, s in enumerate((a, b))]
    close(out, torch.stack(reference), 1.5e-4)  # by crop, taps beyond four standard deviations are left out


def slowly(pixels, recipe, turn, mean, std):
    """One crop by torchvision, operation after operation."""
    brightness, contrast, saturation, hue, order, grey, sigma, _ = recipe
    x = vision.to_dtype(pixels, torch.float32, scale=True)
    if order >= 0:
        for which in list(permutations(range(4)))[int(order)]:
            x = JITTER[which](x, (brightness, contrast, saturation, hue)[which])
    if grey:
        x = vision.rgb_to_grayscale(x, 3)
    if sigma:
        x = vision.gaussian_blur(x, [13, 13], [sigma, sigma])
    return vision.normalize(vision.rotate(x, 90 * turn), list(mean), list(std))


recipes_ = st.tuples(
    factors,
    factors,
    factors,
    st.floats(-0.2, 0.2),
    st.integers(-1, 23),
    st.sampled_from([0, 1]),
    st.one_of(st.just(0.0), st.floats(0.1, 2)),
    st.just(0),
)


@WAYS
@few
@given(st.lists(st.tuples(recipes_, st.integers(0, 3)), min_size=1, max_size=6), st.integers(0, 99))
def test_whole_recipe_is_torchvision_in_its_order(way, requested, seed):
    recipes, rotations = zip(*requested, strict=True)
    given_, out = finished(way, recipes, rotations, seed=seed)
    for i, (recipe, turn) in enumerate(requested):
        close(out[i], slowly(given_.pixels[i, 0], recipe, turn, MEAN, STD), 1e-3)  # a fifteenth of a grey level


@WAYS
def test_every_order_is_the_one_it_names(way):
    recipes = [(0.6, 1.7, 1.5, 0.15, order, 0, 0, 0) for order in range(24)]
    given_ = crops(recipes, [0] * 24)
    given_.pixels[:] = given_.pixels[0]
    out = way(given_, *PLAIN, True).flatten(0, 1)
    for order, recipe in enumerate(recipes):
        close(out[order], slowly(given_.pixels[0, 0], recipe, 0, *PLAIN), 2e-5)
    assert (out[0] - out[23]).abs().max() > 0.01


@WAYS
@pytest.mark.parametrize("factor", [0.0, 1e-40, 1e-32, 1e-28, 1e-6])
def test_a_factor_near_zero_leaves_the_other_operations(way, factor):
    factors_ = [[factor if name == small else 1.7 for name in range(3)] for small in range(3)]
    recipes = [(*some, 0.3, order, 0, 1.0, 0) for some in factors_ for order in range(0, 24, 2)]
    given_, out = finished(way, recipes, [0] * len(recipes), *PLAIN)
    for i, recipe in enumerate(recipes):
        close(out[i], slowly(given_.pixels[i, 0], recipe, 0, *PLAIN), 3e-4)


@WAYS
@pytest.mark.parametrize("solarize", [0, 1])
def test_a_greyscale_crop_is_blurred_and_solarised(way, solarize):
    given_, out = finished(way, [(1.4, 0.7, 1.6, -0.2, 9, 1, 1.5, solarize)], [3], side=20)
    grey = slowly(given_.pixels[0, 0], (1.4, 0.7, 1.6, -0.2, 9, 1, 1.5, 0), 3, *PLAIN)
    grey = torch.where(grey >= 128 / 255, 1 - grey, grey) if solarize else grey
    close(out[0], vision.normalize(grey, list(MEAN), list(STD)), 1e-3)


@WAYS
def test_solarisation_is_pillows(way):
    given_ = crops([(1, 1, 1, 0, -1, 0, 0, 1)] * 3, [0, 1, 0])
    given_.pixels[0, 0].view(-1)[:256] = torch.arange(256, dtype=torch.uint8)
    out = way(given_, *PLAIN, True)
    for i, turn in enumerate((0, 1, 0)):
        solarised = ImageOps.solarize(vision.to_pil_image(given_.pixels[i, 0]), 128)
        close(out[i, 0], torch.rot90(vision.to_image(solarised).float() / 255, turn, (-2, -1)), 1e-6)


@WAYS
def test_turn_is_counter_clockwise_and_colour_false_leaves_colours(way):
    given_ = crops([(0.1, 0.1, 0.1, 0.2, 5, 1, 2, 1)] * 4, [0, 1, 2, 3], side=2)
    given_.pixels[:] = torch.tensor([[10, 20], [30, 40]], dtype=torch.uint8)
    out = way(given_, *PLAIN, False)[:, 0, 0]
    by_hand = [[[10, 20], [30, 40]], [[20, 40], [10, 30]], [[40, 30], [20, 10]], [[30, 10], [40, 20]]]
    assert out.mul(255).round().int().tolist() == by_hand


@WAYS
def test_normalisation_by_hand(way):
    given_ = crops([(1, 1, 1, 0, -1, 0, 0, 0)], [0])
    given_.pixels[:] = torch.tensor([51, 102, 204], dtype=torch.uint8)[:, None, None]
    out = way(given_, (0.1, 0.2, 0.3), (0.5, 0.25, 2.0), True)
    assert out[0, 0, :, 0, 0].tolist() == pytest.approx([0.2, 0.8, 0.25])


def test_groups_counts_and_what_travels_with_them():
    few_, many = (
        crops([(1, 1, 1, 0, -1, 0, 0, 0)] * 2, [1, 2]),
        crops([(0.5, 1, 1, 0.1, 3, 1, 1, 0)] * 6, [0, 1, 2, 3, 0, 1], 5),
    )
    many = many.each(lambda t: t.reshape(2, 3, *t.shape[2:]))
    views = Views(few_, many, images=torch.tensor([7, 9]))
    kept = [c.each(torch.clone) for c in views.groups]
    out = augment.apply(views, CPU, MEAN, STD)
    assert out.images.tolist() == [7, 9]
    for before, given_, after in zip(kept, views.groups, out.groups, strict=True):
        assert torch.equal(before.pixels, given_.pixels)  # what came from the workers stays as it was
        assert after.pixels.shape == given_.pixels.shape
        assert after.pixels.dtype == torch.float32
        for part in ("boxes", "rotations", "colours"):
            assert torch.equal(getattr(after, part), getattr(before, part))
    for i in range(6):
        b, v = divmod(i, 3)
        expected = slowly(many.pixels[b, v], many.colours[b, v].tolist(), int(many.rotations[b, v]), MEAN, STD)
        close(out.local_crops.pixels[b, v], expected, 2e-5)


@few
@given(st.lists(st.tuples(recipes_, st.integers(0, 3)), min_size=1, max_size=5), st.integers(0, 99))
def test_both_ways_agree(requested, seed):
    recipes, rotations = zip(*requested, strict=True)
    (_, by_crop), (_, batched) = (
        finished(way, recipes, rotations, seed=seed) for way in (augment_crop.finish, BATCHED)
    )
    close(by_crop, batched, 1e-3)


def test_what_a_worker_has_finished_is_only_moved():
    views = Views(crops([recipe_of(jitter=0, value=0.5)] * 2, [1, 2]))
    once = augment.apply(views, CPU, MEAN, STD)
    twice = augment.apply(once, CPU, MEAN, STD)
    assert twice.global_crops.pixels is once.global_crops.pixels


def test_one_crop_is_the_same_alone_and_among_others():
    recipes = [(1.4, 0.7, 1.5, 0.1, 7, 0, 1.0, 0), (0.5, 1.6, 0.2, -0.1, 3, 1, 0, 1), (1, 1, 1, 0, -1, 0, 0.3, 0)]
    given_, out = finished(augment_crop.finish, recipes, [3, 0, 1])
    for i in range(3):
        alone = given_.each(lambda tensor, i=i: tensor[i : i + 1])
        assert torch.equal(augment_crop.finish(alone, MEAN, STD, True)[0, 0], out[i])
