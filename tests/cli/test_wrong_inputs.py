"""Wrong inputs of all commands: an exit code, and a first line that says what is wrong. Nothing is trained or written."""

import json

import numpy as np
import pytest
from PIL import Image

from conftest import make_scenes
from gtsa.cli.main import run

W = "random:test_vit"


@pytest.fixture(autouse=True)
def _nothing_is_trained(monkeypatch):
    for name in ("gtsa.training.trainer.fit", "gtsa.core.stops.Processes.run"):
        monkeypatch.setattr(name, lambda *_, **__: pytest.fail("something is trained"))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with images, class folders, masks, and files that are none of what they seem."""
    folder = tmp_path_factory.mktemp("wrong")
    make_scenes(folder / "scenes", 6)
    for kind, seeds in (("a", (0, 1)), ("b", (2, 3))):
        make_scenes(folder / "classes" / kind, 0)
        for seed in seeds:
            Image.fromarray(np.full((32, 32, 3), 60 * seed, np.uint8)).save(folder / "classes" / kind / f"{seed}.png")
    (folder / "masks").mkdir()
    for image in (folder / "scenes").iterdir():
        Image.fromarray(np.eye(72, 96, dtype=np.uint8)).save(folder / "masks" / f"{image.stem}.png")
    (folder / "empty").mkdir()
    (folder / "full").mkdir()
    (folder / "full" / "thesis.tex").write_text("mine")
    (folder / "text.txt").write_text("no image\n")
    (folder / "list.txt").write_text("scenes/scene_00.jpg\n")
    (folder / "broken.json").write_text('{"images": [')
    (folder / "half.pth").write_bytes(b"PK\x03\x04 and no more")
    (folder / "half.safetensors").write_bytes(b"\xff" * 30)
    (folder / "config-only").mkdir()
    (folder / "config-only" / "config.json").write_text(json.dumps({"architecture": "os.system"}))
    return folder


def run_command(root, capsys, arguments, yaml=None):
    """(exit code, first line of what is wrong) of a command line, in which {} stands for the folder."""
    given = [str(argument).replace("{}", str(root)) for argument in arguments]
    if yaml is not None:
        (root / "wrong.yaml").write_bytes(yaml.encode() if isinstance(yaml, str) else yaml)
        given += ["--config", str(root / "wrong.yaml")]
    code = run(given)
    printed = capsys.readouterr()
    assert "Traceback" not in printed.out + printed.err
    lines = printed.err.splitlines()
    assert lines and lines[0].startswith("gtsa: ") and not (root / "out").exists()
    return code, printed.err


PRETRAIN = ["pretrain", "--data", "{}/scenes", "--out", "{}/out"]
KNN = ["evaluate", W, "--task", "knn", "--train", "{}/classes", "--val", "{}/classes", "--device", "cpu"]
MASKS = ["evaluate", W, "--task", "in_context", "--device", "cpu"]
COMPARE = [
    "compare", "--data", "{}/scenes", "--out", "{}/out", "--model", "test_vit", "--device", "cpu", "--methods", "gtsa",
    "--task", "knn", "--primary", "knn", "--train", "{}/classes", "--folds", "2", "--steps", "2", "--batch-size", "2",
]  # fmt: skip


def but(arguments, flag, *values):
    """The command line with another value for one of its flags, or without it."""
    at = arguments.index(flag)
    return [*arguments[:at], *((flag, *values) if values else ()), *arguments[at + 2 :]]


DEEP = "views: " + "[" * 5000 + "]" * 5000
BOMB = "a: &a [1, 2, 3, 4, 5, 6, 7, 8, 9]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefg", "bcdefgh", strict=True)
)

COMMANDS = [
    (["pretrian"], 2, "pretrian"),
    (["evaluate"], 2, "WEIGHTS"),
    (["evaluate", W, "--tusk", "knn"], 2, "--tusk"),
    (["compare"], 2, "data: give the images"),
    (["check"], 2, "DATA"),
    (["check", "{}/nowhere"], 3, "nowhere"),
    (["check", "{}/text.txt"], 3, "1 of 1 images cannot be used"),
    (["check", "{}/empty"], 3, "no images"),
    (["check", "{}/scenes", "--range16", "9", "1"], 2, "black must be below white"),
    (["preview", "{}/scenes", "--image", "-1", "--out", "{}/out.png"], 3, "--image -1"),
    (["preview", "{}/scenes", "--epoch", "-1", "--out", "{}/out.png"], 2, "--epoch -1"),
    (["preview", "{}/scenes", "--model", "resnet50", "--out", "{}/out.png"], 2, "resnet50"),
    (["export", "{}/nowhere", "--out", "{}/out"], 4, "no weights there"),
    (["export", W, "--out", "{}/full"], 2, "exists already"),
    (["export", W, "--out", "{}/out", "--to", "torchscript"], 2, "torchscript"),
    (["export", "{}/half.pth", "--out", "{}/out"], 4, "half.pth"),
    (["export", "{}/half.safetensors", "--out", "{}/out", "--model", "test_vit"], 4, "half.safetensors"),
    (["models", "nothing-like-it"], 2, "nothing-like-it"),
    ([*PRETRAIN, "--batch-size", "many"], 2, "batch-size"),
    ([*PRETRAIN, "--init", "{}/full"], 4, "no weights there"),
    ([*but(PRETRAIN, "--data", "{}/list.txt"), "--data-root", "{}/nowhere"], 3, "1 of 1 images cannot be used"),
    (["pretrain", "--data", "{}/scenes"], 2, "--out is missing"),
    (["pretrain", "--data", "{}/scenes", "--out", "{}/full"], 2, "not empty"),
    (["pretrain", "--data", "{}/scenes", "--out", "{}/text.txt"], 2, "is a file"),
    (but(KNN, "--train", "{}/scenes"), 3, "outside a class folder"),
    ([*KNN, "--folds", "2"], 2, "folds: needs --train and no --val"),
    ([*KNN, "--knn.k", "x"], 2, "knn.k"),
    ([*KNN, "--knn.temperature", "0"], 2, "temperature above 0"),
    ([*KNN, "--out", "{}/full/thesis.tex"], 2, "already exists"),
    ([*KNN, "--predictions", "{}/full"], 2, "not empty"),
    ([*KNN, "--predictions", "{}/text.txt"], 6, "cannot be written"),
    ([*but(KNN, "--task", "linear"), "--work", "{}/text.txt"], 2, "--work {}/text.txt is a file"),
    (["evaluate", "{}/config-only", *KNN[2:]], 4, "config-only"),
    (["evaluate", "timm:os.system", *KNN[2:]], 4, "os.system"),
    ([*MASKS, "--train", "{}/scenes", "{}/nowhere", "--folds", "2"], 3, "nowhere"),
    ([*MASKS, "--train", "{}/scenes", "{}/broken.json", "--folds", "2"], 3, "masks"),
    (
        ["evaluate", W, "--task", "detection", "--train", "{}/scenes", "{}/masks", "--folds", "2"], 3,
        "--task detection needs boxes (a COCO JSON file); {}/scenes with labels {}/masks has none",
    ),
    ([*MASKS, "--train", "{}/broken.json", "{}/scenes", "--folds", "2"], 3, "give IMAGES first, then LABELS"),
    ([*MASKS, "--train", "{}/scenes", "{}/masks", "{}/masks", "--folds", "2"], 2, "IMAGES and LABELS"),
    ([*MASKS, "--train", "{}/scenes", "{}/masks", "--folds", "2", "--classes", "{}/nowhere"], 3, "nowhere"),
    (["evaluate", W, "--task", "detection", "--train", "{}/scenes", "{}/broken.json", "--folds", "2"], 3, "broken.json"),
    (["evaluate", W, "--task", "health"], 2, "--val IMAGES, without labels"),
    (["evaluate", W, "--task", "rotation", "--val", "{}/scenes"], 2, "--train IMAGES, without labels"),
    (but(COMPARE, "--out", "{}/text.txt"), 2, "is a file"),
    (but(COMPARE, "--folds", "9"), 2, "there are 4 images"),
    ([*COMPARE, "--weights", "{}/full"], 4, "no weights there"),
    (but(COMPARE, "--methods", "byol"), 2, "byol"),
    ([*COMPARE, "--precision", "fp16"], 2, "fp16 needs a GPU"),
    ([*COMPARE, "--jobs", "0"], 2, "jobs"),
]  # fmt: skip

FILES = [
    (PRETRAIN, "method: {class_path: os.system}", 2, "method: {'class_path': 'os.system'}"),
    (PRETRAIN, "method: [gtsa]", 2, "method:"),
    (PRETRAIN, DEEP, 2, "nested too deeply"),
    (PRETRAIN, "views: &v {x: *v}", 2, "nested too deeply"),
    (PRETRAIN, BOMB, 2, "more than 100,000 values"),
    (PRETRAIN, "#" * 1_000_001, 2, "more than 1,000,000 bytes"),
    (PRETRAIN, b"\xff\xfe\x00", 2, "not plain YAML"),
    (PRETRAIN, "- 1\n- 2\n", 2, "settings are lines"),
    (PRETRAIN, "1: 2", 2, "is not the name of a setting"),
    (PRETRAIN, "{views: {1: 2}}", 2, "is not the name of a setting"),
    (PRETRAIN, "seed: 2026-11-27", 2, "is of type date"),
    (PRETRAIN, "init: !!binary aGk=", 2, "is of type bytes"),
    (PRETRAIN, "views: 3", 2, "views: 3"),
    (PRETRAIN, "views: {global_crops_size: [1, 2]}", 2, "views.global_crops_size"),
    (PRETRAIN, "gtsa: {cells: a}", 2, "gtsa.cells"),
    (PRETRAIN, "eval: {knn: 3}", 2, "eval:"),
    (PRETRAIN, "seed: .nan", 2, "seed: nan"),
    (but(KNN, "--task"), "task: {knn: 3}", 2, "task:"),
    (KNN, "knn: {k: {a: 1}}", 2, "knn.k"),
    (KNN, "knn: [3]", 2, "knn: (3,) should be a valid dictionary"),
    (["evaluate", W, "--task", "knn"], "{train: 3, folds: 2}", 2, "train: 3 should be a valid string"),
    (["preview", "{}/scenes", "--out", "{}/out.png"], "image: 3", 2, "image: there is no such setting"),
    (["preview", "{}/scenes", "--out", "{}/out.png"], "method: {a: b}", 2, "method:"),
    (COMPARE, "evaluate: {knn: {k: x}}", 2, "knn.k"),
    (COMPARE, "evaluate: {knn: 3}", 2, "knn: 3"),
    (COMPARE, "evaluate: {knn: {k: 0}}", 2, "k must be at least 1"),
    (COMPARE, "evaluate: [1]", 2, "evaluate: (1,) should be a valid dictionary"),
    (COMPARE, "evaluate: {seed: 3}", 2, "evaluate: seed is set by the comparison"),
    (COMPARE, "tasks: {knn: 3}", 2, "tasks.knn"),
    (COMPARE, "tasks: {knn: {val: ['{}/nowhere'], folds: null}}", 3, "nowhere"),
    (COMPARE, "tasks: {knn: {tokens: cls}}", 2, "tasks: knn: tokens is set by the comparison"),
    (COMPARE, "pretrain: {out: x}", 2, "pretrain: out is set by the comparison"),
    (COMPARE, "pretrain: {views: 3}", 2, "views: 3"),
    (COMPARE, "pretrain: {gtsa: {momentum: 2}}", 2, "gtsa.momentum: from 0 to 1"),
    (COMPARE, "pretrain: {hold_out: 6}", 2, "leaves none of 6 images"),
    (COMPARE, "rows: {x: {method: {a: b}}}", 2, "rows: x.method"),
    (COMPARE, "rows: {x: 3}", 2, "rows.x"),
    (COMPARE, "rows: {'': {}}", 2, "cannot be a folder name"),
    (COMPARE, f"rows: {{{'x' * 300}: {{}}}}", 2, "cannot be a folder name"),
    (COMPARE, "rows: {x: {resume: true}}", 2, "rows: x: resume is set by the comparison"),
    ([*but(COMPARE, "--train", "{}/scenes"), "--evaluate-every", "2"], "tasks: {knn: {train: ['{}/classes']}}", 3, "class folder"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "code", "words"), COMMANDS, ids=[words for *_, words in COMMANDS])
def test_errors_on_the_command_line_are_reported(root, capsys, arguments, code, words):
    actual_code, message = run_command(root, capsys, arguments)
    words = words.replace("{}", str(root))
    assert (actual_code, words in message) == (code, True), message


@pytest.mark.parametrize(("arguments", "yaml", "code", "words"), FILES, ids=[words for *_, words in FILES])
def test_errors_in_a_file_of_settings_are_reported(root, capsys, arguments, yaml, code, words):
    yaml = yaml.replace("{}/", f"{root}/") if isinstance(yaml, str) else yaml
    actual_code, message = run_command(root, capsys, arguments, yaml)
    assert (actual_code, words in message) == (code, True), message
    assert len(message) < 2000  # whatever the file holds
