"""Detection: COCO's metrics, views that keep pixels, boxes and masks together, and a training that can be resumed."""

import contextlib
import io
import os
import signal
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning_fabric import Fabric
from torchvision.models.detection.faster_rcnn import _default_anchorgen
from torchvision.models.detection.image_list import ImageList

from gtsa.core.errors import UserError
from gtsa.core.types import Draw
from gtsa.data.labels import Boxes, Labelled
from gtsa.evaluation.average_precision import average_precision, pasted, to_run_lengths, to_xywh
from gtsa.evaluation.context import EvalContext
from gtsa.evaluation.detection_crops import View, apply_view, boxes_around, draw_view, fit_size
from gtsa.evaluation.evaluators.detection import Detection, TrainingViews, coco_annotations, parameter_groups
from gtsa.evaluation.heads.mask_rcnn import Anchors, Detector, _pool, padded
from gtsa.models.backbone import Backbone


def make_boxes(boxes, classes, masks=None, crowd=None):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    n = len(boxes)
    return Boxes(
        boxes,
        torch.tensor(classes, dtype=torch.int64),
        masks,
        torch.zeros(n, dtype=torch.bool) if crowd is None else torch.tensor(crowd, dtype=torch.bool),
        (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]),
        torch.arange(1, n + 1),
    )


class Pixels:
    """A source of images in memory."""

    def __init__(self, images):
        self.images, self.on_read, self.range16 = images, lambda: None, (0.0, 65535.0)

    def __len__(self):
        return len(self.images)

    def name(self, index):
        return f"{index}.png"

    def read(self, index, detail=None):
        self.on_read()
        return self.images[index]


def squares(count, masks, size=(64, 80), seed=0):
    """Bright squares of two colours on dark noise; every fifth image has none, and some have a crowd."""
    rng = np.random.default_rng(seed)
    images, targets = [], []
    for number in range(count):
        pixels = rng.integers(0, 60, (3, *size))
        boxes, classes, crowd, outlines = [], [], [], []
        for column in range(0 if number % 5 == 4 else int(rng.integers(1, 3))):
            side, colour = int(rng.integers(14, 30)), int(rng.integers(2))
            y, x = (
                int(rng.integers(0, size[0] - side)),
                int(rng.integers(0, size[1] // 2 - side)) + column * size[1] // 2,
            )
            pixels[colour, y : y + side, x : x + side] = 250
            boxes.append([x, y, x + side, y + side])
            classes.append(colour)
            crowd.append(number % 7 == 6)
            outlines.append(np.zeros(size, bool))
            outlines[-1][y : y + side, x : x + side] = True
        outlines = torch.tensor(np.array(outlines).reshape(-1, *size)) if masks else None
        images.append(torch.tensor(pixels.astype(np.uint8)))
        targets.append(make_boxes(boxes, classes, outlines, crowd))
    return Labelled(
        Pixels(images), list(range(count)), targets, "boxes", ("red", "green"), f"squares {seed}",
        category_ids=(7, 3), image_ids=tuple(100 + i for i in range(count)), has_masks=masks,
    )  # fmt: skip


def make_context(**options):
    return EvalContext(Fabric(accelerator="cpu", devices=1), **options)


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return Backbone("test_vit", 64).eval()


# Figures


def oracle(per_image, kind):
    """pycocotools' six metrics, computed from files as usual."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        annotations = [{**a, "image_id": n} for n, entries in enumerate(per_image["truth"]) for a in entries]
        gt = COCO()
        gt.dataset = {
            "images": [{"id": n, "height": 240, "width": 280} for n in range(len(per_image["truth"]))],
            "annotations": [{"id": i + 1, **a} for i, a in enumerate(annotations)],
            "categories": [{"id": c} for c in (3, 7, 11)],
        }
        gt.createIndex()
        drop = "bbox" if kind == "segm" else "segmentation"  # with both, loadRes would take a mask's area from its box
        actual = [
            {**{k: v for k, v in d.items() if k != drop}, "image_id": n}
            for n, entries in enumerate(per_image["found"])
            for d in entries
        ]
        evaluation = COCOeval(gt, gt.loadRes(actual), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(("AP", "AP50", "AP75", "APs", "APm", "APl"), 100 * evaluation.stats[:6], strict=True))


def outline(box, size):
    """An ellipse in a box, as run lengths, and its area."""
    y, x = np.mgrid[: size[0], : size[1]] + 0.5
    bx, by, w, h = box
    mask = ((x - bx - w / 2) / (w / 2)) ** 2 + ((y - by - h / 2) / (h / 2)) ** 2 <= 1
    return to_run_lengths(torch.tensor(mask)), float(mask.sum())


@cache
def random_evidence(seed, images=14, size=(240, 280)):
    """Objects of all sizes, a fifth of them crowds, detected with noise or missed; and false detections."""
    rng = np.random.default_rng(seed)
    per_image = {"truth": [], "found": []}

    def box():
        side, aspect = np.exp(rng.uniform(np.log(8), np.log(160))), np.exp(rng.normal(0, 0.2))
        w, h = side * aspect, side / aspect
        return [float(rng.uniform(0, size[1] - w)), float(rng.uniform(0, size[0] - h)), float(w), float(h)]

    for image in range(images):
        there, actual = [], []
        for _ in range(0 if image % 4 == 1 else rng.integers(1, 9)):
            given = box()
            runs, area = outline(given, size)
            category = int(rng.choice([3, 7, 11]))
            there.append(
                {
                    "category_id": category,
                    "bbox": given,
                    "area": area,
                    "iscrowd": int(rng.random() < 0.2),
                    "segmentation": runs,
                }
            )
            for _ in range(rng.integers(0, 3)):
                x, y, w, h = given
                near = [
                    x + rng.normal(0, 0.08) * w,
                    y + rng.normal(0, 0.08) * h,
                    w * np.exp(rng.normal(0, 0.1)),
                    h * np.exp(rng.normal(0, 0.1)),
                ]
                near = [float(v) for v in near]
                actual.append(
                    {
                        "category_id": category if rng.random() < 0.8 else 3,
                        "bbox": near,
                        "score": float(rng.random()),
                        "segmentation": outline(near, size)[0],
                    }
                )
        for _ in range(0 if image % 5 == 2 else 130 if image == 3 else rng.integers(0, 5)):  # more than a hundred, once
            other = box()
            actual.append(
                {
                    "category_id": int(rng.choice([3, 7, 11])),
                    "bbox": other,
                    "score": float(rng.random()),
                    "segmentation": outline(other, size)[0],
                }
            )
        per_image["truth"].append(there)
        per_image["found"].append(actual)
    return per_image


@pytest.mark.parametrize("seed", range(3))
def test_metrics_equal_pycocotools(seed):
    per_image = random_evidence(seed)
    metrics = Detection().metrics(per_image)
    assert next(iter(metrics)) == "box AP"
    for kind, name in (("bbox", "box"), ("segm", "mask")):
        expected = oracle(per_image, kind)
        assert min(expected.values()) > 0  # every range of sizes is put to the test
        for figure, value in expected.items():
            assert metrics[f"{name} {figure}"] == pytest.approx(value, abs=1e-10)


def test_metrics_of_some_images_and_of_one_image_twice():
    per_image = random_evidence(1)
    for chosen in ([0, 2, 3], [5, 5, 0, 8], [1, 0]):
        some = {name: [entries[i] for i in chosen] for name, entries in per_image.items()}
        expected = {k: v for k, v in oracle(some, "bbox").items() if v >= 0}
        assert average_precision(some["truth"], some["found"], "bbox") == pytest.approx(expected, abs=1e-10)


def test_perfect_detections_score_100():
    per_image = random_evidence(2)
    perfect = [
        [
            {**{k: t[k] for k in ("category_id", "bbox", "segmentation")}, "score": 0.5}
            for t in entries
            if not t["iscrowd"]
        ]
        for entries in per_image["truth"]
    ]
    metrics = Detection().metrics({**per_image, "found": perfect})
    assert len(metrics) == 12
    assert set(metrics.values()) == {100.0}


def test_no_detections_and_no_objects():
    per_image = random_evidence(2)
    nothing = [[] for _ in per_image["truth"]]
    assert set(Detection().metrics({**per_image, "found": nothing}).values()) == {0.0}
    assert Detection().metrics({"truth": nothing, "found": per_image["found"]}) == {}


def test_metrics_print_nothing(capfd):
    Detection().metrics(random_evidence(0))
    assert capfd.readouterr() == ("", "")


def test_masks_are_pasted_where_their_boxes_lie():
    y, x = torch.meshgrid(torch.arange(28) + 0.5, torch.arange(28) + 0.5, indexing="ij")
    disc = (15 - ((x - 14) ** 2 + (y - 14) ** 2).sqrt() - 3).sigmoid()  # a half at a radius of 12 of 28
    for box in ([10.0, 5.0, 66.0, 61.0], [3.3, 4.7, 40.1, 30.9], [-20.0, 30.0, 30.0, 90.0]):
        whole = pasted(disc, torch.tensor(box), (70, 80))
        py, px = torch.meshgrid(torch.arange(70) + 0.5, torch.arange(80) + 0.5, indexing="ij")
        u, v = (px - box[0]) / (box[2] - box[0]) - 0.5, (py - box[1]) / (box[3] - box[1]) - 0.5
        radius = (u**2 + v**2).sqrt() * 28 / 12
        assert whole[radius < 0.96].all() and not whole[radius > 1.04].any()
    assert not pasted(disc, torch.tensor([90.0, 5.0, 99.0, 9.0]), (70, 80)).any()
    full = pasted(torch.ones(28, 28), torch.tensor([10.0, 20.0, 14.0, 30.0]), (70, 80))
    assert full.sum() == 40 and full[20:30, 10:14].all()


# Views


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(20, 90), st.integers(20, 90), st.sampled_from([64, 96, 160]))
def test_views_keep_pixels_boxes_and_masks_together(seed, height, width, scale):
    rng = np.random.default_rng(seed)
    masks = torch.zeros(6, height, width, dtype=torch.bool)
    for mask in masks:
        y, x = int(rng.integers(0, height - 8)), int(rng.integers(0, width - 8))
        mask[y : y + rng.integers(4, 30), x : x + rng.integers(4, 30)] = True
        mask[y, x] = False  # no rectangle
    pixels = (255 * masks[:3]).byte()
    given_things = make_boxes(boxes_around(masks).tolist(), [0, 1, 2, 3, 4, 5], masks, [False] * 5 + [True])
    view = draw_view(height, width, scale, rng)
    shown, target = apply_view(pixels, given_things, view)
    assert shown.shape[-2:] == view.size == target["masks"].shape[-2:]
    assert 6 not in target["labels"]  # the crowd
    sides = target["boxes"][:, 2:] - target["boxes"][:, :2]
    assert (sides >= 1).all() and target["masks"].bool().flatten(1).any(-1).all()
    zoom = max(view.size[0] / view.height, view.size[1] / view.width)
    if len(sides):
        assert (target["boxes"] - boxes_around(target["masks"].bool())).abs().max() <= 0.5 * max(zoom, 1) + 0.5
        assert (target["boxes"] >= 0).all() and (target["boxes"] <= torch.tensor([*view.size[::-1]] * 2) + 1e-3).all()
    for label, mask in zip(target["labels"].tolist(), target["masks"], strict=True):
        if label <= 3:  # the pixels of channel label - 1 are this mask's
            assert ((shown[label - 1] > 127) != mask.bool()).float().mean() <= 0.03 + 2 * (
                sum(view.size) / np.prod(view.size)
            )
    boxes_only, plain = apply_view(
        pixels, make_boxes(given_things.boxes.tolist(), given_things.classes.tolist(), None, [False] * 5 + [True]), view
    )
    assert torch.equal(boxes_only, shown)
    inside = set(plain["labels"].tolist())
    assert set(target["labels"].tolist()) <= inside  # a box may reach into the crop where its mask does not


def test_a_view_by_hand():
    view = View(top=10, left=20, height=40, width=50, size=(80, 200), flip=True)
    shown, target = apply_view(
        torch.zeros(3, 100, 100, dtype=torch.uint8),
        make_boxes([[30, 0, 45, 30], [0, 0, 20, 100], [65, 45, 99, 99], [69.9, 10, 80, 20]], [0, 1, 2, 3]),
        view,
    )
    assert shown.shape == (3, 80, 200)
    # x: (30 - 20) * 4 = 40 to 100, mirrored 100 to 160; y: 0 to (30 - 10) * 2; the second lies outside, the fourth is
    # 0.4 px wide
    assert target["boxes"].tolist() == [[100, 0, 160, 40], [0, 70, 20, 80]]
    assert target["labels"].tolist() == [1, 3]


def test_what_is_left_of_a_mask_makes_its_box():
    mask = torch.zeros(1, 40, 40, dtype=torch.bool)
    mask[0, 0:10, 0:10] = True
    mask[0, 30:34, 20:40] = True  # an L: the crop sees only this bar
    _, target = apply_view(
        torch.zeros(3, 40, 40, dtype=torch.uint8),
        make_boxes([[0, 0, 40, 34]], [0], mask),
        View(20, 0, 20, 40, (20, 40), False),
    )
    assert target["boxes"].tolist() == [[20, 10, 40, 14]]


def test_sizes_are_those_of_the_settings():
    whole, cropped = [], []
    for seed in range(600):
        view = draw_view(480, 640, 800, np.random.default_rng(seed))
        (cropped if (view.height, view.width) != (480, 640) else whole).append(view)
        assert 0 <= view.top <= 480 - view.height and 0 <= view.left <= 640 - view.width
    assert 240 < len(whole) < 360 and 240 < sum(v.flip for v in whole + cropped) < 360
    shorts = [min(v.size) for v in whole]
    assert min(shorts) >= 480 and max(shorts) <= 800 and np.mean(shorts) == pytest.approx(640, abs=20)
    assert all(max(v.size) <= 1333 for v in whole + cropped)
    # a crop of 384 to 600 px out of a short side of 400 to 600: at least 384 / 600 of it
    assert min(v.height for v in cropped) >= 0.63 * 480 and min(v.width for v in cropped) >= 0.63 * 480
    assert max(v.width for v in cropped) > 550 and min(v.width for v in cropped) < 350
    assert fit_size(480, 640, 800, 1333) == (800, 1067) and fit_size(100, 400, 800, 1333) == (333, 1333)


# The network


def test_anchors_are_torchvisions_for_a_patch_of_16():
    maps = [torch.zeros(1, 1, 64 // 2**level, 96 // 2**level) for level in range(5)]
    images = ImageList(torch.zeros(1, 3, 256, 384), [(256, 384)])
    expected = _default_anchorgen()(images, maps)[0]
    assert torch.equal(Anchors([4, 8, 16, 32, 64])(images, maps)[0], expected)


def test_regions_are_read_where_they_lie_for_a_patch_of_14():
    """Maps that hold their own coordinates in px: the mean over a region is its centre, at every level."""
    height, width = 28 * 24, 28 * 32
    maps = {}
    for level, stride in enumerate((3.5, 7, 14, 28)):
        y, x = torch.meshgrid(torch.arange(height / stride), torch.arange(width / stride), indexing="ij")
        maps[str(level)] = torch.stack([x, y])[None] * stride
    boxes = torch.tensor(
        [[200.0, 90.0, 230.0, 110.0], [100.0, 200.0, 200.0, 300.0], [100, 100, 350, 300], [60, 60, 800, 600]]
    )
    read_there = _pool(7, 14)(maps, [boxes], [(height, width)]).mean((-2, -1))
    torch.testing.assert_close(read_there, (boxes[:, :2] + boxes[:, 2:]) / 2, atol=0.1, rtol=0)
    anchors = Anchors([3.5, 7, 14, 28, 56])(
        ImageList(torch.zeros(1, 3, height, width), [(height, width)]), [*maps.values(), torch.zeros(1, 1, 12, 16)]
    )[0]
    assert anchors[:, 2].max() < width + 56 * 16 and anchors[3 * 256 * 191 + 3 * 255 + 1].add(0).tolist() == [
        255 * 3.5 - 14,
        191 * 3.5 - 14,
        255 * 3.5 + 14,
        191 * 3.5 + 14,
    ]


def test_padding_is_to_whole_cells():
    batch = padded([torch.ones(3, 33, 20), torch.ones(3, 10, 70)], 32)
    assert batch.shape == (2, 3, 64, 96)
    assert batch[0].sum() == 3 * 33 * 20 and batch[1, :, :10, :70].min() == 1


def test_positions_norms_and_biases_are_not_decayed(backbone):
    detector = Detector(backbone, 2, True, width=8)
    names = {id(p): name for name, p in detector.named_parameters()}
    actual = [
        ([names[id(p)] for p in group["params"]], group["decayed"], group["rate"](0.5))
        for group in parameter_groups(detector, 5.0)
    ]
    decayed, spared = (
        [name for each, kind, _ in actual if kind is wanted for name in each] for wanted in (True, False)
    )
    rates = {name: rate for each, _, rate in actual for name in each}
    assert len(decayed) + len(spared) == len(names)
    assert all(rates[name] == (1.0 if name.startswith("backbone.") else 5.0) for name in names.values())
    assert all(name.endswith("weight") for name in decayed) and not any("norm" in name for name in decayed)
    assert {"backbone.vit.pos_embed", "backbone.vit.cls_token"} <= set(spared)
    frozen = Detector(backbone, 2, True, width=8, drop_path=0.5, freeze=True)
    assert not any(names.startswith("backbone") for names, p in frozen.named_parameters() if p.requires_grad)
    assert all(getattr(m, "drop_prob", 0) in (0, None) for m in frozen.modules())


# Training

SMALL = {"scale": 64, "batch_size": 2, "width": 16, "warmup": 4, "learning_rate": 3e-3}


@pytest.fixture(scope="module")
def taught(backbone):
    """Masks or not -> per_image of a detector that was trained, what it kept, its metrics before and after, and whether
    the backbone stayed as it was."""

    @cache
    def train_and_detect(masks):
        before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
        train, val = squares(20, masks), squares(10, masks, seed=1)
        kept = {}
        untrained = Detection(**SMALL, steps=0)
        trained = Detection(**SMALL, steps=80 if masks else 120, freeze=True)
        start = untrained.metrics(untrained(backbone, train, val, make_context()))
        per_image = trained(backbone, train, val, make_context(on_prediction=kept.__setitem__))
        same = all(torch.equal(backbone.state_dict()[name], tensor) for name, tensor in before.items())
        return per_image, kept, start, trained.metrics(per_image), same and not backbone.training

    return train_and_detect


@pytest.mark.parametrize("masks", [False, True])
def test_squares_are_detected(taught, masks):
    per_image, kept, start, metrics, unchanged = taught(masks)
    assert list(kept) == list(range(10)) and kept[3] == per_image["found"][3]
    assert {d["category_id"] for entries in per_image["found"] for d in entries} <= {3, 7}
    assert {d["image_id"] for d in kept[3]} == {103}
    assert all(len(entries) <= 100 for entries in per_image["found"])
    assert ("mask AP" in metrics) is masks
    assert metrics["box AP50"] > start["box AP50"] + 20
    assert unchanged


def test_boxes_of_other_images_teach_nothing(backbone, taught):
    """If the boxes of both sets are those of other images, there is nothing to learn from pixels."""
    train, val = squares(20, False), squares(10, False, seed=1)
    for data in (train, val):
        object.__setattr__(data, "targets", [*data.targets[3:], *data.targets[:3]])
    detection = Detection(**SMALL, steps=120, freeze=True)
    wrong = detection.metrics(detection(backbone, train, val, make_context()))["box AP50"]
    assert wrong < taught(False)[3]["box AP50"] / 4


def test_truth_is_what_the_file_says():
    data = squares(7, True)
    entries = coco_annotations(data, 6, False)
    assert [e["iscrowd"] for e in entries] == [1] * len(entries) and coco_annotations(data, 4, True) == []
    box = data.target(6).boxes[0]
    assert entries[0]["bbox"] == to_xywh(box) and entries[0]["category_id"] == (7, 3)[data.target(6).classes[0]]
    assert entries[0]["area"] == entries[0]["bbox"][2] * entries[0]["bbox"][3]


def test_scenes_follow_from_seed_and_step():
    data = squares(6, True)
    one, two = TrainingViews(data, 64, 5), TrainingViews(data, 64, 5)
    for position in (Draw(0, 3), Draw(2, 1)):
        (i, pixels, target), (j, again, same) = one[position], two[position]
        assert i == j and torch.equal(pixels, again) and all(torch.equal(target[k], same[k]) for k in target)
    assert not all(torch.equal(TrainingViews(data, 64, 6)[Draw(0, 3)][1], one[Draw(epoch, 3)][1]) for epoch in range(3))
    assert sorted(one[Draw(4, position)][0] for position in range(6)) == list(range(6))


@pytest.mark.parametrize("masks", [False, True])
def test_a_stopped_training_resumes_to_the_same_end(backbone, masks, tmp_path):
    train, val = squares(6, masks), squares(3, masks, seed=1)
    detection = Detection(**SMALL, steps=6, drop_path=0.2, accumulate=2 if masks else 1)
    straight = detection(backbone, train, val, make_context(folder=tmp_path / "straight"))
    reads = iter(range(10**6))
    train.source.on_read = lambda: os.kill(os.getpid(), signal.SIGTERM) if next(reads) == 5 else None
    with pytest.raises(UserError) as stopped:
        detection(backbone, train, val, make_context(folder=tmp_path / "stopped"))
    assert stopped.value.code == 75
    resumed = detection(backbone, train, val, make_context(folder=tmp_path / "stopped"))
    assert resumed == straight  # scores and boxes, bit for bit
    train.source.on_read = lambda: pytest.fail("what is done is not done again")
    assert detection(backbone, train, val, make_context(folder=tmp_path / "stopped")) == straight
    train.source.on_read = lambda: None
    ends = [
        (tmp_path / name / "checkpoints" / "step-00000006" / "objective.safetensors").read_bytes()
        for name in ("straight", "stopped")
    ]
    assert ends[0] == ends[1]
    with pytest.raises(UserError, match="other settings"):
        Detection(**SMALL, steps=6, drop_path=0.1, accumulate=2 if masks else 1)(
            backbone, train, val, make_context(folder=tmp_path / "stopped")
        )


@pytest.mark.parametrize("warmup", [0, 3, 500])
def test_the_learning_rate_falls_after_8_and_11_of_12_epochs(backbone, monkeypatch, warmup):
    taught = {}
    monkeypatch.setattr(
        "gtsa.training.supervised.train",
        lambda _, optimizer, *__, **settings: taught.update(settings, optimizer=optimizer),
    )
    Detection(scale=64, width=8, batch_size=2, warmup=warmup)(
        backbone, squares(8, False), squares(1, False), make_context()
    )
    assert taught["steps"] == 48
    rates = [taught["optimizer"].learning_rate(step / 48) for step in range(48)]
    warm = min(warmup, 5)
    rising = [5e-5 * step / (warm - 1) for step in range(warm)]
    assert rates == pytest.approx([*rising, *[5e-5] * (32 - warm), *[5e-6] * 12, *[5e-7] * 4], rel=1e-6)


def test_the_seed_decides_and_global_state_does_not(backbone):
    train, val = squares(4, False), squares(2, False, seed=1)
    detection = Detection(**SMALL, steps=2, freeze=True)
    torch.manual_seed(1)
    one = detection(backbone, train, val, make_context(seed=3))
    torch.manual_seed(2)
    assert detection(backbone, train, val, make_context(seed=3)) == one
    assert detection(backbone, train, val, make_context(seed=4)) != one


def test_images_without_anything_can_be_learnt_from(backbone):
    empty = squares(5, True).take([4])
    detection = Detection(**SMALL, steps=2)
    per_image = detection(backbone, empty, squares(1, True), make_context())
    assert len(per_image["truth"]) == 1


def test_half_precision_is_for_the_backbone_alone(backbone):
    """Boxes of a width of 800 px are known to a fraction of a pixel; in bf16 they would be known to 4 px."""
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    train, val = squares(4, True), squares(2, True, size=(512, 800))
    actual = Detection(**SMALL, steps=1)(backbone, train, val, EvalContext(fabric))["found"]
    edges = torch.tensor([d["bbox"][0] for entries in actual for d in entries], dtype=torch.float64)
    assert len(edges) > 100 and (edges % 1 != 0).double().mean() > 0.5


def test_masks_in_one_of_the_sets_alone_are_left_out(backbone):
    for train, val in ((True, False), (False, True)):
        detection = Detection(**SMALL, steps=1)
        metrics = detection.metrics(detection(backbone, squares(4, train), squares(2, val, seed=1), make_context()))
        assert "box AP" in metrics and "mask AP" not in metrics


@pytest.mark.parametrize(
    "wrong", [{"scale": 8}, {"epochs": 0}, {"steps": -1}, {"learning_rate": 0.0}, {"head_rate": 0.0}, {"batch_size": 0}]
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(UserError, match="detection"):
        Detection(**wrong)
