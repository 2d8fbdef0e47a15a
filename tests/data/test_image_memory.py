"""Decoded images in memory: the same pixels with the same strides, shared by workers, never more than there is room for."""

import multiprocessing
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from gtsa.core.types import Draw
from gtsa.data.batches import image_memory
from gtsa.data.batches.image_memory import ImageMemory, decoded_bytes, memory_for
from gtsa.data.batches.loader import StepSampler, ViewSet, loader
from gtsa.data.images.decoding import decode
from gtsa.data.images.pixels import BadImage
from gtsa.data.views.multicrop import MultiCrop

few = settings(deadline=None, max_examples=30)
SMALL = MultiCrop(global_crops_size=16, local_crops_size=8, local_crops_number=2)


class Counting:
    """Image i is noise of its own; ``reads`` counts in all processes."""

    def __init__(self, bad=()):
        self.bad, self.reads = set(bad), multiprocessing.get_context("fork").Value("i", 0)

    def read(self, index, detail=None):
        with self.reads.get_lock():
            self.reads.value += 1
        if index in self.bad:
            raise BadImage("bad")
        noise = torch.Generator().manual_seed(index)
        return torch.randint(0, 256, (20 + index, 30, 3), dtype=torch.uint8, generator=noise).movedim(-1, 0)


def batches(workers, memory, bad=(), steps=10):
    source = Counting(bad)
    views = ViewSet(source, range(8), SMALL, seed=3, memory=memory)
    return list(loader(views, StepSampler(8, 4, steps), workers)), source.reads.value


@pytest.mark.parametrize(
    "workers", [0, pytest.param(2, marks=pytest.mark.skipif(sys.platform != "linux", reason="forks"))]
)
def test_the_stream_is_the_same_and_images_are_decoded_once(workers):
    plain, reads = batches(workers, None)
    kept, fewer = batches(workers, ImageMemory(8, 10**6))
    assert reads == 40
    assert 8 <= fewer <= 8 * max(1, workers)
    for a, b in zip(plain, kept, strict=True):
        assert torch.equal(a.images, b.images)
        assert all(torch.equal(x.pixels, y.pixels) for x, y in zip(a.groups, b.groups, strict=True))


def test_bad_images_are_tried_again_and_reported_each_time():
    kept, _ = batches(0, ImageMemory(8, 10**6), bad=[2])
    assert sum(entry.image == 2 for batch in kept for entry in batch.replaced) == 5


@few
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9), st.booleans()), min_size=1, max_size=8),
    st.integers(0, 900),
)
def test_what_comes_back_is_what_was_kept(shapes, capacity):
    memory, kept = ImageMemory(len(shapes), capacity), 0
    for index, (height, width, channels_last) in enumerate(shapes):
        shape = (height, width, 3) if channels_last else (3, height, width)
        image = torch.randint(0, 256, shape, dtype=torch.uint8)
        image = image.movedim(-1, 0) if channels_last else image
        assert memory.get(index) is None
        memory.put(index, image)
        again = memory.get(index)
        if again is None:
            assert kept + image.numel() > capacity
        else:
            kept += image.numel()
            assert torch.equal(again, image)
            if image.numel() > 3:
                assert again.is_contiguous() == image.is_contiguous()
    assert kept <= capacity


@few
@given(st.integers(16, 900), st.integers(16, 900), st.sampled_from(["x.jpg", "x.png"]))
def test_decoded_bytes_are_those_of_the_decoder(tmp_path_factory, width, height, name):
    path = tmp_path_factory.mktemp("image") / name
    Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(path)
    detail = MultiCrop(global_crops_size=48, local_crops_size=32).detail
    assert decoded_bytes(name, width, height, detail) == decode(path, detail).numel()


def test_only_what_fits_and_is_known_is_kept(monkeypatch):
    files = [("a.png", 100, 100)] * 10
    monkeypatch.setattr(image_memory, "free_memory", lambda: 4 * 300_000)
    assert memory_for(files, SMALL.detail, 10).capacity == 300_000
    assert memory_for(files, SMALL.detail, 10, processes=2) is None
    assert memory_for([*files, ("b.png", 1, 1)], SMALL.detail, 11) is None
    assert memory_for([("a.png", 0, 0)], SMALL.detail, 1) is None


def test_a_limit_of_the_container_counts(monkeypatch, tmp_path):
    monkeypatch.setattr(image_memory, "CGROUP", tmp_path)
    without = image_memory.free_memory()
    assert without > 10**6
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("3000\n")
    assert image_memory.free_memory() == 2000
    (tmp_path / "memory.stat").write_text("anon 1200\ninactive_file 800\nactive_file 1000\n")
    assert image_memory.free_memory() == 2800
    (tmp_path / "memory.max").write_text("max\n")
    assert image_memory.free_memory() > 10**6


def test_an_image_without_memory_is_read_again():
    source = Counting()
    views = ViewSet(source, range(8), SMALL, seed=3, memory=ImageMemory(8, 0))
    for _ in range(2):
        views[Draw(0, 0)]
    assert source.reads.value == 2
