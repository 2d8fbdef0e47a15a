"""The method, against plain loops over images and pairs written from METHOD.md with torchvision and rot90."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torchvision.ops import roi_align

from gtsa.core.types import Crops, Views
from gtsa.data import augment
from gtsa.data.multicrop import MultiCrop
from gtsa.methods import load_all
from gtsa.methods.gtsa import GTSA
from gtsa.methods.parts.geometry import patch_centres, regions
from gtsa.models.backbone import Backbone

SIZES = (48, 24)  # px of global and local crops: 6 x 6 and 3 x 3 tokens
CELLS, MATCHES = (4, 2), (18, 4)  # round(0.7 g), floor(g g / 2)
POOLED = ((4, 5, 7), (2, 4, 5))  # cells of all tests, for views of either size
few = settings(deadline=None, max_examples=12)
counts = st.sampled_from([(1, 1), (1, 3), (2, 0), (2, 1), (2, 3), (3, 0), (3, 2)])
seeds = st.integers(0, 2**32)


def the_method(seed=0, drop_path=0.0, **options):
    torch.manual_seed(seed)
    arguments = {"depth": 2, "embed_dim": 24, "num_heads": 2}
    encoder = Backbone("vit_small_patch8_224", SIZES[0], drop_path=drop_path, arguments=arguments)
    method = GTSA(encoder, **{"projector_dim": 24, "out_dim": 12, "predictor_dim": 10, **options}).double()
    for parameter in method.teacher.parameters():  # no copy, so that it shows whose map is whose
        parameter.add_(torch.randn_like(parameter), alpha=0.05)
    for head in (method.student.projector, method.predictor):
        for parameter in head.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return method


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """So small a model is done sooner by one thread than shared out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def method():
    """One for the tests that leave it as it is."""
    return the_method()


def the_views(globals_, locals_, seed=0, images=2):
    """Random pixels where MultiCrop would cut them, and where rounding cannot add a sample to RoIAlign."""
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    multicrop = MultiCrop(globals_, locals_)
    boxes = []
    while len(boxes) < images:
        drawn = multicrop.boxes(640, 480, rng)
        if not rounding_may_show(*drawn):
            boxes.append(drawn)
    groups = []
    for size, n in enumerate((globals_, locals_)):
        if n:
            groups.append(
                Crops(
                    torch.randn(images, n, 3, SIZES[size], SIZES[size], dtype=torch.float64, generator=generator),
                    torch.tensor([b[size] for b in boxes], dtype=torch.float64),
                    torch.randint(4, (images, n), generator=generator),
                    torch.zeros(images, n, 7),
                )
            )
    return Views.of(groups)


def rounding_may_show(globals_, locals_):
    """Is an overlap, in map cells, a whole multiple of any number of pooled cells used here?"""
    for view, size in [(box, 0) for box in globals_] + [(box, 1) for box in locals_]:
        for seen in (box for box in globals_ if box is not view):
            x1, y1, x2, y2 = the_overlap(view, seen)
            for crop, grid in ((view, SIZES[size] / 8), (seen, SIZES[0] / 8)):
                extents = (x2 - x1) / (crop[2] - crop[0]) * grid, (y2 - y1) / (crop[3] - crop[1]) * grid
                if any(e / c > 0.5 and abs(e / c - round(e / c)) < 1e-9 for e in extents for c in POOLED[size]):
                    return True
    return False


# The loss as METHOD.md says it, one pair after the other


def the_overlap(a, b):
    return [max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])]


def in_frame(box, crop, side, rotations):
    """A box of the image in the pixels of a crop, after the crop's rotation (sections 2 and 3)."""
    x1, y1, x2, y2 = ((v - crop[i % 2]) * side / (crop[2 + i % 2] - crop[i % 2]) for i, v in enumerate(box))
    return {
        0: (x1, y1, x2, y2),
        1: (y1, side - x2, y2, side - x1),
        2: (side - x2, side - y2, side - x1, side - y1),
        3: (side - y2, x1, side - y1, x2),
    }[rotations]


def aligned(maps, box, cells):
    """RoIAlign of a map [g, g, C] inside a box in units of its cells."""
    boxes = torch.tensor([box], dtype=torch.float64)
    return roi_align(maps.permute(2, 0, 1)[None], [boxes], cells, sampling_ratio=-1, aligned=True)[0].permute(1, 2, 0)


def cosines(a, b):
    return (a * b).sum(-1) / a.pow(2).sum(-1).sqrt() / b.pow(2).sum(-1).sqrt()


def views_of(views, b):
    """Every view of image b: its size, its position, pixels, box and turns."""
    for size, crops in enumerate(views.groups):
        for v in range(crops.count):
            box, rotations = crops.boxes[b, v].tolist(), int(crops.rotations[b, v])
            yield SimpleNamespace(
                size=size, v=v, pixels=crops.pixels[b, v], box=box, rotations=rotations, side=crops.side
            )


def region_of_pair(mine, reference, view, seen, cells):
    common = the_overlap(view.box, seen.box)
    pooled = []
    for maps, crop in ((mine, view), (reference, seen)):
        scale = len(maps) / crop.side
        pooled.append(aligned(maps, [scale * x for x in in_frame(common, crop.box, crop.side, crop.rotations)], cells))
    target = torch.rot90(pooled[1], view.rotations - seen.rotations, (0, 1))
    return -cosines(pooled[0], target).mean()


def patch_of_pair(mine, reference, matches):
    students, teachers = mine.flatten(0, 1), reference.flatten(0, 1)
    table = torch.stack([cosines(students[i], teachers) for i in range(len(students))])
    kept = [t.amax(1).sort(descending=True).values[:matches].mean() for t in (table, table.T)]
    return -(kept[0] + kept[1]) / 2


def maps_of(method, view):
    """The student's map, its rotation logits, and the teacher's map of one crop."""
    patches = method.student.encoder(view.pixels[None]).patches
    mine = method.predictor(method.student.projector(patches))[0]
    logits = None if method.rotation_head is None else method.rotation_head(patches.flatten(1, 2).mean(1))[0]
    return mine, logits, method.teacher.projector(method.teacher.encoder(view.pixels[None]).patches)[0].detach()


def slow_losses(method, views, cells=CELLS, matches=MATCHES):
    """Lists over images of the region losses, patch losses and rotation losses."""
    images = len(views.global_crops.rotations)
    maps_of_views = [[(view, *maps_of(method, view)) for view in views_of(views, b)] for b in range(images)]
    region, patch, rotation = ([[] for _ in range(images)] for _ in range(3))
    for b in range(images):
        for view, mine, logits, _ in maps_of_views[b]:
            for seen, *_, reference in maps_of_views[b]:
                if seen.size == 0 and (view.size, view.v) != (0, seen.v):
                    region[b].append(region_of_pair(mine, reference, view, seen, cells[view.size]))
                    patch[b].append(patch_of_pair(mine, reference, matches[view.size]))
            if logits is not None:
                rotation[b].append(logits.exp().sum().log() - logits[view.rotations])
    return region, patch, rotation


def mean(lists):
    return torch.stack([value for inner in lists for value in inner]).mean()


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@few
@given(counts, seeds)
def test_losses_are_the_plain_loops(method, count, seed):
    views = the_views(*count, seed)
    parts = method(views, 1.0)
    region, patch, rotation = map(mean, slow_losses(method, views))
    close(parts["region"], region)
    close(parts["patch"], patch)
    close(parts["rotation"], rotation)
    close(parts["loss"], region + 0.5 * patch + 0.5 * rotation)


@settings(deadline=None, max_examples=5)
@given(counts, seeds)
def test_gradients_are_those_of_the_plain_loops(method, count, seed):
    views = the_views(*count, seed)
    trained = [p for p in method.parameters() if p.requires_grad]
    region, patch, rotation = map(mean, slow_losses(method, views))
    ours = torch.autograd.grad(method(views, 1.0)["loss"], trained, allow_unused=True)
    reference = torch.autograd.grad(region + 0.5 * patch + 0.5 * rotation, trained, allow_unused=True)
    for a, b in zip(ours, reference, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert (a - b).abs().max() <= 1e-9 * (1 + b.abs().max())


@pytest.mark.parametrize(("cells", "matches"), [((5, 2), (7, 2)), ((7, 5), (1, 1)), ((4, 4), (36, 9))])
def test_cells_and_matches_can_be_set(cells, matches):
    method, views = the_method(cells=cells, matches=matches), the_views(2, 2, 1)
    parts = method(views, 1.0)
    region, patch, _ = slow_losses(method, views, cells, matches)
    close(parts["region"], mean(region))
    close(parts["patch"], mean(patch))


def test_published_pairs_are_eighteen(method):
    region, patch, rotation = slow_losses(method, the_views(2, 8, images=1))
    assert (len(region[0]), len(patch[0]), len(rotation[0])) == (18, 18, 10)


@pytest.mark.parametrize(("grid", "cells", "matches"), [(14, 10, 98), (6, 4, 18), (16, 11, 128), (7, 5, 24), (1, 1, 1)])
def test_cells_and_matches_follow_the_grid(grid, cells, matches, monkeypatch):
    method, requested = the_method(), []
    crops = Crops(
        torch.zeros(1, 1, 3, 8 * grid, 8 * grid), torch.tensor([[[0.0, 0, 9, 9]]]), torch.zeros(1, 1).long(), None
    )
    maps = torch.randn(1, 1, grid, grid, 5)
    assert method.pooled(maps, maps, crops, crops, 1)[0].shape[3:5] == (cells, cells)
    monkeypatch.setattr(
        "gtsa.methods.parts.losses.patch_correspondence", lambda *a: requested.append(a[-1]) or torch.zeros(1, 1, 1)
    )
    method.patch_loss(maps, maps, 1)
    assert requested == [matches]


def test_global_target_is_the_mean_of_whole_maps():
    method, views = the_method(region_target="global"), the_views(2, 2, 3)
    expected = []
    for b in range(2):
        maps_of_views = [(view, *maps_of(method, view)) for view in views_of(views, b)]
        for view, mine, *_ in maps_of_views:
            for seen, *_, reference in maps_of_views:
                if seen.size == 0 and (view.size, view.v) != (0, seen.v):
                    expected.append(-cosines(mine.mean((0, 1)), reference.mean((0, 1))))
    close(method(views, 1.0)["region"], torch.stack(expected).mean())


@pytest.mark.parametrize(
    ("options", "gone", "weights"),
    [
        ({"rotation_weight": 0}, {"rotation", "rotation_accuracy"}, (1, 0.5, 0)),
        ({"patch_weight": 0}, {"patch"}, (1, 0, 0.5)),
        ({"region_weight": 0}, set(), (0, 0.5, 0.5)),
        ({"region_weight": 2, "patch_weight": 3, "rotation_weight": 4}, set(), (2, 3, 4)),
        ({"patch_weight": 0, "rotation_weight": 0}, {"patch", "rotation", "rotation_accuracy"}, (1, 0, 0)),
    ],
)
def test_losses_can_be_weighed_and_left_out(options, gone, weights):
    method, views = the_method(**options), the_views(2, 1)
    parts = method(views, 1.0)
    assert set(parts) == {"loss", "region", "patch", "rotation", "rotation_accuracy"} - gone
    assert (method.rotation_head is None) == ("rotation" in gone)
    names = ("region", "patch", "rotation")
    close(parts["loss"], sum(w * parts[n] for n, w in zip(names, weights, strict=True) if n in parts))


def test_patch_loss_starts_at_the_given_time(method):
    views = the_views(2, 1)
    for time, on in ((0.0, False), (0.1099, False), (0.11, True), (1.0, True)):
        assert ("patch" in method(views, time)) == on
    assert "patch" in the_method(patch_start=0.0)(views, 0.0)


def test_rotation_accuracy_is_the_share_of_rotations_named():
    method, views = the_method(), the_views(2, 3)
    right = [int(maps_of(method, view)[1].argmax()) == view.rotations for b in range(2) for view in views_of(views, b)]
    assert method(views, 1.0)["rotation_accuracy"].item() == pytest.approx(np.mean(right))
    with torch.no_grad():
        method.rotation_head[-1].bias.copy_(torch.tensor([0, 0, 1e3, 0]))
    for crops in views.groups:
        crops.rotations.fill_(2)
    assert method(views, 1.0)["rotation_accuracy"] == 1


@few
@given(st.integers(1, 4), st.integers(0, 5), st.integers(1, 3), seeds)
def test_any_number_of_crops_gives_finite_losses(method, globals_, locals_, images, seed):
    assume(globals_ + locals_ > 1)
    parts = method(the_views(globals_, locals_, seed, images), 1.0)
    assert all(value.ndim == 0 and value.isfinite() for value in parts.values())


def test_losses_are_means_over_the_batch(method):
    views = the_views(2, 2, images=4)
    parts = method(views, 1.0)
    singles = [method(views.each(lambda crops, i=i: crops.each(lambda t: t[i : i + 1])), 1.0) for i in range(4)]
    for name, value in parts.items():
        close(value, torch.stack([single[name] for single in singles]).mean())


def test_local_crops_may_be_of_one_patch(method):
    views = the_views(2, 1)
    local = views.local_crops
    small = Crops(local.pixels[..., :8, :8], local.boxes, local.rotations, local.colours)
    assert all(value.isfinite() for value in method(Views(views.global_crops, small), 1.0).values())


# Who learns


def test_gradients_reach_the_student_and_no_teacher():
    method = the_method()
    method(the_views(2, 2), 1.0)["loss"].backward()
    for part in (method.student.encoder, method.student.projector, method.predictor, method.rotation_head):
        for name, parameter in part.named_parameters():
            if name != "vit.norm.bias" or parameter.grad is not None:
                assert parameter.grad is not None, name
                assert parameter.grad.isfinite().all()
    assert sum(p.grad.abs().sum() > 0 for p in method.student.parameters()) > 20
    assert all(p.grad is None and not p.requires_grad for p in method.teacher.parameters())
    assert not method.teacher_maps(the_views(2, 0).global_crops).requires_grad


@pytest.mark.parametrize("kept", ["region_weight", "patch_weight", "rotation_weight"])
def test_every_loss_alone_teaches_the_encoder(kept):
    weights = {name: float(name == kept) for name in ("region_weight", "patch_weight", "rotation_weight")}
    method = the_method(**weights)
    method(the_views(2, 1), 1.0)["loss"].backward()
    assert method.student.encoder.vit.patch_embed.proj.weight.grad.abs().max() > 0
    head = method.predictor.proj.weight.grad
    assert (head is None or not head.any()) == (kept == "rotation_weight")


def test_the_teacher_starts_as_a_copy_and_follows_by_the_schedule():
    torch.manual_seed(0)
    encoder = Backbone("vit_small_patch8_224", 48, arguments={"depth": 1, "embed_dim": 24, "num_heads": 2})
    method = GTSA(encoder, 8, 8, 8, momentum=0.9).double()
    vector = torch.nn.utils.parameters_to_vector
    assert torch.equal(vector(method.teacher.parameters()), vector(method.student.parameters()))
    with torch.no_grad():
        for parameter in method.student.parameters():
            parameter.add_(1)
    start = vector(method.teacher.parameters()).clone()
    method.after_step(0.4, 0.5, torch.tensor(0.0))
    assert torch.equal(vector(method.teacher.parameters()), start)
    method.after_step(0.4, 0.5, torch.tensor(1.0))
    momentum = 1 - 0.1 * (1 + math.cos(math.pi / 2)) / 2
    torch.testing.assert_close(vector(method.teacher.parameters()), start + (1 - momentum), rtol=1e-6, atol=1e-8)
    moved = vector(method.teacher.parameters()).clone()
    method.after_step(0.9, 1.0, torch.tensor(1.0))
    assert torch.equal(vector(method.teacher.parameters()), moved)


def test_the_teacher_stays_in_evaluation_mode():
    method, views = the_method(drop_path=0.5), the_views(2, 0)
    method.train()
    assert not any(module.training for module in method.teacher.modules())
    assert method.student.encoder.vit.training
    maps = [method.teacher_maps(views.global_crops) for _ in range(2)]
    assert torch.equal(*maps)
    student = [method.student_maps(views.global_crops)[0] for _ in range(4)]
    assert not all(torch.equal(student[0], other) for other in student[1:])
    method.eval()
    assert not any(module.training for module in method.modules())


def test_encoders_are_the_two(method):
    assert dict(method.encoders) == {"teacher": method.teacher.encoder, "student": method.student.encoder}
    assert load_all()["gtsa"] is GTSA


# Geometry, seen in pictures


@few
@given(st.integers(0, 10**6), st.integers(200, 500), st.integers(200, 500))
def test_regions_show_the_same_part_of_a_picture(seed, width, height):
    """Red rises to the right and green downwards: the mean colour of a region tells where in the image it is."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    picture = torch.stack([x * 255 // width, y * 255 // height, x * 0]).to(torch.uint8)
    views = MultiCrop(2, 2, 128, 64)(picture, np.random.default_rng(seed))
    views = augment.apply(views, torch.device("cpu"), (0.0,) * 3, (1.0,) * 3, colour=False)
    seen = views.global_crops
    for view in views.groups:
        mine, reference = regions(view, seen)
        assert (mine.shape, reference.shape) == ((1, view.count, 2, 4), (1, 2, view.count, 4))
        for v in range(view.count):
            for g in range(2):
                a = colour_inside(view.pixels[0, v], mine[0, v, g])
                b = colour_inside(seen.pixels[0, g], reference[0, g, v])
                assert (a - b).abs().max() < 0.03


def colour_inside(pixels, box):
    return roi_align(pixels[None].double(), [box[None].double()], 1, aligned=True)[0, :, 0, 0]


def test_regions_of_a_crop_with_itself_are_all_of_it():
    crops = the_views(3, 0).global_crops
    mine, reference = regions(crops, crops)
    for v in range(3):
        for boxes in (mine, reference):
            torch.testing.assert_close(boxes[:, v, v], torch.tensor([[0.0, 0, 48, 48]] * 2, dtype=torch.float64))


# Label-free metrics


def slow_scores(method, views, b):
    """Region score and patch score of image b, one pair and one patch after the other."""
    images = len(views.global_crops.rotations)
    maps_of_views = [[(view, *maps_of(method, view)) for view in views_of(views, i)] for i in range(images)]
    common = {  # the mean vector of the student's maps of either size, and of the teacher's
        size: torch.stack(
            [mine.mean((0, 1)) for row in maps_of_views for view, mine, *_ in row if view.size == size]
        ).mean(0)
        for size in range(len(views.groups))
    }
    reference_mean = torch.stack(
        [t.mean((0, 1)) for row in maps_of_views for view, *_, t in row if view.size == 0]
    ).mean(0)
    region, patch = [], []
    for view, mine, *_ in maps_of_views[b]:
        for position, (seen, *_) in enumerate(maps_of_views[b]):
            if seen.size or (view.size, view.v) == (0, seen.v):
                continue
            centred = mine - common[view.size]
            scores = [
                -region_of_pair(
                    centred, maps_of_views[(b - i) % images][position][3] - reference_mean, view, seen, CELLS[view.size]
                )
                for i in range(images)
            ]
            region.append(scores[0] - torch.stack(scores[1:]).mean())
            patch.append(nearness(centred, maps_of_views[b][position][3] - reference_mean, view, seen))
    return torch.stack(region).mean(), float(np.mean(patch))


def where(view, row, column, grid):
    """The centre of a patch in the image: turned back by going round the crop's centre, quarter by quarter."""
    x, y = (column + 0.5) / grid - 0.5, (row + 0.5) / grid - 0.5
    for _ in range(view.rotations):
        x, y = -y, x  # a quarter-turn clockwise, y down
    x1, y1, x2, y2 = view.box
    return (x1 + (x + 0.5) * (x2 - x1), y1 + (y + 0.5) * (y2 - y1))


def nearness(mine, reference, view, seen):
    matched, chance = 0.0, 0.0
    for row in range(len(mine)):
        for column in range(len(mine)):
            here = where(view, row, column, len(mine))
            if not (seen.box[0] <= here[0] <= seen.box[2] and seen.box[1] <= here[1] <= seen.box[3]):
                continue
            likeness = cosines(mine[row, column], reference)
            far = [
                [math.dist(here, where(seen, r, c, len(reference))) for c in range(len(reference))]
                for r in range(len(reference))
            ]
            matched += far[int(likeness.argmax()) // len(reference)][int(likeness.argmax()) % len(reference)]
            chance += np.mean(far)
    return 1 - matched / chance if chance else 0.0


def test_diagnosis_is_that_of_the_plain_loops(method):
    views = the_views(2, 1, images=3)
    metrics = method.diagnose(views)
    for b in range(3):
        region, patch = slow_scores(method, views, b)
        assert metrics["region_score"][b].item() == pytest.approx(region.item(), abs=1e-6)
        assert metrics["patch_score"][b].item() == pytest.approx(patch, abs=1e-6)
    right = [[int(maps_of(method, v)[1].argmax()) == v.rotations for v in views_of(views, b)] for b in range(3)]
    assert metrics["rotation_accuracy"].tolist() == pytest.approx([np.mean(r) for r in right])


def test_a_common_vector_counts_for_nothing_and_hides_nothing(method, monkeypatch):
    """However large the vector that all maps share, the metrics are the same; with it alone they are zero."""
    views = the_views(2, 2, images=3)
    expected = method.diagnose(views)
    teacher, student = method.teacher_maps, method.student_maps
    monkeypatch.setattr(method, "teacher_maps", lambda crops: teacher(crops) + 50)
    monkeypatch.setattr(method, "student_maps", lambda crops: (student(crops)[0] + 50, student(crops)[1]))
    for name, values in method.diagnose(views).items():
        close(values, expected[name])
    monkeypatch.setattr(method, "student_maps", lambda crops: (0 * student(crops)[0] + 50, student(crops)[1]))
    assert method.diagnose(views)["region_score"].abs().max() < 1e-6


def test_maps_that_say_where_they_are_score_fully(method, monkeypatch):
    """Maps that hold each patch's position in its image, and the image's number: every match is the nearest patch."""
    views = the_views(2, 0, images=3)

    def record_maps(crops):
        at = patch_centres(crops.boxes, crops.rotations, crops.side, 6)  # [B, V, 36, 2]
        angle = at / 640 * (2 * math.pi)
        code = torch.cat([angle.cos(), angle.sin()], -1).unflatten(2, (6, 6))
        image = 3 * torch.eye(3, dtype=torch.float64)[:, None, None, None].expand(*code.shape[:-1], 3)
        return torch.cat([code, image], -1)

    monkeypatch.setattr(method, "teacher_maps", record_maps)
    monkeypatch.setattr(method, "student_maps", lambda crops: (record_maps(crops), None))
    metrics = method.diagnose(views)
    assert metrics["region_score"].min() > 1
    assert metrics["patch_score"].min() > 0.8


def test_diagnosis_of_one_image_and_without_rotation():
    metrics = the_method(rotation_weight=0).diagnose(the_views(2, 1, images=1))
    assert set(metrics) == {"region_score", "patch_score"}
    assert all(value.shape == (1,) and not value.requires_grad for value in metrics.values())
