"""Colour, rotation and normalisation of batches, against torchvision on one crop after the other."""

from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ImageOps
from torchvision.transforms.v2 import functional as vision

from gtsa.core.types import Crops, Views
from gtsa.data import augment

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


def floats(seed, *shape):
    return pixels(seed, *shape).float() / 255


def column(*values):
    return torch.tensor(values, dtype=torch.float32)[:, None, None, None]


def close(a, b, atol=2e-6):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("ours", "reference"),
    [
        (augment.brightened, vision.adjust_brightness),
        (augment.contrasted, vision.adjust_contrast),
        (augment.saturated, vision.adjust_saturation),
    ],
    ids=lambda f: f.__name__,
)
@few
@given(a=factors, b=factors, seed=st.integers(0, 99))
def test_factor_is_torchvisions(ours, reference, a, b, seed):
    x = floats(seed, 2, 3, 9, 9)
    close(ours(x, column(a, b)), torch.stack([reference(x[0], a), reference(x[1], b)]))


@few
@given(st.floats(-0.5, 0.5), st.floats(-0.5, 0.5), st.integers(0, 99))
def test_hue_is_torchvisions(a, b, seed):
    x = floats(seed, 2, 3, 9, 9)
    close(
        augment.hue_shifted(x, column(a, b)),
        torch.stack([vision.adjust_hue(x[0], a), vision.adjust_hue(x[1], b)]),
        1e-5,
    )


def test_grey_is_torchvisions():
    x = floats(0, 4, 3, 9, 9)
    close(augment.grey(x).expand_as(x), vision.rgb_to_grayscale(x, 3))


@few
@given(st.floats(0.1, 2), st.floats(0.1, 2), st.integers(2, 20))
def test_blur_is_torchvisions(a, b, side):
    x = floats(side, 2, 3, side, side)
    width = 2 * min(6, side - 1) + 1
    reference = [vision.gaussian_blur(x[i], [width, width], [s, s]) for i, s in enumerate((a, b))]
    close(augment.blurred(x, column(a, b)), torch.stack(reference))


def crops(recipes, rotations, seed=0, side=12):
    """One crop for each recipe, as [B = n, 1] crops."""
    n = len(rotations)
    return Crops(
        pixels(seed, n, 1, 3, side, side),
        torch.rand(n, 1, 4, dtype=torch.float64),
        torch.tensor(rotations)[:, None],
        torch.tensor(recipes, dtype=torch.float32)[:, None],
    )


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


@few
@given(st.lists(st.tuples(recipes_, st.integers(0, 3)), min_size=1, max_size=6), st.integers(0, 99))
def test_whole_recipe_is_torchvision_in_its_order(requested, seed):
    recipes, rotations = zip(*requested, strict=True)
    given_ = crops(recipes, rotations, seed)
    out = augment.apply(Views(given_), CPU, MEAN, STD).global_crops
    for i, (recipe, turn) in enumerate(requested):
        close(out.pixels[i, 0], slowly(given_.pixels[i, 0], recipe, turn, MEAN, STD), 1e-4)


def test_every_order_is_the_one_it_names():
    recipes = [(0.6, 1.7, 1.5, 0.15, order, 0, 0, 0) for order in range(24)]
    given_ = crops(recipes, [0] * 24)
    given_.pixels[:] = given_.pixels[0]
    out = augment.apply(Views(given_), CPU, *PLAIN).global_crops.pixels[:, 0]
    for order, recipe in enumerate(recipes):
        close(out[order], slowly(given_.pixels[0, 0], recipe, 0, *PLAIN), 2e-5)
    assert (out[0] - out[23]).abs().max() > 0.01


def test_solarisation_is_pillows():
    given_ = crops([(1, 1, 1, 0, -1, 0, 0, 1)] * 3, [0, 1, 0])
    given_.pixels[0, 0].view(-1)[:256] = torch.arange(256, dtype=torch.uint8)
    out = augment.apply(Views(given_), CPU, *PLAIN).global_crops.pixels
    for i, turn in enumerate((0, 1, 0)):
        solarised = ImageOps.solarize(vision.to_pil_image(given_.pixels[i, 0]), 128)
        close(out[i, 0], torch.rot90(vision.to_image(solarised).float() / 255, turn, (-2, -1)), 1e-6)


def test_turn_is_counter_clockwise_and_colour_false_leaves_colours():
    given_ = crops([(0.1, 0.1, 0.1, 0.2, 5, 1, 2, 1)] * 4, [0, 1, 2, 3], side=2)
    given_.pixels[:] = torch.tensor([[10, 20], [30, 40]], dtype=torch.uint8)
    out = augment.apply(Views(given_), CPU, *PLAIN, colour=False).global_crops.pixels[:, 0, 0]
    by_hand = [[[10, 20], [30, 40]], [[20, 40], [10, 30]], [[40, 30], [20, 10]], [[30, 10], [40, 20]]]
    assert out.mul(255).round().int().tolist() == by_hand


def test_normalisation_by_hand():
    given_ = crops([(1, 1, 1, 0, -1, 0, 0, 0)], [0])
    given_.pixels[:] = torch.tensor([51, 102, 204], dtype=torch.uint8)[:, None, None]
    out = augment.apply(Views(given_), CPU, (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)).global_crops.pixels
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
