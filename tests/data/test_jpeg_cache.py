"""The cache of downscaled JPEGs: made once, the same pixels whether it can be written or not, never of another image."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from gtsa.data.batches.jpeg_cache import JpegCache
from gtsa.data.images.pixels import BadImage
from gtsa.data.sources import open_source
from gtsa.data.views.multicrop import MultiCrop

VIEWS = MultiCrop(global_crops_size=32, local_crops_size=16)


def photo(height, width, shade=0):
    y, x = np.mgrid[:height, :width]
    values = [127 + 120 * np.sin(x / 17 + shade), 127 + 120 * np.cos(y / 13), 127 + 120 * np.sin((x + y) / 29)]
    return np.stack(values, -1).astype(np.uint8)


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    Image.fromarray(photo(300, 400)).save(folder / "large.png")
    Image.fromarray(photo(30, 40)).save(folder / "small.png")
    return folder


def cached(images, folder, views=VIEWS, settings=""):
    return JpegCache(open_source(str(images)), str(folder), views, settings)


def files_in(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*.jpg")}


def test_an_image_is_reduced_to_what_its_views_need_and_kept(images, tmp_path):
    cache = tmp_path / "cache"
    first = cached(images, cache).read(0, VIEWS.detail)
    scale = VIEWS.detail(400, 300)
    assert first.shape == (3, np.ceil(300 * scale), np.ceil(400 * scale))
    small = Image.fromarray(photo(300, 400)).resize((first.shape[2], first.shape[1]), Image.Resampling.BILINEAR)
    assert (torch.from_numpy(np.array(small)).movedim(-1, 0).int() - first.int()).abs().float().mean() < 2
    before = files_in(cache)
    assert len(before) == 1
    Image.fromarray(photo(300, 400, 2)).save(images / "other.png")
    again = cached(images, cache).read(0, VIEWS.detail)
    assert torch.equal(again, first)
    assert again.stride() == first.stride()
    assert files_in(cache) == before
    assert not list(cache.rglob(".*"))


def test_a_kept_image_is_read_without_the_source(images, tmp_path, monkeypatch):
    cache = cached(images, tmp_path / "cache")
    first = cache.read(0, VIEWS.detail)
    monkeypatch.setattr(cache.source, "read", None)
    assert torch.equal(cache.read(0, VIEWS.detail), first)


def test_small_images_and_whole_ones_are_read_as_they_are(images, tmp_path):
    cache = cached(images, tmp_path / "cache")
    assert torch.equal(cache.read(1, VIEWS.detail), torch.from_numpy(photo(30, 40)).movedim(-1, 0))
    assert torch.equal(cache.read(0), torch.from_numpy(photo(300, 400)).movedim(-1, 0))
    assert not files_in(tmp_path / "cache")


def test_another_image_or_other_settings_have_a_file_of_their_own(images, tmp_path):
    folder = tmp_path / "cache"
    first = cached(images, folder).read(0, VIEWS.detail)
    others = MultiCrop(global_crops_size=48, local_crops_size=16)
    assert cached(images, folder, others).read(0, others.detail).shape != first.shape
    cached(images, folder, settings="simplejpeg").read(0, VIEWS.detail)
    assert len(files_in(folder)) == 3
    Image.fromarray(photo(300, 400, shade=1)).save(images / "large.png")
    os.utime(images / "large.png", ns=(1, 1))
    changed = cached(images, folder).read(0, VIEWS.detail)
    assert not torch.equal(changed, first)
    assert len(files_in(folder)) == 4


@pytest.mark.parametrize("harm", [lambda raw: raw[:-1], lambda raw: raw[: len(raw) // 2], lambda raw: b"",
                                  lambda raw: raw[:300] + b"\0" + raw[301:]])  # fmt: skip
def test_a_damaged_file_is_made_again(images, tmp_path, harm):
    folder = tmp_path / "cache"
    first = cached(images, folder).read(0, VIEWS.detail)
    (file,) = folder.rglob("*.jpg")
    whole = file.read_bytes()
    file.write_bytes(harm(whole))
    assert torch.equal(cached(images, folder).read(0, VIEWS.detail), first)
    assert file.read_bytes() == whole


def test_what_cannot_be_written_is_said_once_and_changes_no_pixel(images, tmp_path, capsys):
    expected = cached(images, tmp_path / "cache").read(0, VIEWS.detail)
    (tmp_path / "file").write_text("no folder")
    cache = cached(images, tmp_path / "file")
    for _ in range(2):
        assert torch.equal(cache.read(0, VIEWS.detail), expected)
    assert capsys.readouterr().out.count("no more images are kept") == 1


def test_a_full_disk_is_said_once(images, tmp_path, monkeypatch, capsys):
    cache = cached(images, tmp_path / "cache")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "_write", full)
    for _ in range(2):
        cache.read(0, VIEWS.detail)
    assert capsys.readouterr().out.count("No space left on device") == 1
    assert not files_in(tmp_path / "cache")


def test_a_bad_image_is_refused_as_without_a_cache(images, tmp_path):
    (images / "large.png").write_bytes(b"no image")
    for _ in range(2):
        with pytest.raises(BadImage, match="not a JPEG"):
            cached(images, tmp_path / "cache").read(0, VIEWS.detail)
    cache = cached(images, tmp_path / "cache")
    (images / "large.png").unlink()
    with pytest.raises(BadImage, match="No such file"):
        cache.read(0, VIEWS.detail)
