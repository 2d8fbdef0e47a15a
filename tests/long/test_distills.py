"""Does a student of another width and depth take over what its teacher knows, on images that neither was trained on?"""

import numpy as np
import pytest
import torch

import gtsa
from gtsa.data.sources import open_source
from gtsa.pretraining.requested import SAMPLE

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("users_samples")]

SIDE = 96
COMMON = {
    "batch_size": 16,
    "hold_out": 8,
    "learning_rate": 1.5e-3,
    "evaluate_every": 200,
    "checkpoint_every": 200,
    "report": False,
    "views": {"global_crops_size": SIDE, "local_crops_size": 48, "local_crops_number": 4},
}
HELD_OUT = 8


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A teacher that was trained with GTSA, and its student, a narrower network with larger patches."""
    folder = tmp_path_factory.mktemp("distilled")
    small = {"projector_dim": 64, "out_dim": 64, "predictor_dim": 64, "momentum": 0.99}
    data = str(SAMPLE / "images")
    gtsa.pretrain(data, out=str(folder / "teacher"), model="test_vit", steps=300, gtsa=small, **COMMON)
    student = {"model": "vit_tiny_patch16_224", "steps": 300, "method": "distill"}
    done = gtsa.pretrain(
        data, out=str(folder / "student"), distill={"teacher": str(folder / "teacher")}, **student, **COMMON
    )
    return folder, done


@torch.no_grad()
def patches(network):
    """Centred unit vectors of the patches of all images, by image."""
    source = open_source(str(SAMPLE / "images"))
    pixels = torch.stack([network.transform(source.read(i), SIDE) for i in range(len(source))])
    features = network.eval()(pixels).patches.flatten(1, 2)
    return features - features.mean((0, 1))


def agreement(a, b, k=5):
    """Share of the k nearest patches of other images that two networks have in common."""
    neighbours = []
    for features in (a, b):
        unit = torch.nn.functional.normalize(features.flatten(0, 1), dim=-1)
        similarity = unit @ unit.T
        image = torch.arange(len(features)).repeat_interleave(features.shape[1])
        similarity[image[:, None] == image] = -1
        neighbours.append(similarity.topk(k).indices.tolist())
    return np.mean([len(set(x) & set(y)) / k for x, y in zip(*neighbours, strict=True)])


def explained(student, teacher, held_out):
    """R2 on held-out images of the teacher's patches from the student's, by ridge regression on the others."""
    train, test = (
        (each[~held_out].flatten(0, 1) for each in (student, teacher)),
        (each[held_out].flatten(0, 1) for each in (student, teacher)),
    )
    (x, y), (u, v) = train, test
    weights = torch.linalg.solve(x.T @ x + 1e-2 * len(x) * x.var() * torch.eye(x.shape[1]), x.T @ y)
    return 1 - ((u @ weights - v) ** 2).sum().item() / ((v - y.mean(0)) ** 2).sum().item()
