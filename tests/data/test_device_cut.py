"""Crops that the training device cuts are those of the host, to one grey level, with the same draws."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.v2 import functional as vision

from gtsa.core.types import Draw
from gtsa.data.batches.loader import StepSampler, ViewSet, loader
from gtsa.data.views import augment, device_cut
from gtsa.data.views.multicrop import MultiCrop

few = settings(deadline=None, max_examples=30)
CPU = torch.device("cpu")
SMALL = MultiCrop(global_crops_size=32, local_crops_size=16, local_crops_number=2)


class Noise:
    """Images of several sizes."""

    def read(self, index, detail=None):
        shape = (30 + 17 * (index % 3), 40 + 9 * (index % 4), 3)
        noise = torch.Generator().manual_seed(index)
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=noise).movedim(-1, 0)


def both(multicrop=SMALL, images=6, seed=0):
    """The same batch, cut by the host and by a device."""
    draws = [Draw(0, position) for position in range(images)]
    host, uncut = (ViewSet(Noise(), range(images), multicrop, seed, cuts=cuts).batch(draws) for cuts in (True, False))
    assert all(crops.pixels.shape[2] == 0 for crops in uncut.groups)
    return host, device_cut.cut(uncut, CPU)


def same_but_one_level(a, b):
    for x, y in zip(a.groups, b.groups, strict=True):
        for part in ("boxes", "rotations", "colours"):
            assert torch.equal(getattr(x, part), getattr(y, part))
        assert x.pixels.shape == y.pixels.shape and y.pixels.dtype == torch.uint8
        assert (x.pixels.int() - y.pixels.int()).abs().max() <= 1


@few
@given(st.integers(0, 99), st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 3))
def test_crops_are_those_of_the_host(seed, hflip, locals_):
    multicrop = MultiCrop(2, locals_, 32, 16, hflip=hflip)
    same_but_one_level(*both(multicrop, seed=seed))


@few
@given(st.integers(16, 200), st.integers(16, 200), st.integers(0, 99))
def test_crops_are_the_box_resized_with_antialiasing(width, height, seed):
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    crops, _ = SMALL.draw(width, height, np.random.default_rng(seed))
    pixels = device_cut._cut(device_cut.padded([image]), crops[0], torch.zeros(1, 2, dtype=torch.bool))
    for crop, (x1, y1, x2, y2) in zip(pixels[0], crops[0].boxes[0].long().tolist(), strict=True):
        exact = vision.resized_crop(image.double(), y1, x1, y2 - y1, x2 - x1, [32, 32], antialias=True)
        assert (crop - exact).abs().max() < 0.51


def test_parts_of_a_batch_change_nothing(monkeypatch):
    _, whole = both()
    monkeypatch.setattr(device_cut, "LARGEST", 1)
    _, parts = both()
    for x, y in zip(whole.groups, parts.groups, strict=True):
        assert (x.pixels.int() - y.pixels.int()).abs().max() <= 1


def test_the_whole_way_gives_nearly_the_same_views():
    plain, uncut = ((ViewSet(Noise(), range(6), SMALL, 1, cuts=cuts)) for cuts in (True, False))
    draws = [Draw(0, position) for position in range(6)]
    a, b = (augment.apply(views.batch(draws), CPU, (0.5,) * 3, (0.25,) * 3, colour=False) for views in (plain, uncut))
    for x, y in zip(a.groups, b.groups, strict=True):
        assert y.pixels.is_contiguous() == x.pixels.is_contiguous()
        assert (x.pixels - y.pixels).abs().max() <= 4.01 / 255
    assert b.uncut is None


@pytest.mark.parametrize("workers", [0, 2])
def test_the_stream_is_the_same_for_any_number_of_workers(workers):
    views = ViewSet(Noise(), range(6), SMALL, 2, cuts=False)
    expected = [
        device_cut.cut(views.batch([Draw(*divmod(4 * step + i, 6)) for i in range(4)]), CPU) for step in range(3)
    ]
    for a, b in zip(loader(views, StepSampler(6, 4, 3), workers), expected, strict=True):
        cut = device_cut.cut(a, CPU)
        assert torch.equal(cut.images, b.images)
        assert all(torch.equal(x.pixels, y.pixels) for x, y in zip(cut.groups, b.groups, strict=True))
