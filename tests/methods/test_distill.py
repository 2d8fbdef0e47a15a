"""Distillation against its formulas, written out slowly in float64; teachers of other kinds; and what a run does."""

import json
import math
import shutil

import numpy as np
import pytest
import timm
import torch
from torchvision.ops import roi_align

import gtsa
from conftest import TINY, final_weights, run, shared
from gtsa.core.errors import UserError
from gtsa.core.types import Crops, Views
from gtsa.methods.distill import Distill
from gtsa.models.backbone import IMAGENET, Backbone
from gtsa.models.export import write
from gtsa.models.weight_sources import read_weights
from gtsa.training import checkpoint

OWN = ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))  # a teacher's own normalisation


def backbone(patch=16, width=48, size=64, seed=0, normalisation=IMAGENET, **arguments):
    torch.manual_seed(seed)
    arguments = {"patch_size": patch, "embed_dim": width, "num_heads": 3, "depth": 2, **arguments}
    network = Backbone("vit_tiny_patch16_224", size, normalisation=normalisation, arguments=arguments)
    with torch.no_grad():
        for p in network.parameters():  # biases and norms too
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed + 1)))
    return network


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Exports of teachers: of the student's patch, and of another patch, width, image size and normalisation."""

    def make(folder):
        like = backbone(width=24, seed=5)
        like.pooling = "cls"
        write(like, folder / "like")
        write(backbone(patch=14, width=36, size=70, seed=6, normalisation=OWN), folder / "other")
        write(backbone(patch=16, width=24, seed=7, class_token=False), folder / "no_cls")
        tokens = {"depth": 2, "embed_dim": 48, "num_heads": 2}  # rotary positions, registers, a forward pass of its own
        write(Backbone("vit_small_patch16_dinov3", 64, arguments=tokens), folder / "dinov3")

    return shared(tmp_path_factory, "teachers", make)


def method(teacher, patch=16, **settings):
    return Distill(backbone(patch), str(teacher), **settings).double().eval()


def views(batch=2, globals_=2, locals_=2, sides=(64, 32), seed=1):
    draw = torch.Generator().manual_seed(seed)
    groups = []
    for count, side in ((globals_, sides[0]), (locals_, sides[1])):
        corner = 20 * torch.rand(batch, count, 2, generator=draw, dtype=torch.float64)
        extent = 40 + 20 * torch.rand(batch, count, 2, generator=draw, dtype=torch.float64)
        pixels = torch.randn(batch, count, 3, side, side, generator=draw, dtype=torch.float64)
        rotations = torch.randint(4, (batch, count), generator=draw)
        groups.append(Crops(pixels, torch.cat([corner, corner + extent], -1), rotations, torch.empty(0)))
    return Views.of([group for group in groups if group.count], torch.arange(batch))


def slow_distance(student, teacher):
    """Smooth L1 to the teacher's vector after its mean and deviation are taken out, number by number."""
    mean = sum(teacher) / len(teacher)
    deviation = math.sqrt(sum((t - mean) ** 2 for t in teacher) / len(teacher) + 1e-5)
    gaps = [abs(s - (t - mean) / deviation) for s, t in zip(student, teacher, strict=True)]
    return sum(gap**2 / 4 if gap < 2 else gap - 1 for gap in gaps) / len(gaps)


def slow_mean(student, teacher):
    pairs = zip(
        student.reshape(-1, student.shape[-1]).tolist(), teacher.reshape(-1, teacher.shape[-1]).tolist(), strict=True
    )
    return np.mean([slow_distance(*pair) for pair in pairs])


def linear(layer, x):
    return x @ layer.weight.detach().T + layer.bias.detach()


# The losses


def test_the_losses_by_hand(teachers):
    """Of a teacher of the student's own grid: patches and CLS tokens of the same crop; each size of crops counts alike."""
    distill, seen = method(teachers / "like"), views()
    teacher, patch, pooled = gtsa.load(teachers / "like").double(), [], []
    for crops in seen.groups:
        pixels = crops.pixels.flatten(0, 1)
        target, tokens = teacher(pixels), distill.encoder(pixels)
        patch.append(slow_mean(linear(distill.patch_head, tokens.patches.detach()), target.patches))
        pooled.append(slow_mean(linear(distill.pooled_head, tokens.prefix[:, 0].detach()), target.prefix[:, 0]))
    parts = distill(seen, 0.5)
    assert parts["patch"].item() == pytest.approx(np.mean(patch), rel=1e-9)
    assert parts["pooled"].item() == pytest.approx(np.mean(pooled), rel=1e-9)
    assert parts["loss"].item() == pytest.approx(np.mean(patch) + np.mean(pooled))
    weighted = method(teachers / "like", pooled_weight=0.5)(seen, 0.5)
    assert weighted["loss"].item() == pytest.approx(np.mean(patch) + 0.5 * np.mean(pooled))
    assert set(method(teachers / "like", pooled_weight=0.0)(views(locals_=0), 0.5)) == {"loss", "patch"}


def test_no_gradient_reaches_the_teacher_and_it_never_trains(teachers):
    distill = method(teachers / "like").train()
    distill(views(), 0.5)["loss"].backward()
    assert all(p.grad is None and not p.requires_grad for p in distill.teacher.parameters())
    assert not any(module.training for module in distill.teacher.modules())
    assert distill.patch_head.weight.grad.any() and distill.pooled_head.weight.grad.any()
    assert all(p.grad is not None for p in distill.student.parameters())


# Teachers of other kinds


def test_the_teacher_sees_its_own_normalisation_and_whole_patches(teachers, monkeypatch):
    """Crops of 64 px become 70 px, five patches of 14; crops of 32 px become 28 px."""
    distill, seen = method(teachers / "other"), views()
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in IMAGENET)
    own_mean, own_std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in OWN)
    inputs, plain = [], Backbone.side_by_side
    monkeypatch.setattr(Backbone, "side_by_side", lambda self, groups: inputs.extend(groups) or plain(self, groups))
    targets = distill.targets(seen.groups)
    for crops, pixels, side in zip(seen.groups, inputs, (70, 28), strict=True):
        raw = crops.pixels.flatten(0, 1) * std + mean
        resized = torch.nn.functional.interpolate(
            (raw - own_mean) / own_std, (side, side), mode="bilinear", antialias=True
        )
        torch.testing.assert_close(pixels, resized, rtol=1e-5, atol=1e-5)  # the normalisations are float32
    assert [(maps.shape, vectors.shape) for maps, vectors in targets] == [
        ((2, 2, 4, 4, 36), (4, 36)),
        ((2, 2, 2, 2, 36), (4, 36)),
    ]


def test_maps_of_another_grid_are_brought_to_the_students_by_roi_align(teachers):
    distill, seen = method(teachers / "other"), views()
    for crops, grid, side in zip(seen.groups, (4, 2), (5, 2), strict=True):
        pixels = distill._teachers_pixels(crops, 14)
        maps = distill.teacher["encoder"](pixels).patches
        assert maps.shape[1] == side
        whole = torch.tensor([[n, 0.0, 0, side, side] for n in range(4)], dtype=torch.float64)
        expected = roi_align(maps.permute(0, 3, 1, 2), whole, grid, aligned=True).permute(0, 2, 3, 1)
        ((target, _),) = distill.targets([crops])
        torch.testing.assert_close(target.flatten(0, 1), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "wanted", "pooling"),
    [
        ("like", "own", "cls"),  # as its export says
        ("like", "mean", "mean"),
        ("other", "own", "mean"),  # a run of gtsa that trained the mean
        ("other", "cls", "cls"),
        ("no_cls", "own", "mean"),
        ("dinov3", "cls", "cls"),
        ("random:vit_tiny_patch16_224", "own", "cls"),  # weights that do not say it
    ],
)
def test_the_pooled_feature(teachers, name, wanted, pooling):
    distill, seen = method(name if ":" in name else teachers / name, pooling=wanted), views(locals_=0)
    teacher = distill.teacher["encoder"]
    tokens = teacher(distill._teachers_pixels(seen.global_crops, teacher.patch_size))
    expected = tokens.prefix[:, 0] if pooling == "cls" else tokens.patches.mean((1, 2))
    torch.testing.assert_close(distill.targets(seen.groups)[0][1], expected)
    assert distill.encoder.pooling == pooling


def test_a_student_without_a_cls_token_predicts_the_teachers_from_its_mean(teachers):
    distill = Distill(backbone(class_token=False), str(teachers / "like")).double().eval()
    assert distill.encoder.pooling == "mean"
    assert method(teachers / "like", pooled_weight=0.0).encoder.pooling == "mean"  # CLS is not trained
    assert torch.isfinite(distill(views(), 0.5)["pooled"])


def test_the_students_first_weights_do_not_depend_on_the_teacher(teachers):
    heads = []
    for name in ("like", "no_cls"):
        torch.manual_seed(3)
        heads.append(Distill(backbone(), str(teachers / name)).patch_head.weight)
    assert torch.equal(*heads)


# What is refused


@pytest.mark.parametrize(
    ("teacher", "settings", "code", "words"),
    [
        ("no_cls", {"pooling": "cls"}, 2, "distill.pooling cls: .*no_cls has no CLS token; choose mean"),
        ("like", {"pooled_weight": -1.0}, 2, "must not be negative"),
        ("missing", {}, 4, "--distill.teacher: .*missing: no weights there"),
    ],
)
def test_wrong_settings_are_refused(teachers, teacher, settings, code, words):
    with pytest.raises(UserError, match=words) as error:
        method(teachers / teacher, **settings)
    assert error.value.code == code


def test_a_teacher_of_other_channels_is_refused(tmp_path):
    write(backbone(in_chans=4), tmp_path / "four")
    with pytest.raises(UserError, match="reads images of 4 channels, and the student of 3") as error:
        method(tmp_path / "four")
    assert error.value.code == 4


def test_a_teacher_of_another_range_of_16_bits_is_refused(tmp_path):
    teacher = backbone()
    teacher.range16 = (100, 4000)
    write(teacher, tmp_path / "range")
    with pytest.raises(UserError, match="with --range16 100 4000"):
        method(tmp_path / "range")


def test_a_file_that_does_not_name_its_model_is_refused(tmp_path):
    torch.save(backbone(width=60, patch=4).vit.state_dict(), tmp_path / "bare.pth")
    with pytest.raises(UserError, match="does not say which model it is .*'gtsa export --model NAME"):
        method(tmp_path / "bare.pth")


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        ((), 2, "distill.teacher: is missing; name weights"),
        (("--distill.teacher", "nowhere"), 4, "nowhere: no weights there"),
        (("--distill.teacher", "random:test_vit", "--distill.pooling", "max"), 2, "distill.pooling"),
    ],
)
def test_mistakes_show_before_an_image_is_read(tmp_path, flags, code, words):
    actual, _, err = run("pretrain", "--data", tmp_path, "--out", tmp_path / "run", "--method", "distill", *flags)
    assert actual == code and words in err
    assert not (tmp_path / "run").exists()


def test_overwriting_does_not_remove_the_teacher(tmp_path, scenes, finished):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    code, _, err = run(
        "pretrain",
        "--data",
        scenes,
        "--out",
        out,
        "--overwrite",
        "--method",
        "distill",
        "--distill.teacher",
        out / "exports" / "timm",
    )
    assert code == 8 and "--distill.teacher" in err
    assert (out / "exports" / "timm" / "config.json").exists()


# A run

SETTINGS = {key: value for key, value in TINY.items() if key != "gtsa"} | {"method": "distill", "seed": 3}


@pytest.fixture(scope="module")
def distilled(tmp_path_factory, scenes, finished):
    """A run whose teacher is another run; its output."""

    def make(out):
        file = out.with_suffix(".yaml")
        file.write_text(json.dumps(SETTINGS | {"distill": {"teacher": str(finished)}}))
        code, printed, err = run("pretrain", "--config", file, "--data", scenes, "--out", out)
        assert code == 0, err
        out.with_suffix(".txt").write_text(printed)

    return shared(tmp_path_factory, "distilled", make)


def test_a_run_tells_of_its_teacher_and_keeps_none_of_it(distilled, finished):
    printed = distilled.with_suffix(".txt").read_text()
    assert "teacher: " in printed and f"tensors loaded from {finished}" in printed
    assert "its pooled feature is the mean of the patches" in printed
    tensors, state = checkpoint.read(checkpoint.newest(distilled / "checkpoints")[0])
    assert not [name for name in tensors["objective"] if name.startswith("teacher")]
    assert state["given_weights"] == {"teacher": gtsa.load(finished).fingerprint}
    assert read_weights(str(distilled)).network == "student"
    card = (distilled / "exports" / "timm" / "README.md").read_text()
    assert "distilled from" in card and "Read the licence of these weights" in card


def test_the_export_is_the_student(distilled):
    model = timm.create_model(f"local-dir:{distilled}/exports/timm", pretrained=True).eval()
    student = gtsa.load(distilled)
    images = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(images), student.pooled(student(images)), rtol=1e-4, atol=1e-5)
    assert student.fingerprint == gtsa.load(distilled, network="student").fingerprint


def test_resume_notices_that_the_teacher_has_changed(distilled, scenes, finished, tmp_path):
    out, teacher = tmp_path / "run", tmp_path / "teacher"
    shutil.copytree(finished / "exports" / "timm", teacher)
    first = ["pretrain", "--data", scenes, "--out", out]
    (tmp_path / "run.yaml").write_text(json.dumps(SETTINGS | {"distill": {"teacher": str(teacher)}, "steps": 4}))
    assert run(*first, "--config", tmp_path / "run.yaml")[0] == 0
    before = final_weights(out)
    shutil.rmtree(teacher)
    write(gtsa.load(distilled), teacher)
    code, _, err = run("pretrain", "--out", out, "--resume", "--steps", 8)
    assert code == 4, err
    assert f"--distill.teacher {teacher}: its weights are not those that this run began with" in err
    assert final_weights(out) == before
    shutil.rmtree(teacher)
    code, _, err = run("report", out)
    assert code == 0, err
    page = (out / "report.html").read_text()
    assert "Pictures: the newest checkpoint cannot be opened (--distill.teacher" in page and "no weights there" in page


# Does it learn?


def test_a_student_comes_to_agree_with_its_teacher_on_images_it_has_not_seen(teachers):
    """Smooth images, so that features differ between them. The other halves of the test are in tests/long."""
    torch.manual_seed(0)
    distill = Distill(backbone(width=48, seed=9), str(teachers / "like"))
    optimizer = torch.optim.AdamW([p for p in distill.parameters() if p.requires_grad], 2e-3)

    def drawn(seed):
        noise = torch.randn(8, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
        pixels = torch.nn.functional.interpolate(noise, (64, 64), mode="bicubic")[:, None]
        return Views(
            Crops(
                pixels,
                torch.tensor([0.0, 0, 64, 64], dtype=torch.float64).expand(8, 1, 4),
                torch.zeros(8, 1, dtype=torch.int64),
                torch.empty(0),
            )
        )

    held_out = drawn(1000)
    before = distill.eval().diagnose(held_out)["teacher_score"].mean()
    distill.train()
    for step in range(80):
        optimizer.zero_grad()
        distill(drawn(step), step / 80)["loss"].backward()
        optimizer.step()
    after = distill.eval().diagnose(held_out)["teacher_score"].mean()
    assert before < 0.2 and after > 0.5


def test_the_score_by_hand(teachers):
    distill, seen = method(teachers / "like"), views(3, 2, 0)
    predicted = linear(
        distill.patch_head, distill.encoder(seen.global_crops.pixels.flatten(0, 1)).patches.detach()
    ).reshape(3, 2, 16, -1)
    ((target, _),) = distill.targets(seen.groups)
    target = torch.nn.functional.layer_norm(target, (24,)).reshape(3, 2, 16, -1)
    predicted, target = (each.float() - each.float().mean((0, 1, 2)) for each in (predicted, target))
    for image in range(3):
        gains = []
        for g in range(2):
            cosines = [
                torch.nn.functional.cosine_similarity(predicted[image, g], target[other, g], dim=-1).mean().item()
                for other in range(3)
            ]
            gains.append(cosines[image] - (sum(cosines) - cosines[image]) / 2)
        assert distill.diagnose(seen)["teacher_score"][image].item() == pytest.approx(np.mean(gains), abs=1e-5)
