"""Masks: every way to write numbers in a PNG is read, and files that are no such mask are reported."""

import json
import os
import pickle
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from test_labels import COCO_SMALL, moved, put, refused, write

from gtsa.core.errors import UserError
from gtsa.data.images.decoding import decode
from gtsa.data.labels import IGNORE, open_labelled
from gtsa.data.labels._files import read_sizes

WIDTH, HEIGHT = 20, 18
IDS = np.random.default_rng(0).integers(0, 4, (HEIGHT, WIDTH), dtype=np.uint8)


def png(path, ids, depth=8, colours=0):
    """A PNG written by hand, so that what is in the file is known: grey (0) or palette (3) of 1 to 16 bits."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width = ids.shape
    if depth == 16:
        rows = [row.astype(">u2").tobytes() for row in ids]
    else:
        bits = [np.unpackbits(row.astype(np.uint8)[:, None], axis=1)[:, 8 - depth :].ravel() for row in ids]
        rows = [np.packbits(row).tobytes() for row in bits]
    palette = np.random.default_rng(1).integers(0, 256, 3 * 2 ** min(depth, 8), dtype=np.uint8).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, 0))
        + (chunk(b"PLTE", palette) if colours == 3 else b"")
        + chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
        + chunk(b"IEND", b"")
    )
    return path


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


@pytest.fixture
def root(tmp_path):
    """Two images with masks of classes 0 to 3."""
    put(tmp_path / "images", "a.jpg", "sub/b.jpg", size=(WIDTH, HEIGHT))
    png(tmp_path / "masks" / "a.png", IDS)
    png(tmp_path / "masks" / "sub" / "b.png", IDS[::-1])
    return tmp_path


def opened(root, **options):
    return open_labelled(str(root / "images"), str(root / "masks"), "masks", **options)


def fault(root, **options):
    return refused(root / "images", root / "masks", "masks", **options)


# What is read


def test_masks(root):
    data = opened(root)
    assert data.kind == "masks" and data.classes == ("class 0", "class 1", "class 2", "class 3")
    assert [data.name(i) for i in range(2)] == ["a.jpg", "sub/b.jpg"]
    assert data.target(0).dtype == torch.int64 and data.target(0).shape == data.read(0).shape[1:]
    assert np.array_equal(data.target(0), IDS) and np.array_equal(data.target(1), IDS[::-1])


@pytest.mark.parametrize(
    ("depth", "colours", "top"),
    [(1, 0, 1), (2, 0, 3), (4, 0, 15), (8, 0, 255), (16, 0, 65535), (1, 3, 1), (2, 3, 3), (4, 3, 15), (8, 3, 255)],
)
def test_every_depth_of_grey_and_palette(root, depth, colours, top):
    ids = np.random.default_rng(2).integers(0, top + 1, (HEIGHT, WIDTH))
    ids[0, :2] = 0, top
    png(root / "masks" / "a.png", ids, depth, colours)
    names = write(root / "names.txt", "\n".join(f"c{i}" for i in range(max(4, top + 1))))
    assert np.array_equal(opened(root, classes=str(names)).target(0), ids)


def test_a_palette_of_pillow(root):
    image = Image.fromarray(IDS).convert("P")
    image.putpalette([7, 7, 7] * 256)
    image.save(root / "masks" / "a.png")
    assert np.array_equal(opened(root).target(0), IDS)


def test_equal_channels_are_numbers(root):
    save(root / "masks" / "a.png", np.stack([IDS] * 3, -1))
    assert np.array_equal(opened(root).target(0), IDS)


def test_images_without_masks_are_left_out_and_counted(root, capsys):
    put(root / "images", "c.jpg", "sub/a.jpg", size=(WIDTH, HEIGHT))
    data = opened(root)
    assert [data.name(i) for i in range(len(data))] == ["a.jpg", "sub/b.jpg"]
    assert "2 of 4 images have no mask and are left out" in capsys.readouterr().out


def test_a_list_of_images(root):
    listing = write(root / "images" / "list.txt", "sub/b.jpg\n")
    (root / "masks" / "a.png").unlink()
    data = open_labelled(str(listing), str(root / "masks"), "masks")
    assert [data.name(0)] == ["sub/b.jpg"] and np.array_equal(data.target(0), IDS[::-1]) and data.read(0).shape[0] == 3


def test_ignore(root):
    ids = IDS.copy()
    ids[3] = 255
    png(root / "masks" / "a.png", ids)
    data = opened(root, ignore=255)
    assert data.classes[-1] == "class 3"
    assert np.array_equal(data.target(0), np.where(ids == 255, IGNORE, ids.astype(int)))
    png(root / "masks" / "a.png", IDS)
    assert np.array_equal(opened(root, ignore=1).target(1), np.choose(IDS[::-1], [0, IGNORE, 1, 2]))


@pytest.mark.parametrize("value", [255, 42])
def test_a_value_far_above_all_others_is_reported_with_its_file(root, value):
    png(root / "masks" / "a.png", np.where(IDS == 3, value, IDS))
    with pytest.raises(UserError, match=f"value {value} far above all others") as caught:
        opened(root)
    assert f"\n  a.png: no other is above 3: give --ignore {value}" in str(caught.value)
    assert opened(root, ignore=value).classes[-1] == "class 3"


def test_the_same_fault_of_many_masks_is_one_line(root):
    put(root / "images", *(f"c{n}.jpg" for n in range(18)), size=(WIDTH, HEIGHT))
    for name in ("a", "sub/b", *(f"c{n}" for n in range(18))):
        png(root / "masks" / f"{name}.png", np.where(IDS == 3, 255, IDS))
    message = fault(root)
    assert "20 x value 255 far above all others" in message
    (line,) = message.partition("in detail:")[2].strip().splitlines()
    assert line.startswith("a.png, c0.png and 18 more: no other is above 2: give --ignore 255")


def test_reduce_zero_label(root):
    """ADE20K: 0 counts for nothing, the first name belongs to 1."""
    data = opened(root, reduce_zero_label=True)
    assert data.classes == ("class 1", "class 2", "class 3")
    assert np.array_equal(data.target(0), IDS.astype(int) - 1)
    names = write(root / "names.txt", "wall\nsky\ntree\nroad")
    data = opened(root, reduce_zero_label=True, classes=str(names), ignore=3)
    assert data.classes == ("wall", "sky", "road")
    assert np.array_equal(data.target(0), np.choose(IDS, [IGNORE, 0, 1, IGNORE]))


@pytest.mark.parametrize("location", ["masks/classes.json", "classes.json"])
@pytest.mark.parametrize(
    "content",
    [
        ["w", "x", "y", "z"],
        {"classes": ["w", "x", "y", "z"]},
        {"classes": [{"id": 3, "name": "z"}, {"id": 0, "name": "w"}, {"id": 2, "name": "y"}, {"id": 1, "name": "x"}]},
    ],
)
def test_names_beside_the_masks(root, location, content):
    write(root / location, content)
    data = opened(root)
    assert data.classes == ("w", "x", "y", "z") and np.array_equal(data.target(0), IDS)
    names = write(root / "names.txt", "a\nb\nc\nd\ne")
    assert opened(root, classes=str(names)).classes == ("a", "b", "c", "d", "e")  # what the user says comes first


def test_ids_with_gaps_and_a_value_to_ignore(root):
    png(root / "masks" / "a.png", np.array([5, 40, 255, 1000])[IDS], 16)
    png(root / "masks" / "sub" / "b.png", np.array([5, 40, 255, 40])[IDS])
    write(root / "classes.json", {"ignore_index": 255, "classes": [{"id": i, "name": f"c{i}"} for i in (1000, 5, 40)]})
    data = opened(root)
    assert data.classes == ("c5", "c40", "c1000")
    assert np.array_equal(data.target(0), np.choose(IDS, [0, 1, IGNORE, 2]))
    assert "unknown class id" in fault(root, ignore=5)


def test_shares_of_pixels_are_reported(root, capsys):
    ids = np.zeros((HEIGHT, WIDTH), np.uint8)
    ids[:9], ids[9:12] = 1, 255
    for name in ("a.png", "sub/b.png"):
        png(root / "masks" / name, ids)
    opened(root, ignore=255)
    assert "pixels: class 1 50 %, class 0 33 %; 17 % ignored" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["Void", "unlabeled", "unlabelled", "ignore"])
def test_a_very_rare_class_is_reported(root, capsys, name):
    names = str(write(root / "names.txt", f"road\nsky\ntree\n{name}"))
    opened(root, classes=names)
    assert f"{name} (value 3) counts as a class: give --ignore 3 if it stands for no class" in capsys.readouterr().out
    opened(root, classes=names, ignore=3)
    assert "give --ignore" not in capsys.readouterr().out


def test_a_class_that_is_black_in_the_palette_is_reported(root, capsys):
    for path in (root / "masks" / "a.png", root / "masks" / "sub" / "b.png"):
        image = Image.fromarray(IDS).convert("P")
        image.putpalette([128, 64, 128, 0, 0, 9, 9, 9, 0, 0, 0, 0] + [0] * 753)
        image.save(path)
    opened(root)
    out = capsys.readouterr().out
    assert "class 3 (value 3) is black in the masks' palette: give --ignore 3" in out and out.count("--ignore") == 1


# Faults


def colours(root):
    save(root / "masks" / "a.png", np.stack([IDS, IDS, 3 - IDS], -1))


def deep_colours(root):
    png(root / "masks" / "a.png", IDS)
    data = bytearray((root / "masks" / "a.png").read_bytes())
    rows = b"".join(b"\0" + np.repeat(row, 3).astype(">u2").tobytes() for row in IDS)
    body = zlib.compress(rows)
    head = b"IHDR" + struct.pack(">IIBBBBB", WIDTH, HEIGHT, 16, 2, 0, 0, 0)
    idat = b"IDAT" + body
    parts = [bytes(data[:8])]
    for chunk in (head, idat, b"IEND"):
        parts.append(struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)))
    (root / "masks" / "a.png").write_bytes(b"".join(parts))


def cut(root):
    path = root / "masks" / "a.png"
    path.write_bytes(path.read_bytes()[:-60])


FAULTS = [
    (
        lambda r: png(r / "masks" / "a.png", IDS[:, :-1]),
        "mask of another size",
        "a.png: 19 x 18 px, but the upright image has 20 x 18",
    ),
    (lambda r: png(r / "masks" / "a.png", IDS.T), "mask of another size", "a.png: 18 x 20 px"),
    (lambda r: png(r / "masks" / "a.png", IDS + 1), "unknown class id", "a.png: 4: not among the 4 classes"),
    (lambda r: png(r / "masks" / "a.png", np.where(IDS > 1, 255, IDS)), "unknown class id", "a.png: 255: not among"),
    (lambda r: png(r / "masks" / "a.png", IDS.astype(int) * 300, 16), "unknown class id", "a.png: 300, 600, 900: "),
    (lambda r: png(r / "masks" / "more.png", IDS), "mask without an image", "more.png"),
    (lambda r: png(r / "masks" / "sub" / "a.png", IDS), "mask without an image", "sub/a.png"),
    (lambda r: png(r / "masks" / "a.PNG", IDS), "several masks of one image", "a.png: a.PNG is one already"),
    (lambda r: put(r / "images", "a.png", size=(WIDTH, HEIGHT)), "mask of several images", "a.png: a.jpg and a.png"),
    (lambda r: (r / "masks" / "a.png").rename(r / "masks" / "a.jpg"), None, None),
    (lambda r: save(r / "masks" / "a.png", IDS, format="JPEG"), "mask that cannot be read", "a.png: a JPEG image"),
    (lambda r: save(r / "masks" / "a.png", IDS, format="BMP"), "mask that cannot be read", "a.png: a BMP image"),
    (colours, "mask that cannot be read", "a.png: colours or transparency, not numbers of classes: convert it"),
    (deep_colours, "mask that cannot be read", "a.png: colours or transparency, not numbers of classes: convert it"),
    (
        lambda r: save(r / "masks" / "a.png", np.stack([IDS] * 4, -1)),
        "mask that cannot be read",
        "a.png: colours or transp",
    ),
    (
        lambda r: save(r / "masks" / "a.png", np.stack([IDS] * 2, -1)),
        "mask that cannot be read",
        "a.png: colours or transp",
    ),
    (cut, "mask that cannot be read", "a.png: damaged"),
    (lambda r: (r / "masks" / "a.png").write_bytes(b""), "mask that cannot be read", "a.png: empty file"),
    (
        lambda r: write(r / "masks" / "a.png", "version https://git-lfs"),
        "mask that cannot be read",
        "a.png: a Git LFS pointer",
    ),
    (
        lambda r: (r / "images" / "a.jpg").write_bytes(b"\xff\xd8\xff"),
        "image that cannot be read",
        "a.png: its image: ",
    ),
]


@pytest.mark.parametrize(("plant", "kind", "messages"), FAULTS)
def test_faults(root, plant, kind, messages):
    names = str(write(root / "names.txt", "w\nx\ny\nz"))
    opened(root, classes=names)
    plant(root)
    if kind is None:  # the suffix alone is no fault: what counts is what is in the file
        assert np.array_equal(opened(root, classes=names).target(0), IDS)
        return
    message = fault(root, classes=names)
    assert f"1 x {kind}\n" in message and message.count(" x " + kind) == 1 and f"\n  {messages}" in message
    assert str(root / "masks") in message


def test_a_jpeg_mask_by_its_suffix(root):
    (root / "masks" / "a.png").unlink()
    save(root / "masks" / "a.jpg", IDS, quality=100)
    assert "\n  a.jpg: a JPEG image, which does not keep numbers exactly: save masks as PNG" in fault(root)


def test_all_faults_at_once(root):
    for number in range(30):
        png(root / "masks" / f"lost {number}.png", IDS)
    png(root / "masks" / "a.png", IDS[1:] + 9)
    save(root / "masks" / "sub" / "b.png", IDS, format="JPEG")
    message = fault(root, classes=str(write(root / "names.txt", "w\nx\ny\nz")))
    for line in ("30 x mask without", "1 x mask of another", "1 x unknown class id", "1 x mask that cannot be read"):
        assert line in message
    assert "\n  a.png: 9, 10, 11, 12: " in message and "\n  sub/b.png: a JPEG" in message and "and 13 more" in message


def test_no_masks(root):
    for path in ("a.png", "sub/b.png"):
        (root / "masks" / path).unlink()
    assert "1 x no classes" in fault(root)
    png(root / "masks" / "a.png", IDS * 0)
    assert "1 x no classes" in fault(root, reduce_zero_label=True)


@pytest.mark.parametrize(
    ("content", "messages"),
    [
        ("[", "not JSON"),
        ("3", "wrong type"),
        ({"names": ["a"]}, "no classes"),
        (["a", "b", "a", "c"], "class named twice"),
        (["a", "b", "", "c"], "class without a name"),
        (["a", "b", 3, "c"], "class 2: a name is needed"),
        ([{"id": 0, "name": "a"}, {"id": 0, "name": "b"}], "duplicate id"),
        ([{"id": -1, "name": "a"}], "wrong type"),
        ([{"id": 2**40, "name": "a"}], "wrong type"),
        ([{"name": "a"}], "wrong type"),
        ({"classes": ["a", "b", "c", "d"], "ignore_index": "255"}, "ignore_index: a whole number"),
        ({"classes": ["a", "b", "c", "d"], "report_classes": ["a", "x"]}, "report_classes: a list of names is needed"),
        ({"classes": ["a", "b", "c", "d"], "report_classes": "a"}, "report_classes: a list of names is needed"),
        (
            {"classes": ["a", "b", "c", "d"], "ignore": 3},
            "\n  ignore: it is not read; name the value to ignore with ignore_index",
        ),
    ],
)
def test_faults_of_the_names(root, content, messages):
    file = write(root / "classes.json", content)
    message = fault(root)
    assert messages in message and str(file) in message


def test_other_keys_beside_the_names_are_reported(root, capsys):
    file = write(root / "classes.json", {"classes": ["a", "b", "c", "d"], "palette": [], "licence": "none"})
    assert opened(root).classes == ("a", "b", "c", "d")
    line = f"{file}: keys that are not read: palette, licence; known keys are classes, ignore_index and report_classes"
    assert line in capsys.readouterr().out
    write(file, {"classes": ["a", "b", "c", "d"], "ignore_index": 3})
    opened(root)
    assert "not read" not in capsys.readouterr().out


# Sizes, upright


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("form", ["jpg", "png", "webp", "tif"])
def test_sizes_are_those_that_are_read(tmp_path, form, turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    path = tmp_path / f"a.{form}"
    Image.new("RGB", (24, 17)).save(path, exif=exif)
    height, width = decode(path).shape[1:]
    assert read_sizes([str(path)]) == [(width, height)]
    assert (width, height) == ((17, 24) if turn > 4 else (24, 17))


def test_a_turned_image_has_an_upright_mask(root):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (HEIGHT, WIDTH)).save(root / "images" / "a.jpg", exif=exif)
    data = opened(root)
    assert data.read(0).shape[1:] == data.target(0).shape == (HEIGHT, WIDTH)


# The same data set is known again, and goes to other processes


def test_fingerprint_and_pickle(root, tmp_path):
    data = opened(root)
    assert opened(moved(root, tmp_path)).fingerprint == data.fingerprint
    back = pickle.loads(pickle.dumps(data))
    assert torch.equal(back.target(1), data.target(1)) and back.fingerprint == data.fingerprint
    assert opened(root, ignore=3).fingerprint != data.fingerprint
    png(root / "masks" / "a.png", IDS[:, ::-1])
    assert opened(root).fingerprint != data.fingerprint
    png(root / "masks" / "a.png", IDS, 16)  # the same numbers, written in another way
    assert opened(root).fingerprint == data.fingerprint


@pytest.mark.skipif(not os.path.exists(COCO_SMALL), reason="GTSA_COCO_SMALL names no small real set")
@pytest.mark.parametrize(("part", "count"), [("train", 83), ("val", 55)])
def test_no_false_alarm_on_coco_small(part, count):
    folder = f"{COCO_SMALL}/semantic/{part}"
    data = open_labelled(f"{COCO_SMALL}/images", folder, "masks", ignore=255)
    with open(f"{COCO_SMALL}/semantic/classes.json") as text:
        assert data.classes == tuple(entry["name"] for entry in json.load(text)["classes"])
    assert len(data) == count
    for index in range(0, count, 9):
        with Image.open(f"{folder}/{data.name(index).replace('.jpg', '.png')}") as image:
            truth = np.asarray(image).astype(int)
        assert np.array_equal(data.target(index), np.where(truth == 255, IGNORE, truth))
    assert open_labelled(f"{COCO_SMALL}/images", folder, "masks").fingerprint == data.fingerprint  # its file says 255
