"""Files as they come: each is decoded rightly or refused with a reason that says what is wrong."""

import os
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps

from gtsa.data.images.decoding import decode, read_header
from gtsa.data.images.pixels import LARGEST, NEUTRAL, BadImage

EIGHT = range(1, 9)
LOSSLESS = {"a.png": {}, "a.bmp": {}, "a.tif": {}, "a.tiff": {"compression": "tiff_lzw"}, "a.webp": {"lossless": True}}


def photo(height=40, width=60):
    """Smooth uint8 [H, W, 3] that no rotation or mirror leaves as it is."""
    y, x = np.mgrid[:height, :width]
    return np.stack([255 * x / width, 255 * y / height, 255 * (x + y < width / 2)], -1).astype(np.uint8)


def deep(height=32, width=64, bands=3):
    """Random uint16 [H, W, bands] that holds 0 and 65535."""
    array = np.random.default_rng(0).integers(0, 65536, (height, width, bands)).astype(np.uint16)
    array[0, 0], array[0, 1] = 0, 65535
    return array


def ramp():
    return np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)


def saved(path, image, **options):
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(path, **options)
    return path


def written(path, data):
    path.write_bytes(data)
    return path


def tiff(path, array, **options):
    tifffile.imwrite(path, array, **options)
    return path


def png(width, height, depth, kind, rows):
    """A PNG from its fields and raw rows, each starting with its filter byte."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def deep_png(array):
    """uint16 [H, W, bands] as a 16-bit PNG."""
    height, width, bands = array.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    return png(width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[bands], rows)


def pixels(path, **options):
    """[H, W, 3] int; holds decode to its promise on the way."""
    tensor = decode(path, **options)
    assert tensor.dtype == torch.uint8
    assert tensor.ndim == 3
    assert tensor.shape[0] == 3
    return tensor.permute(1, 2, 0).numpy().astype(int)


def refused(path, *words, **options):
    """The reason, which must hold the words."""
    with pytest.raises(BadImage) as caught:
        decode(path, **options)
    reason = str(caught.value)
    assert all(word in reason for word in words), reason
    assert "\n" not in reason
    return reason


# Eight bits


@pytest.mark.parametrize("name", LOSSLESS)
def test_lossless_files_keep_every_value(tmp_path, name):
    path = saved(tmp_path / name, photo(), **LOSSLESS[name])
    assert np.array_equal(pixels(path), photo())
    assert read_header(path)[2:4] == (60, 40)


@pytest.mark.parametrize(
    ("name", "options"), [("a.jpg", {"quality": 95}), ("a.jpeg", {"progressive": True}), ("a.webp", {})]
)
def test_lossy_files_are_near(tmp_path, name, options):
    path = saved(tmp_path / name, photo(), **options)
    assert np.abs(pixels(path) - photo()).mean() < 8
    assert np.array_equal(pixels(path), np.asarray(Image.open(path).convert("RGB")))


@pytest.mark.parametrize("name", ["a.jpg", "a.tif", "A.BMP", "no suffix"])
def test_the_suffix_does_not_count(tmp_path, name):
    path = saved(tmp_path / name, photo(), format="PNG")
    assert np.array_equal(pixels(path), photo())
    assert read_header(path).format == "PNG"


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.bmp"])
@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_grey_black_and_white_and_palette(tmp_path, mode, name):
    image = Image.fromarray(photo()).convert(mode)
    path = saved(tmp_path / name, image)
    assert np.array_equal(pixels(path), np.asarray(image.convert("RGB")))


def test_palette_by_hand(tmp_path):
    image = Image.fromarray(np.arange(1024, dtype=np.uint8).reshape(32, 32) % 2, "P")
    image.putpalette([10, 20, 30, 200, 100, 50])
    actual = pixels(saved(tmp_path / "a.png", image))
    assert actual[0, :2].tolist() == [[10, 20, 30], [200, 100, 50]]


@pytest.mark.parametrize("name", ["a.jpg", "a.tif"])
def test_cmyk_by_hand(tmp_path, name):
    image = Image.new("CMYK", (32, 32), (255, 0, 0, 0))
    image.paste((0, 255, 0, 0), (16, 0, 32, 32))
    actual = pixels(saved(tmp_path / name, image))
    assert np.abs(actual[8, 4] - [0, 255, 255]).max() <= 3
    assert np.abs(actual[8, 28] - [255, 0, 255]).max() <= 3


def test_constant(tmp_path):
    for value in (0, 128, 255):
        path = saved(tmp_path / "a.png", np.full((20, 20, 3), value, dtype=np.uint8))
        assert (pixels(path) == value).all()


# Transparency


def mixed(colour, alpha):
    return [round(a * c + (1 - a) * n) for c, n, a in zip(colour, NEUTRAL, [alpha / 255] * 3, strict=True)]


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.webp"])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_pixels_show_grey(tmp_path, mode, name):
    image = Image.new("RGBA", (32, 32), (200, 200, 200, 255))
    image.paste((90, 90, 90, 0), (0, 0, 16, 16))
    image.paste((50, 50, 50, 128), (16, 0, 32, 16))
    options = {"lossless": True, "exact": True} if name == "a.webp" else {}
    actual = pixels(saved(tmp_path / name, image.convert(mode), **options))
    assert actual[20, 20].tolist() == [200] * 3
    assert actual[4, 4].tolist() == list(NEUTRAL)
    assert np.abs(actual[4, 20] - mixed([50] * 3, 128)).max() <= 1


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_a_transparent_colour_shows_grey(tmp_path, mode):
    image = Image.new(mode, (32, 32), {"P": 1, "L": 60, "RGB": (1, 2, 3)}[mode])
    if mode == "P":
        image.putpalette([0, 0, 0, 9, 9, 9, 250, 240, 230])
    image.paste({"P": 2, "L": 250, "RGB": (250, 240, 230)}[mode], (16, 0, 32, 32))
    path = saved(tmp_path / "a.png", image, transparency={"P": 1, "L": 60, "RGB": (1, 2, 3)}[mode])
    actual = pixels(path)
    assert actual[8, 4].tolist() == list(NEUTRAL)
    assert actual[8, 28].tolist() == ([250] * 3 if mode == "L" else [250, 240, 230])


# Sixteen bits and floats


@pytest.mark.parametrize("name", ["a.png", "pillow.png", "a.tif", "big endian.tif", "big.tif", "deflate.tif"])
def test_sixteen_bit_grey_keeps_its_levels(tmp_path, name):
    path = tmp_path / name
    if name == "a.png":
        written(path, deep_png(ramp()[..., None]))
    elif name == "pillow.png":
        saved(path, ramp())
    else:
        kind = {
            "big endian.tif": {"byteorder": ">"},
            "big.tif": {"bigtiff": True},
            "deflate.tif": {"compression": "zlib"},
        }
        tiff(path, ramp(), **kind.get(name, {}))
    actual = pixels(path)
    assert len(np.unique(actual)) >= 250
    assert np.abs(actual - (ramp() / 257)[..., None]).max() <= 0.5
    assert (actual.min(), actual.max()) == (0, 255)


@pytest.mark.parametrize("kind", ["chunky", "planar", "big endian", "big", "png"])
def test_sixteen_bit_colour_keeps_its_levels(tmp_path, kind):
    array, path = deep(), tmp_path / "a.tif"
    if kind == "png":
        written(path, deep_png(array))
    elif kind == "planar":
        tiff(path, np.moveaxis(array, -1, 0), photometric="rgb", planarconfig="separate")
    else:
        options = {"big endian": {"byteorder": ">"}, "big": {"bigtiff": True}}
        tiff(path, array, photometric="rgb", **options.get(kind, {}))
    actual = pixels(path)
    assert min(len(np.unique(actual[..., band])) for band in range(3)) >= 250
    assert np.abs(actual - array / 257).max() <= (1 if kind == "png" else 0.5)


def test_sixteen_bit_alpha_shows_grey(tmp_path):
    array = deep(bands=4)
    array[0, 2] = [65535, 0, 0, 0]
    array[0, 3] = [65535, 0, 0, 65535]
    for path in (
        tiff(tmp_path / "a.tif", array, photometric="rgb", extrasamples=["unassalpha"]),
        written(tmp_path / "a.png", deep_png(array)),
    ):
        actual = pixels(path)
        assert actual[0, 2].tolist() == list(NEUTRAL)
        assert actual[0, 3].tolist() == [255, 0, 0]


def test_declared_range_by_hand(tmp_path):
    array = np.full((16, 16), 3000, dtype=np.uint16)
    array[0, :5] = [0, 1000, 2000, 5000, 65535]
    for path in (tiff(tmp_path / "a.tif", array), saved(tmp_path / "a.png", array)):
        actual = pixels(path, range16=(1000, 5000))[..., 0]
        assert actual[0, :5].tolist() == [0, 0, 64, 255, 255]
        assert actual[1, 1] == 128


def test_declared_range_of_colours(tmp_path):
    array = deep() // 16
    path = tiff(tmp_path / "a.tif", array, photometric="rgb")
    assert np.abs(pixels(path, range16=(0, 4095)) - array * (255 / 4095)).max() <= 0.5
    for bands in (2, 3, 4):
        refused(written(tmp_path / "a.png", deep_png(deep(bands=bands))), "16-bit", "TIFF", range16=(0, 4095))


def test_declared_range_leaves_eight_bits(tmp_path):
    path = saved(tmp_path / "a.png", photo())
    assert np.array_equal(pixels(path, range16=(0, 4095)), photo())


def test_white_is_zero(tmp_path):
    path = tiff(tmp_path / "a.tif", ramp(), photometric="miniswhite")
    assert np.abs(pixels(path) - (255 - ramp() / 257)[..., None]).max() <= 0.5


def test_floats_lie_in_zero_to_one(tmp_path):
    array = np.linspace(0, 1, 1024, dtype=np.float32).reshape(32, 32)
    assert np.abs(pixels(tiff(tmp_path / "a.tif", array)) - 255 * array[..., None]).max() <= 0.5001
    refused(tiff(tmp_path / "a.tif", array * 300), "floating-point", "0 to 300", "0..1")
    refused(tiff(tmp_path / "a.tif", array - 0.5), "-0.5 to 0.5")
    for value in (np.nan, np.inf, -np.inf):
        bad = array.copy()
        bad[3, 3] = value
        refused(tiff(tmp_path / "a.tif", bad), "NaN or infinite")


@pytest.mark.parametrize("kind", ["int16", "int32", "uint32"])
def test_whole_numbers_of_sixteen_bits(tmp_path, kind):
    array = (ramp() // 2).astype(kind)
    assert np.abs(pixels(tiff(tmp_path / "a.tif", array)) - (ramp() // 2 / 257)[..., None]).max() <= 0.5
    array[5, 5] = 70000 if kind == "uint32" else -3
    refused(tiff(tmp_path / "a.tif", array), "integer values", "70000" if kind == "uint32" else "-3")


@pytest.mark.parametrize("kind", ["uint8", "uint16"])
@pytest.mark.parametrize(
    "options", [{}, {"byteorder": ">"}, {"bigtiff": True}], ids=["little", "big endian", "BigTIFF"]
)
def test_five_bands_are_counted(tmp_path, kind, options):
    array = deep(bands=5).astype(kind)
    path = tiff(tmp_path / "a.tif", array, photometric="minisblack", planarconfig="contig", **options)
    refused(path, "5 bands", "1, 3 or 4")
    with pytest.raises(BadImage, match="5 bands"):
        read_header(path)


@pytest.mark.parametrize(
    ("kind", "bands"), [("float32", 3), ("float64", 1), ("float16", 1), ("uint32", 3), ("complex64", 1)]
)
def test_other_tiffs_are_named(tmp_path, kind, bands):
    array = np.squeeze(np.zeros((32, 32, bands), dtype=kind))
    refused(tiff(tmp_path / "a.tif", array, photometric="rgb" if bands == 3 else "minisblack"), kind, "convert")


def test_volumes_are_named(tmp_path):
    for shape in ((16, 32, 32), (16, 32, 32, 3)):
        path = tiff(tmp_path / "a.tif", np.zeros(shape, np.uint16), volumetric=True, tile=(16, 32, 32))
        refused(path, "volume of 16 slices")


def test_compressed_deep_tiff_is_read_or_says_what_to_install(tmp_path):
    path = saved(tmp_path / "a.tif", ramp(), compression="tiff_lzw")
    try:
        import imagecodecs  # noqa: F401
    except ImportError:
        refused(path, "gtsa[tiff]")
    else:
        assert len(np.unique(pixels(path))) >= 250


# Orientation, frames, profiles


UNDO = {  # how upright pixels lie in a file with this EXIF orientation (TIFF 6.0, tag 274)
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a[::-1].swapaxes(0, 1)[::-1, ::-1],
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a[:, ::-1].swapaxes(0, 1)[::-1, ::-1],
}


def tagged(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.tif"])
@pytest.mark.parametrize("orientation", EIGHT)
def test_all_eight_orientations_come_out_upright(tmp_path, orientation, name):
    stored = np.ascontiguousarray(UNDO[orientation](photo()))
    path = saved(tmp_path / name, stored, exif=tagged(orientation), **LOSSLESS[name])
    with Image.open(path) as image:
        assert np.array_equal(np.asarray(ImageOps.exif_transpose(image).convert("RGB")), photo())
    assert np.array_equal(pixels(path), photo())


@pytest.mark.parametrize("orientation", EIGHT)
def test_orientation_of_jpegs_drafted_or_not(tmp_path, orientation):
    large = np.asarray(Image.fromarray(photo()).resize((480, 320)))
    path = saved(tmp_path / "a.jpg", np.ascontiguousarray(UNDO[orientation](large)), exif=tagged(orientation))
    with Image.open(path) as image:
        assert np.array_equal(pixels(path), np.asarray(ImageOps.exif_transpose(image)))
    drafted = pixels(path, detail=lambda w, h: 0.25)
    assert drafted.shape == (80, 120, 3)
    small = np.asarray(Image.fromarray(photo()).resize((120, 80))).astype(int)
    assert np.abs(drafted - small).mean() < 6


@pytest.mark.parametrize("orientation", EIGHT)
def test_orientation_of_sixteen_bit_files(tmp_path, orientation):
    stored = np.ascontiguousarray(UNDO[orientation](photo().astype(np.uint16) * 257))
    path = tiff(tmp_path / "a.tif", stored, photometric="rgb", extratags=[(274, "H", 1, orientation, True)])
    assert np.array_equal(pixels(path), photo())
    grey = np.ascontiguousarray(stored[..., 0])
    saved(tmp_path / "a.png", grey, exif=tagged(orientation))
    assert np.array_equal(pixels(tmp_path / "a.png")[..., 0], photo()[..., 0])


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_orientations_that_are_none_leave_the_image(tmp_path, orientation):
    assert np.array_equal(pixels(saved(tmp_path / "a.png", photo(), exif=tagged(orientation))), photo())


def test_damaged_exif_is_no_reason_to_refuse(tmp_path):
    path = saved(tmp_path / "a.jpg", photo(), exif=b"Exif\0\0" + b"\x93" * 40)
    assert pixels(path).shape == (40, 60, 3)


@pytest.mark.parametrize("name", ["a.webp", "a.tif", "a.png", "deep.tif"])
def test_of_several_frames_the_first_is_taken(tmp_path, name):
    path = tmp_path / name
    if name == "deep.tif":
        tiff(path, np.stack([photo().astype(np.uint16) * 257, deep(40, 60)]), photometric="rgb")
    else:
        others = [Image.fromarray(255 - photo()), Image.fromarray(photo()[::-1].copy())]
        saved(path, photo(), save_all=True, append_images=others, **LOSSLESS.get(name, {}))
    assert np.array_equal(pixels(path), photo())
    assert read_header(path).frames == (2 if name == "deep.tif" else 3)


def test_camera_files_of_two_pictures(tmp_path):
    path = tmp_path / "a.jpg"
    saved(path, photo(), format="MPO", save_all=True, append_images=[Image.fromarray(255 - photo())])
    assert np.abs(pixels(path) - photo()).mean() < 8
    assert read_header(path).frames == 2


@pytest.mark.parametrize("profile", [ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes(), b"nonsense"])
@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.webp"])
def test_colour_profiles_are_ignored(tmp_path, name, profile):
    assert np.array_equal(pixels(saved(tmp_path / name, photo(), icc_profile=profile, **LOSSLESS[name])), photo())


# Sizes


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (60000, 1), (1, 60000), (15, 400), (400, 15)])
def test_thinner_than_a_patch_is_refused(tmp_path, size):
    path = saved(tmp_path / "a.png", Image.new("RGB", size))
    refused(path, f"{size[0]} x {size[1]} px", "at least 16 px")
    with pytest.raises(BadImage, match="short side"):
        read_header(path)


@pytest.mark.parametrize("size", [(16, 16), (16, 4000), (20000, 17)])
def test_thin_and_long_is_read(tmp_path, size):
    path = saved(tmp_path / "a.png", Image.new("RGB", size, (1, 2, 3)))
    assert pixels(path).shape == (size[1], size[0], 3)
    assert read_header(path) == ("PNG", "RGB", *size, 1, 8)


@pytest.mark.parametrize("side", [12000, 60000, 2**31 - 1])
def test_bombs_are_refused_from_their_header(tmp_path, side):
    """The pixels are missing, so that anything decoded would be called damaged."""
    path = written(tmp_path / "a.png", png(side, side, 8, 2, b""))
    refused(path, f"more than {LARGEST:,} pixels")
    with pytest.raises(BadImage, match="pixels"):
        read_header(path)


def test_bombs_of_other_formats(tmp_path):
    bmp = b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, 30000, 30000, 1, 24, *[0] * 6)
    refused(written(tmp_path / "a.bmp", bmp), "more than")
    tags = [(256, 30000), (257, 30000), (258, 16), (259, 1), (262, 1), (273, 8), (277, 1), (278, 30000), (279, 9)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    refused(
        written(tmp_path / "a.tif", struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4)), "more than"
    )


# Files that are no images, or not whole


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.bmp", "a.tif", "deep.tif"])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_truncated_files_are_refused(tmp_path, name, part):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    path = tmp_path / name
    if name == "deep.tif":
        tiff(path, deep(64, 64), photometric="rgb")
    else:
        saved(path, noise)
    whole = path.read_bytes()
    refused(written(path, whole[: int(len(whole) * part)]), "damaged")


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "empty"),
        (bytes(5000), "zero bytes"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n", "git lfs pull"),
        (b"\n  <!DOCTYPE html><html><body>404</body></html>", "HTML"),
        (b"<html>Please log in", "HTML"),
        (b"just some text", "not a JPEG"),
        (b"\xff\xd8", "damaged"),
        (b"\x89PNG\r\n\x1a\n", "damaged"),
        (b"II*\0", "damaged"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n", "not a JPEG"),
        (b"P6 20 20 255\n" + bytes(1200), "not a JPEG"),
    ],
)
def test_files_that_are_not_images_are_reported_by_type(tmp_path, content, word):
    path = written(tmp_path / "a.jpg", content)
    refused(path, word)
    with pytest.raises(BadImage, match=word):
        read_header(path)


def test_formats_beyond_the_list_are_refused(tmp_path):
    for kind in ("GIF", "ICO", "PDF", "JPEG2000", "TGA"):
        refused(saved(tmp_path / "a.png", photo(), format=kind), "not a JPEG, PNG, WebP, TIFF or BMP")


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda p: os.mkfifo(p), "not a regular file"),  # would hang, were it opened
        (lambda p: p.mkdir(), "not a regular file"),
        (lambda p: p.symlink_to("/dev/zero"), "not a regular file"),
        (lambda p: None, "No such file"),
        (lambda p: p.symlink_to("nothing.jpg"), "No such file"),
        (lambda p: p.symlink_to(p), "symbolic link"),
    ],
    ids=["FIFO", "folder", "device", "missing", "dangling", "loop"],
)
def test_entries_that_are_not_files_are_reported(tmp_path, make, word):
    make(tmp_path / "a.jpg")
    refused(tmp_path / "a.jpg", word)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_says_so(tmp_path):
    path = saved(tmp_path / "a.png", photo())
    path.chmod(0)
    refused(path, "Permission denied")


def test_a_file_that_cannot_be_opened_says_so(tmp_path, monkeypatch):
    path = saved(tmp_path / "a.png", photo())

    def denied(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", denied)
    refused(path, "Permission denied")


def test_paths_may_be_text_odd_and_impossible(tmp_path):
    for name in ("ä\n'\"🌲.png", os.fsdecode(b"\xff\xfe.png")):
        saved(tmp_path / name, photo())
        assert np.array_equal(pixels(str(tmp_path / name)), photo())
    refused("a\0b.png", "null byte")
    refused(str(tmp_path / ("x" * 300)), "too long")


# Drafts: large JPEGs decoded small


@settings(deadline=None, max_examples=40)
@given(st.integers(16, 400), st.integers(16, 400), st.floats(0.01, 1))
def test_drafts_are_never_smaller_than_requested(tmp_path_factory, width, height, scale):
    path = saved(tmp_path_factory.getbasetemp() / "draft.jpg", Image.new("RGB", (width, height), (9, 9, 200)))
    seen = []
    actual = pixels(path, detail=lambda w, h: seen.append((w, h)) or scale)
    assert seen == [(width, height)]
    assert actual.shape[0] >= scale * height
    assert actual.shape[1] >= scale * width
    assert actual.shape[:2] in [tuple(-(-side // part) for side in (height, width)) for part in (1, 2, 4, 8)]


def test_drafts_are_as_small_as_they_may_be(tmp_path):
    path = saved(tmp_path / "a.jpg", Image.new("RGB", (800, 400)))
    sides = {1: 800, 0.51: 800, 0.5: 400, 0.26: 400, 0.25: 200, 0.125: 100, 0.01: 100}
    assert [pixels(path, detail=lambda w, h, s=s: s).shape[1] for s in sides] == list(sides.values())


def test_other_formats_have_no_drafts(tmp_path):
    for name in LOSSLESS:
        path = saved(tmp_path / name, photo(), **LOSSLESS[name])
        assert np.array_equal(pixels(path, detail=lambda w, h: 0.1), photo())


# Anything at all


def whole_files(folder):
    array = photo(24, 32)
    kinds = {
        "JPEG": (array, {}),
        "PNG": (array, {}),
        "WEBP": (array, {}),
        "TIFF": (array, {}),
        "BMP": (array, {}),
        "MPO": (array, {"save_all": True, "append_images": [Image.fromarray(array)]}),
    }
    files = [saved(folder / kind, a, format=kind, **o).read_bytes() for kind, (a, o) in kinds.items()]
    files += [saved(folder / kind, array, format=kind, exif=tagged(6)).read_bytes() for kind in ("JPEG", "PNG", "WEBP")]
    files.append(saved(folder / "a", array, format="TIFF", compression="tiff_lzw").read_bytes())
    files.append(saved(folder / "a", Image.fromarray(array).convert("P"), format="PNG", transparency=3).read_bytes())
    files.append(
        saved(
            folder / "a", array, format="WEBP", save_all=True, append_images=[Image.fromarray(255 - array)]
        ).read_bytes()
    )
    files.append(tiff(folder / "a", deep(24, 32), photometric="rgb").read_bytes())
    files.append(tiff(folder / "a", deep(24, 32, 4), photometric="rgb", compression="zlib").read_bytes())
    files.append(tiff(folder / "a", np.stack([ramp()[:24, :32]] * 2)).read_bytes())
    files.append(
        tiff(
            folder / "a", np.zeros((24, 32, 5), np.uint8), photometric="minisblack", planarconfig="contig"
        ).read_bytes()
    )
    return files


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return whole_files(tmp_path_factory.mktemp("whole"))


damage = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4)


def only_bad_image(path):
    """Decodes, or raises BadImage with a reason: anything else fails the test."""
    for use in (read_header, pixels, lambda p: pixels(p, detail=lambda w, h: 0.3, range16=(0, 4095))):
        try:
            use(path)
        except BadImage as reason:
            assert str(reason)


@settings(deadline=None, max_examples=400)
@given(st.integers(0, 15), damage, st.booleans())
def test_flipped_bytes_raise_bad_image_or_nothing(files, tmp_path_factory, which, where, early):
    data = bytearray(files[which])
    reach = min(len(data), 200) if early else len(data)  # headers are where most can go wrong
    for position, value in where:
        data[int(position * reach)] = value
    only_bad_image(written(tmp_path_factory.getbasetemp() / "fuzzed", bytes(data)))


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 15), st.floats(0, 1), st.binary(max_size=20))
def test_cut_and_continued_files_raise_bad_image_or_nothing(files, tmp_path_factory, which, part, more):
    data = files[which]
    only_bad_image(written(tmp_path_factory.getbasetemp() / "fuzzed", data[: int(part * len(data))] + more))


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"II*\0\x08\0\0\0", b"MM\0+", b"BM", b"RIFF"]),
    st.binary(),
)
def test_noise_raises_bad_image(tmp_path_factory, start, noise):
    refused(written(tmp_path_factory.getbasetemp() / "noise", start + noise))


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
@pytest.mark.parametrize(("bands", "photometric"), [(2, "minisblack"), (4, "rgb")])
def test_a_band_that_is_neither_colour_nor_alpha_is_not_dropped_in_silence(tmp_path, kind, bands, photometric):
    """Near infrared beside red, green and blue, as aerial cameras write it."""
    array = np.random.default_rng(0).integers(0, 255, (32, 40, bands)).astype(kind)
    path = tiff(tmp_path / "a.tif", array, photometric=photometric, extrasamples=["unspecified"])
    refused(path, f"{bands} bands")
    with pytest.raises(BadImage, match=f"{bands} bands"):
        read_header(path)
    for alpha in ("unassalpha", "assocalpha") if bands == 4 else ():
        assert decode(tiff(tmp_path / "b.tif", array, photometric=photometric, extrasamples=[alpha])).shape == (
            3,
            32,
            40,
        )


# What libraries say


def test_libraries_print_nothing(tmp_path, capfd):
    """LZW data of libtiff, tags of Pillow, headers of tifffile: each prints by itself, without the file's name."""
    rng = np.random.default_rng(0)
    whole = [saved(tmp_path / "a.tif", Image.fromarray(deep().astype(np.uint8)), compression="tiff_lzw").read_bytes()]
    whole.append(tiff(tmp_path / "b.tif", deep(bands=1)[..., 0]).read_bytes())
    whole.append(whole[0])
    reasons = set()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for data in whole:
            for _ in range(40):
                position = int(rng.integers(4, min(len(data) - 4, 400)))
                path = written(tmp_path / "c.tif", data[:position] + rng.bytes(4) + data[position + 4 :])
                for read in (read_header, decode):
                    try:
                        read(path)
                    except BadImage as reason:
                        reasons.add(str(reason))
    assert len(reasons) > 2
    assert not caught
    assert capfd.readouterr() == ("", "")


def test_warnings_of_others_are_as_they_were(tmp_path):
    path = saved(tmp_path / "a.png", photo())
    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(decode, [path] * 50))
    assert warnings.filters == before


def test_large_images_are_converted_by_parts(tmp_path, monkeypatch):
    for mode in ("RGB", "RGBA", "P", "CMYK", "L"):
        path = saved(tmp_path / ("a.tif" if mode == "CMYK" else "a.png"), Image.fromarray(photo()).convert(mode))
        whole = pixels(path)
        monkeypatch.setattr("gtsa.data.images.pixels.BAND", 7 * 60)
        assert np.array_equal(pixels(path), whole)
        monkeypatch.undo()


# simplejpeg, where it is chosen


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.25, 0.2])
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_simplejpeg_gives_the_image_of_pillow_to_a_few_grey_levels(tmp_path, scale, mode, orientation):
    path, exif = tmp_path / "a.jpg", Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(photo(201, 303)).convert(mode).save(path, quality=95, exif=exif)
    pillow, other = (decode(path, lambda w, h: scale, decoder=name) for name in ("pillow", "simplejpeg"))
    assert pillow.shape == other.shape and pillow.stride() == other.stride()
    assert (pillow.int() - other.int()).abs().float().mean() < 2


def test_simplejpeg_leaves_to_pillow_what_it_cannot_read(tmp_path):
    Image.fromarray(photo()).save(tmp_path / "a.png")
    Image.fromarray(photo()).convert("CMYK").save(tmp_path / "cmyk.jpg")
    for path in tmp_path.iterdir():
        assert torch.equal(decode(path, decoder="simplejpeg"), decode(path))


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("part", [0.3, 0.7, 0.95])
def test_simplejpeg_refuses_cut_jpegs_as_pillow_does(tmp_path, progressive, part):
    path = tmp_path / "a.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (90, 120, 3)).astype(np.uint8)
    Image.fromarray(noise).save(path, progressive=progressive)
    raw = path.read_bytes()
    path.write_bytes(raw[: int(part * len(raw))])
    for decoder in ("pillow", "simplejpeg"):
        with pytest.raises(BadImage, match="damaged: image file is truncated"):
            decode(path, decoder=decoder)
