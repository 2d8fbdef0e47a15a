"""COCO's JSON as it comes: targets equal what pycocotools makes of it, and no fault reaches pycocotools or its kin."""

import copy
import json
import os
import pickle
import re
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco
from test_labels import COCO_SMALL, moved, put, refused, write

from gtsa.core.errors import UserError
from gtsa.data.labels import open_labelled
from gtsa.data.labels._shapes import InvalidShape, _unpack, check_shape, draw_mask

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools' own
WIDTH, HEIGHT = 20, 18
TRIANGLE = [2.0, 3, 9.5, 3, 5, 12.25]
SQUARE = [12, 1, 17, 1, 17, 6, 12, 6]
RUNS = [HEIGHT * 2 + 3, 4, HEIGHT - 4, 5, HEIGHT * 17 - 8]  # 4 px of the third column, 5 of the fourth


def clean():
    drawn = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    drawn[4:9, 10:15] = 1
    packed = coco.encode(np.asfortranarray(drawn))["counts"].decode()
    one = {"iscrowd": 0, "area": 30.5}
    content = {
        "info": {},
        "images": [
            {"id": 7, "file_name": "b.jpg", "width": WIDTH, "height": HEIGHT},
            {"id": 3, "file_name": "sub/a.jpg", "width": WIDTH, "height": HEIGHT},
            {"id": 5, "file_name": "c.jpg", "width": WIDTH, "height": HEIGHT},
        ],
        "annotations": [
            {
                "id": 1,
                "image_id": 7,
                "category_id": 90,
                "bbox": [2, 3, 7.5, 9.25],
                "segmentation": [TRIANGLE, SQUARE],
                **one,
            },
            {"id": 2, "image_id": 5, "category_id": 4, "bbox": [12, 1, 5, 5], "segmentation": [SQUARE], **one},
            {
                "id": 9,
                "image_id": 7,
                "category_id": 4,
                "bbox": [2, 0, 2, 18],
                "segmentation": {"size": [HEIGHT, WIDTH], "counts": RUNS},
                "iscrowd": 1,
                "area": 9,
            },
            {
                "id": 4,
                "image_id": 7,
                "category_id": 90,
                "bbox": [10, 4, 5, 5],
                "segmentation": {"size": [HEIGHT, WIDTH], "counts": packed},
                **one,
            },
        ],
        "categories": [{"id": 90, "name": "kite"}, {"id": 4, "name": "boat"}, {"id": 11, "name": "seal"}],
    }
    return copy.deepcopy(content)  # tests change it


@pytest.fixture
def root(tmp_path):
    put(tmp_path / "images", "b.jpg", "sub/a.jpg", "c.jpg", "more.jpg", size=(WIDTH, HEIGHT))
    return tmp_path


def opened(root, content):
    return open_labelled(str(root / "images"), str(write(root / "x.json", content)), "boxes")


def fault(root, content):
    """The error message; masks cannot be drawn meanwhile."""
    loaded = {name: module for name, module in sys.modules.items() if name.startswith("faster_coco_eval")}
    blocked = {**dict.fromkeys(loaded), "faster_coco_eval": None}
    sys.modules.update(blocked)
    try:
        return refused(root / "images", write(root / "x.json", content), "boxes")
    finally:
        for name in blocked:
            del sys.modules[name]
        sys.modules.update(loaded)


def drawn(segmentation, height, width):
    """What pycocotools makes of it."""
    if isinstance(segmentation, list):
        encoded = coco.merge(coco.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        encoded = coco.frPyObjects(segmentation, height, width)
    else:
        encoded = {**segmentation, "counts": segmentation["counts"].encode()}
    return coco.decode(encoded).astype(bool)


# What is read


def test_boxes_and_masks(root):
    content = clean()
    data = opened(root, content)
    assert data.kind == "boxes" and data.has_masks
    assert data.classes == ("boat", "seal", "kite") and data.category_ids == (4, 11, 90)
    assert [data.name(i) for i in range(3)] == ["b.jpg", "sub/a.jpg", "c.jpg"] and data.image_ids == (7, 3, 5)
    first = data.target(0)
    assert first.boxes.tolist() == [[2, 3, 9.5, 12.25], [2, 0, 4, 18], [10, 4, 15, 9]]
    assert first.classes.tolist() == [2, 0, 2] and first.ids.tolist() == [1, 9, 4]
    assert first.crowd.tolist() == [False, True, False] and first.areas.tolist() == [30.5, 9, 30.5]
    assert [t.dtype for t in (first.boxes, first.classes, first.crowd, first.areas, first.ids, first.masks)] == [
        torch.float32, torch.int64, torch.bool, torch.float32, torch.int64, torch.bool,
    ]  # fmt: skip
    by_hand = np.zeros((3, HEIGHT, WIDTH), dtype=bool)
    by_hand[1, 3:7, 2] = by_hand[1, 3:8, 3] = True
    by_hand[2, 4:9, 10:15] = True
    assert np.array_equal(first.masks[1:], by_hand[1:])
    assert first.masks[0, 1:6, 12:17].all() and first.masks[0].sum() == 25 + first.masks[0, :, :10].sum()
    rows = [content["annotations"][i]["segmentation"] for i in (0, 2, 3)]
    assert np.array_equal(first.masks, np.stack([drawn(row, HEIGHT, WIDTH) for row in rows]))
    assert data.target(2).ids.tolist() == [2] and data.target(2).masks.shape == (1, HEIGHT, WIDTH)


def test_an_image_without_annotations_is_empty(root):
    none = opened(root, clean()).target(1)
    assert none.boxes.shape == (0, 4) and none.masks.shape == (0, HEIGHT, WIDTH)
    assert none.boxes.dtype == torch.float32 and none.masks.dtype == torch.bool
    assert len(none.classes) == len(none.crowd) == len(none.areas) == len(none.ids) == 0


def test_single_objects_without_a_mask_are_faults(root):
    content = clean()
    content["annotations"][1]["segmentation"] = []
    with pytest.raises(UserError, match="1 x annotation without a mask") as caught:
        opened(root, content)
    assert f"annotation {content['annotations'][1]['id']}: " in str(caught.value) and caught.value.code == 3


def test_boxes_alone(root, capsys):
    content = clean()
    del content["annotations"][0]["segmentation"]
    content["annotations"][1]["segmentation"] = []
    data = opened(root, content)
    assert not data.has_masks and data.target(0).masks is None and data.target(1).masks is None
    assert "2 of 4 annotations have no mask; only boxes are used" in capsys.readouterr().out
    for row in content["annotations"]:
        row.pop("segmentation", None)
        row.pop("iscrowd")
    data = opened(root, content)
    assert not data.has_masks and data.target(0).boxes.shape == (3, 4) and not data.target(0).crowd.any()
    assert "no mask" not in capsys.readouterr().out


def test_changing_one_target_changes_no_other(root):
    data = opened(root, clean())
    data.target(0).boxes.zero_()
    assert data.target(0).boxes[0].tolist() == [2, 3, 9.5, 12.25]


def test_shapes_may_reach_one_pixel_over_the_edge(root):
    content = clean()
    content["annotations"][1] |= {
        "bbox": [-1, -1, WIDTH + 2, HEIGHT + 2],
        "segmentation": [[-1, -1, WIDTH + 1, 0, 5, HEIGHT + 1]],
    }
    data = opened(root, content)
    assert data.target(2).boxes.tolist() == [[-1, -1, WIDTH + 1, HEIGHT + 1]]
    assert np.array_equal(data.target(2).masks[0], drawn(content["annotations"][1]["segmentation"], HEIGHT, WIDTH))


def test_objects_with_an_area_of_zero_are_left_out(root, capsys):
    """COCO train2017 has two: annotations 918 and 2206849."""
    content = clean()
    flat = [9.98, 8.56, 15.52, 8.56, 15.52, 8.56, 11.09, 8.56]
    content["annotations"][1] |= {"bbox": [9.98, 8.56, 5.54, 0.0], "area": 0.0, "segmentation": [flat]}
    assert len(opened(root, content).target(2).boxes) == 0
    assert "annotations with an empty box and area 0 are left out: 1 (id 2)" in capsys.readouterr().out


SHAPES = st.integers(1, 12).flatmap(
    lambda h: st.integers(1, 12).flatmap(
        lambda w: st.lists(st.booleans(), min_size=h * w, max_size=h * w).map(
            lambda v: np.array(v, np.uint8).reshape(h, w)
        )
    )
)


@settings(deadline=None, max_examples=100)
@given(SHAPES)
def test_any_run_lengths(array):
    """Both ways to write them, against pycocotools and against the array itself."""
    height, width = array.shape
    packed = coco.encode(np.asfortranarray(array))["counts"].decode()
    column = array.T.ravel()
    runs = np.diff(np.concatenate([[0], np.flatnonzero(np.diff(column)) + 1, [len(column)]])).tolist()
    runs = [0, *runs] if column[0] else runs
    for counts in (packed, runs):
        checked = check_shape({"size": [height, width], "counts": counts}, width, height)
        assert checked.tolist() == runs
        assert np.array_equal(draw_mask(checked, width, height), array)
        assert np.array_equal(
            draw_mask(checked, width, height), drawn({"size": [height, width], "counts": counts}, height, width)
        )


def test_long_run_lengths():
    """Numbers of several characters, and differences below zero."""
    array = np.zeros((3000, 1000), dtype=np.uint8)
    for left, top, right, bottom in ((0, 0, 1, 2999), (5, 3, 400, 17), (500, 2, 501, 3), (700, 0, 1000, 2900)):
        array[top:bottom, left:right] = 1
    packed = coco.encode(np.asfortranarray(array))["counts"].decode()
    checked = check_shape({"size": [3000, 1000], "counts": packed}, 1000, 3000)
    assert checked.sum() == 3_000_000 and checked.max() > 2**17
    assert np.array_equal(draw_mask(checked, 1000, 3000), array)


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 40), st.integers(1, 40), st.data())
def test_any_polygons(width, height, data):
    point = st.tuples(st.floats(-1, width + 1), st.floats(-1, height + 1))
    polygons = [
        [value for pair in points for value in pair]
        for points in data.draw(st.lists(st.lists(point, min_size=3, max_size=8), min_size=1, max_size=3))
    ]
    assert np.array_equal(
        draw_mask(check_shape(polygons, width, height), width, height), drawn(polygons, height, width)
    )


@settings(deadline=None, max_examples=200)
@given(st.text(max_size=12) | st.text(alphabet=[chr(c) for c in range(48, 112)], max_size=30))
def test_any_string_is_numbers_or_a_fault(text):
    try:
        assert _unpack(text).dtype == np.int64
    except InvalidShape as encoded:
        assert encoded.kind == "bad run-length string"


# Faults


def at(*path, to=None, drop=False):
    """A change of the clean labels: a value planted, or taken away."""

    def plant(content):
        for key in path[:-1]:
            content = content[key]
        if drop:
            del content[path[-1]]
        else:
            content[path[-1]] = to

    return plant


def of_second(**values):
    """Of annotation 2, which is in image 5."""
    return lambda content: content["annotations"][1].update(values)


def runs_with(**values):
    return lambda content: content["annotations"][2]["segmentation"].update(values)


NAN, INF = float("nan"), float("inf")
PACKED = clean()["annotations"][3]["segmentation"]["counts"]
FAULTS = [
    (at("images", drop=True), "missing key", "images"),
    (at("annotations", drop=True), "missing key", "annotations"),
    (at("categories", to={"1": "cat"}), "wrong type", "categories"),
    (at("annotations", to=[]), "empty list", "annotations"),
    (at("images", 1, to=5), "wrong type", "images[1]"),
    (at("images", 1, "id", drop=True), "missing key", "images[1]"),
    (at("images", 1, "id", to="3"), "wrong type", "images[1]"),
    (at("images", 1, "id", to=7), "duplicate id", "image 7"),
    (at("images", 1, "width", drop=True), "missing key", "image 3"),
    (at("images", 1, "height", to="18"), "wrong type", "image 3"),
    (at("images", 1, "height", to=-18), "wrong type", "image 3"),
    (at("images", 1, "width", to=WIDTH + 1), "image of another size", "image 3"),
    (at("images", 1, "width", to=0), "image of another size", "image 3"),
    (at("images", 1, "width", to=2**60), "image of another size", "image 3"),
    (at("images", 1, "file_name", drop=True), "missing key", "image 3"),
    (at("images", 1, "file_name", to=["a.jpg"]), "wrong type", "image 3"),
    (at("images", 1, "file_name", to=""), "wrong type", "image 3"),
    (at("images", 1, "file_name", to="a\0.jpg"), "wrong type", "image 3"),
    (at("images", 1, "file_name", to="none.jpg"), "image missing on disk", "image 3"),
    (at("images", 1, "file_name", to="sub"), "image missing on disk", "image 3"),
    (at("images", 1, "file_name", to="x" * 5000), "image missing on disk", "image 3"),
    (at("images", 1, "file_name", to="/etc/passwd"), "path outside the images", "image 3"),
    (at("images", 1, "file_name", to="../secret.jpg"), "path outside the images", "image 3"),
    (at("images", 1, "file_name", to="sub/../../secret.jpg"), "path outside the images", "image 3"),
    (at("images", 1, "file_name", to="link.jpg"), "path outside the images", "image 3"),
    (at("images", 1, "file_name", to="out/secret.jpg"), "path outside the images", "image 3"),
    (at("images", 1, "file_name", to="broken.jpg"), "image that cannot be read", "image 3"),
    (at("images", 1, "file_name", to="sub/../c.jpg"), "path outside the images", "image 3"),
    (at("images", 1, "file_name", to="./c.jpg"), "image named twice", "image 5"),
    (at("annotations", 1, to=[1, 2]), "wrong type", "annotations[1]"),
    (at("annotations", 1, "id", drop=True), "missing key", "annotations[1]"),
    (at("annotations", 1, "id", to=1.5), "wrong type", "annotations[1]"),
    (at("annotations", 1, "id", to=2**63), "wrong type", "annotations[1]"),
    (at("annotations", 1, "id", to=1), "duplicate id", "annotation 1"),
    (at("annotations", 1, "image_id", drop=True), "missing key", "annotation 2"),
    (at("annotations", 1, "category_id", drop=True), "missing key", "annotation 2"),
    (at("annotations", 1, "bbox", drop=True), "missing key", "annotation 2"),
    (at("annotations", 1, "area", drop=True), "missing key", "annotation 2"),
    (of_second(image_id=6), "unknown image id", "annotation 2"),
    (of_second(image_id="5"), "wrong type", "annotation 2"),
    (of_second(category_id=1), "unknown category id", "annotation 2"),
    (of_second(category_id=None), "wrong type", "annotation 2"),
    (of_second(iscrowd=2), "wrong type", "annotation 2"),
    (of_second(iscrowd="no"), "wrong type", "annotation 2"),
    (of_second(area="big"), "wrong type", "annotation 2"),
    (of_second(area=NAN), "number that is not finite", "annotation 2"),
    (of_second(area=-1), "negative area", "annotation 2"),
    (of_second(bbox="12 1 5 5"), "box that is not four numbers", "annotation 2"),
    (of_second(bbox=[12, 1, 5]), "box that is not four numbers", "annotation 2"),
    (of_second(bbox=[12, 1, 5, "5"]), "wrong type", "annotation 2"),
    (of_second(bbox=[12, 1, 5, True]), "wrong type", "annotation 2"),
    (of_second(bbox=[12, 1, 5, None]), "wrong type", "annotation 2"),
    (of_second(bbox=[NAN, 1, 5, 5]), "number that is not finite", "annotation 2"),
    (of_second(bbox=[12, 1, INF, 5]), "number that is not finite", "annotation 2"),
    (of_second(bbox=[12, -INF, 5, 5]), "number that is not finite", "annotation 2"),
    (of_second(bbox=[12, 1, 10**400, 5]), "number that is not finite", "annotation 2"),
    (of_second(bbox=[12, 1, -5, 5]), "box of negative size", "annotation 2"),
    (of_second(bbox=[17, 6, -5, -5]), "box of negative size", "annotation 2"),
    (of_second(bbox=[12, 1, 0, 5]), "empty box with an area", "annotation 2"),
    (of_second(bbox=[12, 1, 5, 0.0]), "empty box with an area", "annotation 2"),
    (of_second(bbox=[12, 1, 1e-12, 5]), "empty box with an area", "annotation 2"),
    (of_second(bbox=[-1.01, 1, 5, 5]), "box outside its image", "annotation 2"),
    (of_second(bbox=[12, -2, 5, 5]), "box outside its image", "annotation 2"),
    (of_second(bbox=[12, 1, 9.01, 5]), "box outside its image", "annotation 2"),
    (of_second(bbox=[12, 1, 5, 18.5]), "box outside its image", "annotation 2"),
    (of_second(bbox=[1e8, 1, 5, 5]), "box outside its image", "annotation 2"),
    (of_second(bbox=[2, 3, 1e300, 1e300]), "box outside its image", "annotation 2"),
    (of_second(segmentation="polygon"), "wrong type", "annotation 2"),
    (of_second(segmentation=None), "wrong type", "annotation 2"),
    (of_second(segmentation=[[]]), "polygon of fewer than 3 points", "annotation 2"),
    (of_second(segmentation=[[1, 2]]), "polygon of fewer than 3 points", "annotation 2"),
    (of_second(segmentation=[[1, 2, 3, 4]]), "polygon of fewer than 3 points", "annotation 2"),
    (of_second(segmentation=[SQUARE, [1, 2, 3, 4]]), "polygon of fewer than 3 points", "annotation 2"),
    (of_second(segmentation=[[1, 2, 3, 4, 5]]), "polygon with half a point", "annotation 2"),
    (of_second(segmentation=[[1, 2, 3, 4, 5, 6, 7]]), "polygon with half a point", "annotation 2"),
    (of_second(segmentation=SQUARE), "polygon that is not in a list", "annotation 2"),
    (of_second(segmentation=["12345678"]), "wrong type", "annotation 2"),
    (of_second(segmentation=[[1, 2, 3, 4, 5, "6"]]), "wrong type", "annotation 2"),
    (of_second(segmentation=[[[1, 2], [3, 4], [5, 6], [7, 8], [9, 9], [4, 3]]]), "wrong type", "annotation 2"),
    (of_second(segmentation=[[1, 2, 3, 4, 5, NAN]]), "number that is not finite", "annotation 2"),
    (of_second(segmentation=[[1, 2, 3, 4, 5, -INF]]), "number that is not finite", "annotation 2"),
    (of_second(segmentation=[[1, 2, 3, 4, 5, 10**400]]), "number that is not finite", "annotation 2"),
    (of_second(segmentation=[[1, 2, 3, 4, 1e8, 1e8]]), "polygon outside its image", "annotation 2"),
    (of_second(segmentation=[[1, 2, 3, 4, -1e8, 4]]), "polygon outside its image", "annotation 2"),
    (of_second(segmentation=[SQUARE, [1, 2, 3, 4, 5, 19.5]]), "polygon outside its image", "annotation 2"),
    (runs_with(size=[WIDTH, HEIGHT]), "run lengths of another size", "annotation 9"),
    (runs_with(size=[HEIGHT, WIDTH, 1]), "run lengths of another size", "annotation 9"),
    (runs_with(size=None), "run lengths of another size", "annotation 9"),
    (runs_with(counts=RUNS[:-1]), "run lengths that do not fill the image", "annotation 9"),
    (runs_with(counts=[*RUNS, 1]), "run lengths that do not fill the image", "annotation 9"),
    (runs_with(counts=[]), "run lengths that do not fill the image", "annotation 9"),
    (runs_with(counts=[2**32 + HEIGHT * WIDTH]), "run lengths that do not fill the image", "annotation 9"),
    (runs_with(counts=[10**400]), "run lengths that do not fill the image", "annotation 9"),
    (runs_with(counts=[HEIGHT * WIDTH + 5, -5]), "negative run length", "annotation 9"),
    (runs_with(counts=[10.0, HEIGHT * WIDTH - 10.0]), "wrong type", "annotation 9"),
    (runs_with(counts=None), "wrong type", "annotation 9"),
    (at("annotations", 2, "segmentation", "counts", drop=True), "missing key", "annotation 9"),
    (at("annotations", 2, "segmentation", "size", drop=True), "missing key", "annotation 9"),
    (runs_with(counts=""), "bad run-length string", "annotation 9"),
    (runs_with(counts=PACKED + "\x7f"), "bad run-length string", "annotation 9"),
    (runs_with(counts=PACKED + " "), "bad run-length string", "annotation 9"),
    (runs_with(counts=PACKED + "é"), "bad run-length string", "annotation 9"),
    (runs_with(counts=PACKED + "P"), "bad run-length string", "annotation 9"),  # cut off: more was to come
    (runs_with(counts="o" * 30 + "0"), "bad run-length string", "annotation 9"),
    (runs_with(counts=PACKED[:-2]), "run lengths that do not fill the image", "annotation 9"),
    (runs_with(counts="O"), "negative run length", "annotation 9"),
    (at("categories", 1, "id", to=90), "duplicate id", "category 90"),
    (at("categories", 1, "name", drop=True), "missing key", "category 4"),
    (at("categories", 1, "name", to=4), "wrong type", "category 4"),
    (at("categories", 1, "name", to=""), "category without a name", "category 4"),
    (at("categories", 1, "name", to="seal"), "category named twice", "category 11"),
]


@pytest.mark.parametrize(
    ("plant", "kind", "location"), FAULTS, ids=[f"{i} {kind}" for i, (_, kind, _) in enumerate(FAULTS)]
)
def test_faults(root, plant, kind, location):
    put(root, "secret.jpg", size=(WIDTH, HEIGHT))
    (root / "images" / "link.jpg").symlink_to(root / "secret.jpg")
    (root / "images" / "out").symlink_to(root)
    (root / "images" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    content = clean()
    plant(content)
    message = fault(root, content)
    assert f"1 x {kind}\n" in message and f"\n  {location}: " in message and str(root / "x.json") in message


@pytest.mark.parametrize(
    ("plant", "kind", "location"), FAULTS[29:], ids=[f"{i} {kind}" for i, (_, kind, _) in enumerate(FAULTS[29:])]
)
def test_a_fault_is_reported_once(root, plant, kind, location):
    """One fault of an annotation or category makes no others."""
    content = clean()
    plant(content)
    kinds_reported = re.findall(r"\n +(\d+) x (.*)", fault(root, content))
    lost = {"duplicate id", "wrong type", "missing key"}  # of a category's id: then annotations know no such class
    assert ("1", kind) in kinds_reported and (
        len(kinds_reported) == 1 or (location.startswith("category") and kind in lost)
    )


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", '"x"', "nonsense", "\xff", "[" * 100_000, '{"images": ' + "9" * 5000 + "}"],
    ids=range(9),
)
def test_what_is_no_json_object(root, text):
    message = fault(root, text)
    assert re.search("1 x (not JSON|wrong type)\n", message) and "x.json" in message


def test_all_faults_at_once(root):
    content = clean()
    content["images"][1]["width"] = 5
    content["annotations"][0] |= {"bbox": [1, 1, -1, 1], "area": NAN, "segmentation": [[1, 2, 3, 4]], "category_id": 8}
    content["annotations"][1]["image_id"] = 99
    content["annotations"][2]["segmentation"]["counts"] = [5]
    content["annotations"] += [
        {**copy.deepcopy(content["annotations"][3]), "id": 100 + i, "bbox": [90, 1, 2, 2]} for i in range(500)
    ]
    message = fault(root, content)
    for line in (
        "500 x box outside its image", "1 x box of negative size", "1 x number that is not finite", "1 x unknown image id",
        "1 x polygon of fewer than 3 points", "1 x unknown category id", "1 x image of another size",
        "1 x run lengths that do not fill the image",
    ):  # fmt: skip
        assert line in message
    for location in (
        "image 3: sub/a.jpg: 5 x 18 px",
        "annotation 1: ",
        "annotation 2: ",
        "annotation 9: ",
        "annotation 100: ",
    ):
        assert f"\n  {location}" in message
    assert "and 487 more" in message and message.count("\n") < 35


def test_an_image_turned_by_exif_has_the_size_it_is_read_with(root):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (HEIGHT, WIDTH)).save(root / "images" / "b.jpg", exif=exif)
    assert opened(root, clean()).read(0).shape == (3, HEIGHT, WIDTH)
    Image.new("RGB", (WIDTH, HEIGHT)).save(root / "images" / "b.jpg", exif=exif)
    assert "image 7: b.jpg: 20 x 18 px in the labels, the upright image has 18 x 20 px" in fault(root, clean())


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from([0, 3, 7, 1e8, -1, 2**63, "b.jpg"]),
    lambda inner: (
        st.lists(inner, max_size=6)
        | st.dictionaries(st.sampled_from(["id", "size", "counts", "name"]), inner, max_size=3)
    ),
    max_leaves=8,
)


def list_locations(content, path=()):
    yield path
    entries = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in entries:
        yield from list_locations(value, (*path, key))


PLACES = list(list_locations(clean()))[1:]


@settings(deadline=None, max_examples=300)
@given(st.lists(st.tuples(st.sampled_from(PLACES), JSON), min_size=1, max_size=3))
def test_any_change_anywhere_is_reported_or_valid(tmp_path_factory, changes):
    """Nothing but a UserError comes out of it, and what passes can be drawn."""
    root = tmp_path_factory.getbasetemp() / "anything"
    if not root.exists():
        put(root / "images", "b.jpg", "sub/a.jpg", "c.jpg", "more.jpg", size=(WIDTH, HEIGHT))
    content = clean()
    for path, value in changes:
        inner = content
        try:
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = copy.deepcopy(value)
        except (KeyError, IndexError, TypeError):  # an earlier change removed the location
            continue
    try:
        data = opened(root, content)
    except UserError as caught:
        assert caught.code == 3 and "x.json" in str(caught)
        return
    for index in range(len(data)):
        target = data.target(index)
        assert torch.isfinite(target.boxes).all() and (target.boxes[:, 2:] > target.boxes[:, :2]).all()
        assert target.masks is None or target.masks.shape == (len(target.boxes), *data.read(index).shape[1:])


# The same data set is known again, and goes to other processes


def test_fingerprint_and_pickle(root, tmp_path):
    content = clean()
    data = opened(root, content)
    copied = moved(root, tmp_path)
    assert open_labelled(str(copied / "images"), str(copied / "x.json"), "boxes").fingerprint == data.fingerprint
    back = pickle.loads(pickle.dumps(data))
    assert back.fingerprint == data.fingerprint and back.image_ids == (7, 3, 5)
    for name in ("boxes", "classes", "masks", "crowd", "areas", "ids"):
        assert torch.equal(getattr(back.target(0), name), getattr(data.target(0), name))
    content["info"] = {"written": "again"}
    assert opened(root, content).fingerprint == data.fingerprint
    content["annotations"][0]["segmentation"][0][0] += 0.5
    assert opened(root, content).fingerprint != data.fingerprint


@pytest.mark.skipif(not os.path.exists(COCO_SMALL), reason="GTSA_COCO_SMALL names no small real set")
@pytest.mark.parametrize(
    ("name", "images", "boxes", "masks"),
    [
        ("instances_train", 238, 2122, True),
        ("instances_val", 158, 1364, True),
        ("boxes_only_train", 9, 54, False),
        ("boxes_only_val", 6, 49, False),
    ],
)
def test_no_false_alarm_on_coco_small(name, images, boxes, masks):
    file = f"{COCO_SMALL}/{name}.json"
    data = open_labelled(f"{COCO_SMALL}/images", file, "boxes")
    with open(file) as text:
        truth = json.load(text)
    assert (len(data), len(data.targets.boxes), data.has_masks) == (images, boxes, masks)
    assert data.category_ids == tuple(c["id"] for c in truth["categories"]) and len(data.classes) == 80
    rows = {}
    for row in truth["annotations"]:
        rows.setdefault(row["image_id"], []).append(row)
    for index in range(0, images, 12):
        target, own = data.target(index), rows.get(data.image_ids[index], [])
        assert target.ids.tolist() == [row["id"] for row in own]
        assert [data.category_ids[c] for c in target.classes] == [row["category_id"] for row in own]
        corners = [[x, y, x + w, y + h] for x, y, w, h in (row["bbox"] for row in own)]
        assert torch.allclose(target.boxes, torch.tensor(corners).reshape(-1, 4))
        if masks and own:
            height, width = target.masks.shape[1:]
            assert np.array_equal(target.masks, np.stack([drawn(row["segmentation"], height, width) for row in own]))


def test_the_sample_is_clean():
    import gtsa

    folder = os.path.join(os.path.dirname(gtsa.__file__), "data", "sample")
    data = open_labelled(f"{folder}/images", f"{folder}/instances.json", "boxes")
    assert data.classes == ("tree",) and not data.has_masks
