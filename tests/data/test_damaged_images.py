"""Holes in the middle of files are detected if possible, and whole files of many encoders have none."""

import io

import numpy as np
import pytest
from PIL import Image, ImageFile

from conftest import scene
from gtsa.data.images import damage
from gtsa.data.scan import scan
from gtsa.data.sources.folder import Folder

Y, X = np.mgrid[:160, :160]
PHOTOS = [scene(seed, 192, 144) for seed in range(2)]
RNG = np.random.default_rng(0)
DRAWN = [  # areas of one colour, patterns and noise: what is stored in unusual bits
    np.full((160, 160), 255),
    np.zeros((160, 160)),
    np.full((600, 800), 128),
    X,
    255 * ((X // 8 + Y // 8) % 2),
    255 * ((X - 80) ** 2 + (Y - 80) ** 2 < 900),
    200 * ((X + Y) % 2),
    128 - 40 * ((X % 8 == 0) & (Y % 8 == 0)),
    RNG.integers(0, 256, (160, 160)),
]
ENCODERS = [{}, {"optimize": True}, {"progressive": True}, {"restart_marker_rows": 1}, {"restart_marker_blocks": 3}]
needs_warnings = pytest.mark.skipif(not damage.sees_warnings(), reason="simplejpeg is not installed")


@pytest.fixture(autouse=True)
def _room(monkeypatch):
    monkeypatch.setattr(ImageFile, "MAXBLOCK", 1 << 22)  # Pillow's own is too small for progressive noise


def encoded(image, form="JPEG", **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def noisy(image, amount=12):
    """With some noise, as photos have: blocks take more bits than two."""
    array = np.asarray(image).astype(int) + RNG.integers(-amount, amount + 1, np.asarray(image).shape)
    return Image.fromarray(array.clip(0, 255).astype(np.uint8))


def jpegs(image, qualities):
    for quality in qualities:
        for options in ENCODERS:
            for subsampling in (0, 2):
                yield encoded(image, quality=quality, subsampling=subsampling, **options)
        for mode in ("L", "CMYK"):
            yield encoded(image.convert(mode), quality=quality)


def reason_of(tmp_path, data, form="JPEG"):
    path = tmp_path / "a"
    path.write_bytes(data)
    with Image.open(path) as image:
        return damage.find_damage(str(path), form, *image.size)


def decodes(data):
    try:
        Image.open(io.BytesIO(data)).load()
    except (OSError, SyntaxError, ValueError):
        return False
    return True


def damaged(data, start, fill, count):
    """``count`` copies in which ``fill`` lies somewhere behind ``start``, as far as Pillow takes them."""
    for _ in range(count):
        position = int(RNG.integers(start, max(start + 1, len(data) - 2 - len(fill))))
        copy = data[:position] + fill + data[position + len(fill) :]
        if len(copy) == len(data) and copy != data and decodes(copy):
            yield copy


def test_no_false_alarm(tmp_path):
    drawn = [Image.fromarray(array.astype(np.uint8)).convert("RGB") for array in DRAWN]
    files = [data for image in [*PHOTOS, *map(noisy, PHOTOS), *drawn] for data in jpegs(image, (30, 75, 100))]
    assert len(files) > 400
    assert [reason for data in files if (reason := reason_of(tmp_path, data))] == []


@pytest.mark.parametrize(("size", "share"), [(16, 0.6), (64, 0.7), (512, 0.8), (4096, 0.85)])
def test_zeros_in_a_jpeg(tmp_path, size, share, record_property):
    """Without libjpeg's warnings three in four are detected, with them nearly all."""
    share = {16: 0.85, 64: 0.95, 512: 0.98, 4096: 0.98}[size] if damage.sees_warnings() else share
    detected = total = 0
    for image in map(noisy, PHOTOS):
        for data in jpegs(image.resize((320, 240)), (75, 95)):
            for copy in damaged(data, data.index(b"\xff\xda") + 14, bytes(size), 2):
                total += 1
                detected += reason_of(tmp_path, copy) is not None
    record_property("found", f"{detected} of {total}")
    assert total > 20 and detected >= share * total, (detected, total)


@needs_warnings
def test_random_bytes_in_a_jpeg(tmp_path):
    detected = total = 0
    for image in map(noisy, PHOTOS):
        for data in jpegs(image, (75, 95)):
            fill = bytes(RNG.integers(0, 255, 64).astype(np.uint8))
            for copy in damaged(data, data.index(b"\xff\xda") + 14, fill, 3):
                total += 1
                detected += reason_of(tmp_path, copy) is not None
    assert total > 60 and detected >= 0.75 * total, (detected, total)


@needs_warnings
def test_padding_before_the_end_is_no_damage(tmp_path):
    data = encoded(PHOTOS[0])
    assert reason_of(tmp_path, data[:-2] + bytes(40) + data[-2:]) is None
    assert reason_of(tmp_path, data[:-2] + b"\xff" * 40 + data[-2:]) is None
    assert "extraneous" in reason_of(tmp_path, data[:-2] + bytes(range(1, 60)) + data[-2:])


def test_what_follows_the_first_picture_does_not_count(tmp_path):
    data = encoded(PHOTOS[0])
    assert reason_of(tmp_path, data + bytes(5000)) is None
    assert reason_of(tmp_path, data + data[:900] + bytes(5000), "MPO") is None


def test_zeros_in_a_quantisation_table(tmp_path):
    data = encoded(PHOTOS[0])
    position = data.index(b"\xff\xdb") + 5
    assert (
        reason_of(tmp_path, data[: position + 20] + bytes(8) + data[position + 28 :])
        == "damaged: a quantisation table with zeros"
    )


def test_zeros_in_a_webp(tmp_path):
    detected = total = 0
    for image in map(noisy, PHOTOS):
        for quality in (30, 80, 100):
            data = encoded(image, "WEBP", quality=quality)
            for size in (64, 512):
                for copy in damaged(data, 60, bytes(size), 5):
                    total += 1
                    detected += reason_of(tmp_path, copy, "WEBP") is not None
    assert total > 30 and detected == total


def test_no_false_alarm_in_webp(tmp_path):
    drawn = [Image.fromarray(array.astype(np.uint8)).convert("RGB") for array in DRAWN]
    large = [Image.new("RGB", (1600, 1200), colour) for colour in ("white", "grey")]
    options = [{"quality": 30}, {"quality": 90, "method": 0}, {"quality": 90, "method": 6}, {"lossless": True}]
    for image in [*PHOTOS, *drawn, *large]:
        for option in options:
            assert reason_of(tmp_path, encoded(image, "WEBP", **option), "WEBP") is None


def test_zeros_beside_the_picture_of_a_webp_are_no_damage(tmp_path):
    """Cameras pad what they say about a picture; transparency may be stored as it is."""
    exif = Image.Exif()
    exif[0x927C] = bytes(4000)
    assert reason_of(tmp_path, encoded(PHOTOS[0], "WEBP", quality=80, exif=exif), "WEBP") is None
    clear = PHOTOS[0].convert("RGBA")
    clear.putalpha(0)
    assert reason_of(tmp_path, encoded(clear, "WEBP", quality=80), "WEBP") is None


def test_the_scan_names_a_jpeg_with_a_hole(tmp_path):
    for number in range(3):
        noisy(PHOTOS[0].resize((320, 240))).save(tmp_path / f"{number}.jpg", quality=90)
    data = bytearray((tmp_path / "1.jpg").read_bytes())
    data[3000:3600] = bytes(600)
    (tmp_path / "1.jpg").write_bytes(data)
    assert decodes(bytes(data))
    for _ in range(2):  # the result is remembered
        ((name, reason),) = scan(Folder(str(tmp_path)), decode=True).bad
        assert name == "1.jpg" and "zero bytes" in reason
