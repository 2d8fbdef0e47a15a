"""What --predictions writes, read back with other libraries; nothing is written outside its folder."""

import csv
import json

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from evaluating import labelled, noise
from gtsa.core.errors import UserError
from gtsa.data.labels import IGNORE, Boxes
from gtsa.evaluation.legend import legend
from gtsa.evaluation.prediction_pictures import draw_prediction, palette, to_palette_image
from gtsa.evaluation.predictions import PredictionWriter, unique_names

SEVEN = [f"class {i}" for i in range(7)]


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def table(folder):
    with open(folder, newline="") as file:
        return list(csv.DictReader(file))


def kept(folder, data, predictions, pictures=0, task="knn"):
    writer = PredictionWriter(str(folder), pictures, task, data)
    for index, prediction in enumerate(predictions):
        writer(index, prediction)
    writer.close()


def test_nothing_is_written_without_predictions(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    writer = PredictionWriter(None, 5, "knn", labelled(noise(2), [0, 1]))
    writer(0, torch.tensor([0.1, 0.9]))
    writer.close()
    assert files(tmp_path) == []


def test_a_table_of_classes(tmp_path):
    names = ["b/1.png", 'a, "x"\n.png']
    data = labelled(noise(2), [3, 6], classes=SEVEN, names=names)
    kept(tmp_path, data, [torch.arange(7) / 21, torch.arange(7).flip(0) / 21])
    assert files(tmp_path) == ["knn/predictions.csv"]
    rows = table(tmp_path / "knn" / "predictions.csv")
    assert [(r["image"], r["truth"], r["prediction"]) for r in rows] == [
        ("b/1.png", "class 3", "class 6"),
        ('a, "x"\n.png', "class 6", "class 0"),
    ]
    assert [rows[0][f"class {i}"] for i in range(1, 6)] == ["class 6", "class 5", "class 4", "class 3", "class 2"]
    assert [float(rows[0][f"score {i}"]) for i in range(1, 6)] == pytest.approx(
        [n / 21 for n in (6, 5, 4, 3, 2)], abs=1e-6
    )


def test_a_table_of_several_classes(tmp_path):
    data = labelled(noise(1), [torch.tensor([True, False, True])], "multilabel", "abc")
    kept(tmp_path, data, [torch.tensor([0.1, 0.6, 0.7])])
    (row,) = table(tmp_path / "knn" / "predictions.csv")
    assert (row["truth"], row["prediction"], row["class 1"], row["score 1"]) == ("a; c", "b; c", "c", "0.7")
    assert len(row) == 9


@pytest.mark.parametrize(("classes", "mode"), [(3, "P"), (256, "P"), (300, "I;16")])
def test_masks(tmp_path, classes, mode):
    actual = torch.randint(classes, (20, 30), generator=torch.Generator().manual_seed(0))
    actual[0, :2] = torch.tensor([0, classes - 1])
    stored = actual.to(torch.uint8 if classes <= 256 else torch.int32)
    data = labelled(noise(1), [actual], "masks", map(str, range(classes)), names=["sub/x.jpg"])
    kept(tmp_path, data, [stored], task="segmentation")
    assert files(tmp_path) == ["segmentation/masks/sub/x.png"]
    with Image.open(tmp_path / "segmentation" / "masks" / "sub" / "x.png") as mask:
        assert mask.mode == mode
        assert np.array_equal(np.asarray(mask), actual.numpy())


def test_the_palette_is_pascal_vocs():
    assert palette()[:8].tolist() == [
        [0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 0, 128], [128, 0, 128], [0, 128, 128], [128, 128, 128],
    ]  # fmt: skip
    assert palette()[8].tolist() == [64, 0, 0] and palette()[20].tolist() == [0, 64, 128]
    assert len(np.unique(palette(1000), axis=0)) == 1000


def boxes(*corners, classes):
    n = len(corners)
    return Boxes(
        torch.tensor(corners, dtype=torch.float32).reshape(n, 4), torch.tensor(classes), None,
        torch.zeros(n, dtype=torch.bool), torch.ones(n), torch.arange(n),
    )  # fmt: skip


def result(image, kind, box, score):
    return {"image_id": image, "category_id": kind, "bbox": box, "score": score}


def test_detections_and_their_picture(tmp_path):
    truth = [boxes((2, 2, 20, 20), classes=[0]), boxes((0, 0, 5, 5), classes=[1])]
    black = [torch.zeros(3, 40, 60, dtype=torch.uint8)] * 2
    data = labelled(black, truth, "boxes", ["cat", "dog"], category_ids=(17, 18))
    actual = [[result(5, 18, [30.0, 10.0, 20.0, 20.0], 0.9), result(5, 17, [0.0, 35.0, 4.0, 4.0], 0.01)], []]
    kept(tmp_path, data, actual, pictures=1, task="detection")
    assert json.loads((tmp_path / "detection" / "detections.json").read_text()) == actual[0]
    assert files(tmp_path) == ["detection/detections.json", "detection/pictures/000.png"]
    with Image.open(tmp_path / "detection" / "pictures" / "000.png") as picture:
        pixels = np.asarray(picture)
    left, right = pixels[-40:, :60], pixels[-40:, pixels.shape[1] - 200 : pixels.shape[1] - 140]
    assert (left[2, 2:20] == palette()[1]).all() and not left[30:].any()
    assert (right[10, 30:50] == palette()[2]).all() and not right[33:].any()  # an unlikely box is not drawn


def test_pictures_of_masks_leave_unlabelled_pixels_alone(tmp_path):
    image = torch.full((3, 32, 300), 100, dtype=torch.uint8)
    truth = torch.ones(32, 300, dtype=torch.int64)
    truth[:, 150:] = IGNORE
    kept(tmp_path, labelled([image], [truth], "masks", "abc"), [torch.full((32, 300), 2, dtype=torch.uint8)], 1, "s")
    with Image.open(tmp_path / "s" / "pictures" / "000.png") as picture:
        pixels = np.asarray(picture)[-32:]
    assert pixels[0, 0].tolist() == [(100 + 128) // 2, 50, 50]
    assert pixels[0, 299].tolist() == [100, 100, 100]
    assert pixels[0, -300].tolist() == [50, (100 + 128) // 2, 50]


def test_pictures_have_a_legend_of_the_classes_in_them():
    image = torch.full((3, 32, 300), 100, dtype=torch.uint8)
    truth = torch.ones(32, 300, dtype=torch.int64)
    truth[:, 150:] = IGNORE
    data = labelled([image], [truth], "masks", ["sky", "road", "tree", "car"])
    pixels = np.asarray(draw_prediction(data, 0, torch.full((32, 300), 2, dtype=torch.uint8)))
    top = {tuple(colour) for colour in pixels[: -32 - 22].reshape(-1, 3).tolist()}
    assert {tuple(palette()[i].tolist()) for i in (1, 2)} <= top and tuple(palette()[3].tolist()) not in top
    data = labelled([image], [boxes((2, 2, 20, 20), classes=[0])], "boxes", ["cat", "dog"], category_ids=(17, 18))
    pixels = np.asarray(draw_prediction(data, 0, [result(0, 18, [30.0, 10.0, 20.0, 20.0], 0.9)]))
    top = {tuple(colour) for colour in pixels[: -32 - 22].reshape(-1, 3).tolist()}
    assert {tuple(palette()[i].tolist()) for i in (1, 2)} <= top


def test_a_long_legend_stays_inside():
    entries = [(f"class {'x' * (i % 40)}", (i, 0, 0)) for i in range(200)]
    sheet = np.asarray(legend(entries, 300))
    assert sheet.shape[1] == 300 and (sheet[:, -1] == 255).all()
    assert len(set(sheet[..., 0].ravel().tolist())) > 30


def test_so_many_pictures_evenly_spread(tmp_path):
    data = labelled(noise(11), [i % 2 for i in range(11)])
    kept(tmp_path, data, [torch.tensor([0.2, 0.8])] * 11, pictures=3)
    assert files(tmp_path / "knn" / "pictures") == ["000.png", "005.png", "010.png"]
    kept(tmp_path / "all", data, [torch.tensor([0.2, 0.8])] * 11, pictures=50)
    assert len(files(tmp_path / "all" / "knn" / "pictures")) == 11


def test_predictions_of_folds_are_of_the_right_images(tmp_path):
    data = labelled(noise(4), [0, 1, 0, 1])
    writer = PredictionWriter(str(tmp_path), 0, "knn", data)
    for positions in ([1, 3], [0, 2]):
        writer.indices = positions
        for index, position in enumerate(positions):
            writer(index, torch.nn.functional.one_hot(torch.tensor(data.targets[position]), 2).float())
    writer.close()
    rows = table(tmp_path / "knn" / "predictions.csv")
    assert [r["image"] for r in rows] == ["000.png", "001.png", "002.png", "003.png"]
    assert all(r["truth"] == r["prediction"] for r in rows)


def test_equal_stems_do_not_overwrite_one_another():
    assert unique_names(["a/x.jpg", "b/x.jpg"]) == ["a/x", "b/x"]
    assert unique_names(["x.jpg", "x.png", "y.png"]) == ["x.jpg", "x.png", "y"]
    assert unique_names(["X.jpg", "x.jpg"]) == ["X.jpg", "x.jpg.2"]


part = st.text(st.characters(exclude_characters="/\0"), min_size=1, max_size=5) | st.sampled_from(["..", ".", "x.jpg"])


@example(["..0", "...png", "a/...jpg", ".png"])
@given(st.lists(st.builds("{}{}".format, st.sampled_from(["", "/", "//"]), st.lists(part, min_size=1).map("/".join))))
def test_no_name_leads_out_and_all_differ(images):
    names = unique_names(images)
    assert len({name.lower() for name in names}) == len(images)
    for name in names:
        assert not name.startswith("/") and ".." not in name.split("/") and name not in ("", ".")


def test_nothing_is_written_outside(tmp_path):
    names = ["../../escaped.png", "/tmp/absolute.png", "sub/../../up.png"]
    mask = torch.zeros(32, 32, dtype=torch.uint8)
    data = labelled(noise(3), [mask.long()] * 3, "masks", "ab", names=names)
    kept(tmp_path / "here", data, [mask] * 3, task="t")
    assert files(tmp_path) == [
        "here/t/masks/escaped.png", "here/t/masks/sub/up.png", "here/t/masks/tmp/absolute.png",
    ]  # fmt: skip


def test_planted_links_are_not_followed(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "here" / "t").mkdir(parents=True)
    (tmp_path / "here" / "t" / "masks").symlink_to(outside)
    mask = torch.zeros(32, 32, dtype=torch.uint8)
    data = labelled(noise(1), [mask.long()], "masks", "ab", names=["sub/x.png"])
    with pytest.raises(UserError, match="remove the link") as refused:
        kept(tmp_path / "here", data, [mask], task="t")
    assert refused.value.code == 8
    assert files(outside) == [] and list(outside.iterdir()) == []
    (tmp_path / "here" / "u" / "masks").mkdir(parents=True)
    (outside / "precious").write_text("mine")
    (tmp_path / "here" / "u" / "masks" / "x.png").symlink_to(outside / "precious")
    kept(tmp_path / "here", labelled(noise(1), [mask.long()], "masks", "ab", names=["x.png"]), [mask], task="u")
    assert (outside / "precious").read_text() == "mine"


def test_a_folder_that_cannot_be_written_is_reported_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written") as caught:
        PredictionWriter(str(tmp_path / "file"), 0, "knn", labelled(noise(2), [0, 1]))
    assert caught.value.code == 6


def test_more_than_256_classes_take_16_bits():
    assert to_palette_image(torch.tensor([[299]]), 300).mode == "I;16"
