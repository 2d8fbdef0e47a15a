"""What many tests need: a small folder of scenes, a small model, and the command line as a user runs it."""

import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

TINY = {
    "model": "vit_tiny_patch16_224",
    "steps": 12,
    "batch_size": 4,
    "hold_out": 3,
    "checkpoint_every": 4,
    "evaluate_every": 6,
    "log_every": 2,
    "views": {"global_size": 64, "local_size": 32, "local_crops": 2},
    "gtsa": {"projector_dim": 16, "out_dim": 24, "predictor_dim": 16},
}


def scene(seed, width=96, height=72):
    """Blobs and lines on a gradient: something to see everywhere, different for every seed."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    image = np.stack([x / width, y / height, (x + y) / (width + height)], -1) * 255 * rng.random(3)
    for _ in range(8):
        cx, cy, r = rng.integers(0, width), rng.integers(0, height), rng.integers(4, 16)
        image[(x - cx) ** 2 + (y - cy) ** 2 < r * r] = rng.integers(0, 255, 3)
    return Image.fromarray(image.astype(np.uint8))


def make_scenes(folder, count=14):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        scene(i).save(folder / f"scene_{i:02d}.{'png' if i % 2 else 'jpg'}")
    return folder


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    return make_scenes(tmp_path_factory.mktemp("data") / "scenes")


@pytest.fixture(scope="session")
def tiny_yaml(tmp_path_factory):
    """TINY as a file for --config."""
    from ruamel.yaml import YAML

    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    with open(path, "w") as file:
        YAML().dump(TINY, file)
    return path


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


def start(*arguments, **options):
    """The command line in a process of its own."""
    command = [sys.executable, "-m", "gtsa", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def run(*arguments, **options):
    """(exit code, standard output, standard error) of the command line."""
    process = start(*arguments, **options)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def final_weights(folder):
    """The bytes of all tensors of the newest checkpoint, by file."""
    place = max((folder / "checkpoints").glob("step-*"))
    return {file.name: file.read_bytes() for file in place.glob("*.safetensors")}
