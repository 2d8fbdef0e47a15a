"""Does a student of another width and depth take over its teacher's features, on images that it has not seen?"""

import shutil

import numpy as np
import pytest
import torch

import gtsa
from gtsa.pretraining.requested import SAMPLE
from gtsa.training import checkpoint

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("users_samples")]

SIDE = 96
HELD_OUT = 8
COMMON = {
    "steps": 300,
    "batch_size": 16,
    "hold_out": 0,
    "learning_rate": 1.5e-3,
    "evaluate_every": 300,
    "checkpoint_every": 300,
    "report": False,
    "views": {"global_crops_size": SIDE, "local_crops_size": 48, "local_crops_number": 4},
}


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """A teacher that GTSA trained, its student after 0 and 300 steps, and the student's layer to the teacher's width."""
    folder = tmp_path_factory.mktemp("distilled")
    (folder / "images").mkdir()
    for path in images()[HELD_OUT:]:
        shutil.copy(path, folder / "images")
    small = {"projector_dim": 64, "out_dim": 64, "predictor_dim": 64, "momentum": 0.99}
    gtsa.pretrain(str(folder / "images"), out=str(folder / "teacher"), model="test_vit", gtsa=small, **COMMON)
    done = gtsa.pretrain(
        str(folder / "images"), out=str(folder / "student"), model="test_vit3", method="distill",
        distill={"teacher": str(folder / "teacher")}, **COMMON,
    )  # fmt: skip
    tensors, _ = checkpoint.read(checkpoint.newest(folder / "student" / "checkpoints")[0])
    assert done.verdict.label == "learning"
    assert done.verdict.metrics["teacher_gain_low"] > 0.5
    teacher, student = (gtsa.load(folder / name) for name in ("teacher", "student"))
    return teacher, student, gtsa.load("random:test_vit3"), tensors["objective"]["patch_head.weight"].float()


def images():
    return sorted((SAMPLE / "images").iterdir())


@torch.no_grad()
def patches(network, paths):
    """Patches [images, h * w, D], without their mean."""
    features = network(torch.stack([network.transform(path, SIDE) for path in paths])).patches.flatten(1, 2)
    return features - features.mean((0, 1))


def shared_neighbours(a, b, k=5):
    """Share of the k most similar patches of other images that two networks have in common, for each patch."""
    neighbours = []
    for features in (a, b):
        unit = torch.nn.functional.normalize(features.flatten(0, 1), dim=-1)
        similarity = unit @ unit.T
        image = torch.arange(len(features)).repeat_interleave(features.shape[1])
        similarity[image[:, None] == image] = -2
        neighbours.append(similarity.topk(k).indices.tolist())
    return np.mean([len({*x} & {*y}) / k for x, y in zip(*neighbours, strict=True)])


def explained(student, teacher, paths, held_out):
    """R2 on held-out images of the teacher's patches from those of a student, by ridge regression on other images."""
    x, y = (patches(network, paths).flatten(0, 1) for network in (student, teacher))
    u, v = (patches(network, held_out).flatten(0, 1) for network in (student, teacher))
    ridge = 1e-2 * len(x) * x.var() * torch.eye(x.shape[1])
    predicted = u @ torch.linalg.solve(x.T @ x + ridge, x.T @ y)
    return 1 - float((predicted - v).square().sum() / v.square().sum())


def test_the_teachers_patches_follow_from_the_students(networks):
    teacher, student, untrained, _ = networks
    held_out, others = images()[:HELD_OUT], images()[HELD_OUT:]
    after, before = (explained(each, teacher, others, held_out) for each in (student, untrained))
    assert after > 0.9
    assert 1 - after < 0.5 * (1 - before)


def test_the_same_patches_are_similar(networks):
    teacher, student, untrained, weight = networks
    of_teacher, of_student, of_untrained = (
        patches(each, images()[:HELD_OUT]) for each in (teacher, student, untrained)
    )
    assert shared_neighbours(of_teacher, of_student @ weight.T) > shared_neighbours(of_teacher, of_untrained) + 0.05
    cosine = torch.nn.functional.cosine_similarity(
        of_student @ weight.T, torch.nn.functional.layer_norm(of_teacher, of_teacher.shape[-1:]), dim=-1
    )
    assert cosine.mean() > 0.85
