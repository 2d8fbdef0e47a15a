"""The range of 16-bit images travels with the weights, as their normalisation does."""

import json

import numpy as np
import onnx
import pytest
import timm
import torch
from PIL import Image
from test_export import encoder

import gtsa
from conftest import TINY, run, shared
from gtsa import UserError
from gtsa.comparison.jobs import range16_of
from gtsa.comparison.settings import Compare
from gtsa.core.settings import validated
from gtsa.data.sources.folder import Folder
from gtsa.models.export import write

TWELVE_BITS = (0, 4095)


def deep(seed):
    values = np.random.default_rng(seed).integers(0, 4096, (64, 64))
    return Image.fromarray(values.astype(np.uint16))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """16-bit images in two folders, which are classes."""

    def make(folder):
        for number in range(10):
            (folder / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
            deep(number).save(folder / "ab"[number % 2] / f"{number}.png")

    return shared(tmp_path_factory, "images of 12 bits", make)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, images):
    """A run with --range16 0 4095."""
    settings = TINY | {"steps": 2, "hold_out": 2, "evaluate_every": 2, "range16": TWELVE_BITS}
    return shared(tmp_path_factory, "run of 12 bits", lambda out: gtsa.pretrain(str(images), out=str(out), **settings))


def expected(backbone, image):
    """The vector of an image, scaled from 12 bits by hand."""
    pixels = np.rint(np.asarray(image) / 4095 * 255).astype(np.uint8)
    plain = Image.fromarray(np.repeat(pixels[..., None], 3, axis=-1))
    with torch.no_grad():
        return backbone.pooled(backbone(backbone.transform(plain)[None]))[0].numpy()


@pytest.mark.parametrize("part", ["", "exports/timm", "checkpoints/step-00000002"])
def test_embed_and_load_inherit_it_from_a_run(trained, images, tmp_path, part):
    backbone = gtsa.load(trained / part)
    assert backbone.range16 == TWELVE_BITS
    gtsa.embed(str(trained / part), str(images / "a"), tmp_path / "x.npy")
    reference = expected(backbone, deep(0))
    np.testing.assert_allclose(np.load(tmp_path / "x.npy")[0], reference, rtol=0, atol=1e-5)
    (tmp_path / "deep.png").write_bytes((images / "a" / "0.png").read_bytes())
    for image in (tmp_path / "deep.png", Image.open(tmp_path / "deep.png")):
        with torch.no_grad():
            vector = backbone.pooled(backbone(backbone.transform(image)[None]))[0]
        np.testing.assert_allclose(vector, reference, rtol=0, atol=1e-5)


def test_a_flag_overrides_it(trained, images, tmp_path):
    code, out, _ = run("embed", trained, "--data", images / "a", "--out", tmp_path / "x.npy", "--range16", 0, 65535)
    assert code == 0 and "trained with --range16 0 4095" in out
    assert np.abs(np.load(tmp_path / "x.npy")[0] - expected(gtsa.load(trained), deep(0))).max() > 1e-3


@pytest.mark.parametrize(("part", "range16"), [("", TWELVE_BITS), (None, (0, 65535))])
def test_an_evaluation_reads_images_as_in_training(trained, images, monkeypatch, part, range16):
    """Weights that state no range have that of all 16 bits."""
    seen, read = set(), Folder.read
    monkeypatch.setattr(Folder, "read", lambda self, *rest: seen.add(tuple(self.range16)) or read(self, *rest))
    weights = "random:test_vit" if part is None else str(trained / part)
    gtsa.evaluate(weights, "knn", train=(str(images),), folds=2, workers=0, knn={"k": (1,)})
    assert seen == {range16}


def test_a_flag_of_evaluate_overrides_it(trained, images, tmp_path, monkeypatch):
    seen, read = set(), Folder.read
    monkeypatch.setattr(Folder, "read", lambda self, *rest: seen.add(tuple(self.range16)) or read(self, *rest))
    common = ["evaluate", trained, "--task", "knn", "--train", images, "--folds", 2, "--workers", 0, "--knn.k", 1]
    code, out, err = run(*common, "--range16", 0, 1023, "--out", tmp_path / "x.json")
    assert (code, seen) == (0, {(0, 1023)}), err
    assert "16-bit images are read with --range16 0 1023" in out
    assert json.loads((tmp_path / "x.json").read_text())["range16"] == [0, 1023]
    code, _, err = run(*common, "--range16", 9, 3)
    assert code == 2 and "--range16 9 3: black must be below white; for images of 12 bits give --range16 0 4095" in err


def test_a_flag_of_evaluate_holds_for_the_images_of_a_run_too(trained, monkeypatch):
    """Without it they are read as the run read them, whatever the weights."""
    seen, read = set(), Folder.read
    monkeypatch.setattr(Folder, "read", lambda self, *rest: seen.add(tuple(self.range16)) or read(self, *rest))
    gtsa.evaluate(str(trained), "health", workers=0)
    assert seen == {TWELVE_BITS}
    gtsa.evaluate(str(trained), "health", workers=0, range16=(0, 65535))
    assert seen == {TWELVE_BITS, (0, 65535)}


def test_work_of_another_range_is_not_resumed(trained, images, tmp_path):
    settings = {"train": (str(images),), "val": (str(images),), "workers": 0, "work": tmp_path}
    settings["finetune"] = {"epochs": 1, "batch_size": 4}
    gtsa.evaluate(str(trained), "finetune", **settings)
    with pytest.raises(UserError, match="holds a training with other settings, weights or data"):
        gtsa.evaluate(str(trained), "finetune", **settings, range16=(0, 1023))


@pytest.mark.parametrize("part", ["", "exports/timm"])
def test_pretraining_from_weights_inherits_it_and_the_plan_says_so(trained, images, tmp_path, part):
    (tmp_path / "tiny.yaml").write_text(json.dumps({**TINY, "steps": 2, "hold_out": 2}))
    start = trained / part
    common = ["pretrain", "--data", images, "--init", start, "--config", tmp_path / "tiny.yaml"]
    code, out, err = run(*common, "--out", tmp_path / "run")
    assert code == 0, err
    row = next(line for line in out.splitlines() if "16-bit values" in line)
    assert "0 to 4095" in row and "as in the training of" in " ".join(out.split())
    assert gtsa.load(tmp_path / "run").range16 == TWELVE_BITS
    code, out, _ = run(*common, "--out", tmp_path / "other", "--plan", "--range16", 0, 1023)
    assert code == 0 and "0 to 1023, black to white" in out and "as in the training" not in out


def test_a_preview_inherits_it_from_the_initial_weights(trained, images, tmp_path, monkeypatch):
    seen, read = set(), Folder.read
    monkeypatch.setattr(Folder, "read", lambda self, *rest: seen.add(tuple(self.range16)) or read(self, *rest))
    gtsa.preview(str(images), str(tmp_path / "x.png"), init=str(trained))
    assert seen == {TWELVE_BITS}


def test_all_rows_of_a_comparison_have_that_of_the_common_initial_weights(trained):
    def of(pretrain):
        settings = {"data": "d", "out": "o", "task": ("knn",), "train": ("t", "l"), "folds": 2, "pretrain": pretrain}
        return range16_of(validated(Compare, {"methods": ("gtsa",), **settings}))

    assert of({}) == (0, 65535)
    assert of({"init": str(trained)}) == TWELVE_BITS
    assert of({"init": str(trained), "range16": (0, 9)}) == (0, 9)


@pytest.mark.parametrize("to", ["timm", "hf", "dino"])
def test_exports_keep_it(tmp_path, to):
    backbone = encoder("vit_tiny_patch16_224")
    backbone.range16 = (100.0, 4000.5)
    path = write(backbone, tmp_path / "first")
    gtsa.export(str(path), str(tmp_path / "x"), to)
    assert gtsa.load(tmp_path / "x").range16 == (100.0, 4000.5)
    if to == "timm":
        timm.create_model(f"local-dir:{tmp_path / 'x'}", pretrained=True)
    card = tmp_path / ("x.md" if to == "dino" else "x/README.md")
    assert "values from 100 (black) to 4000.5 (white)" in card.read_text()


def test_an_onnx_file_states_it(tmp_path):
    backbone = encoder("vit_tiny_patch16_224", depth=1)
    backbone.range16 = TWELVE_BITS
    file = gtsa.export(str(write(backbone, tmp_path / "timm")), str(tmp_path / "x.onnx"), "onnx")
    facts = {entry.key: entry.value for entry in onnx.load(file).metadata_props}
    assert json.loads(facts["range16"]) == [0, 4095]


@pytest.mark.parametrize("value", [[5, 5], [0], "wide", [0, float("nan")], [0, float("inf")], None, [[0], 1]])
def test_a_file_with_another_content_is_refused(tmp_path, value):
    path = write(encoder("vit_tiny_patch16_224", depth=1), tmp_path / "x")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "range16": value}))
    (path / "gtsa.sha256").unlink()
    with pytest.raises(UserError, match="is no export") as error:
        gtsa.load(path)
    assert error.value.code == 4


def test_old_exports_have_all_16_bits(tmp_path):
    path = write(encoder("vit_tiny_patch16_224", depth=1), tmp_path / "x")
    config = json.loads((path / "config.json").read_text())
    del config["range16"]
    (path / "config.json").write_text(json.dumps(config))
    (path / "gtsa.sha256").unlink()
    assert gtsa.load(path).range16 == (0, 65535)
