"""ONNX: the same features in another runtime, for any batch and image size, or no file."""

import json
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import timm.models.eva
import timm.models.vision_transformer
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_export import MODELS, encoder
from timm.layers import resample_abs_pos_embed

from gtsa import UserError, export
from gtsa.models import onnx as ours
from gtsa.models.export import write
from gtsa.models.onnx import bicubic
from gtsa.models.weights import load_backbone

SCRIPT = """
import sys
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
images = np.load(sys.argv[2])
outputs = {
    f"{name} {output.name}": value
    for name in images
    for output, value in zip(session.get_outputs(), session.run(None, {"images": images[name]}))
}
assert not {"gtsa", "torch", "timm"} & set(sys.modules)
np.savez(sys.argv[3], **outputs)
"""


@pytest.mark.parametrize("model", MODELS)
def test_onnxruntime_alone_gives_the_same_features(tmp_path, model):
    """Batches of 1 and 8, at the size of the export and at another one, in a process without us and without PyTorch."""
    backbone = encoder(model)
    file = export(str(write(backbone, tmp_path / "timm")), str(tmp_path / "new" / "x.onnx"), "onnx")
    patch, draw = backbone.patch_size, torch.Generator().manual_seed(1)
    shapes = {
        "own": (1, 112, 112),
        "own of 8": (8, 112, 112),
        "other": (1, 5 * patch, 9 * patch),
        "other of 8": (8, patch, 2 * patch),
    }
    images = {name: torch.randn(n, 3, h, w, generator=draw) for name, (n, h, w) in shapes.items()}
    np.savez(tmp_path / "in.npz", **{name: value.numpy() for name, value in images.items()})
    command = [sys.executable, "-I", "-c", SCRIPT, file, tmp_path / "in.npz", tmp_path / "out.npz"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stderr == ""
    outputs = np.load(tmp_path / "out.npz")
    for name, value in images.items():
        with torch.no_grad():
            tokens = backbone(value)
        expected = {
            "patch_tokens": tokens.patches,
            "pooled": tokens.patches.mean((1, 2)),
            "prefix_tokens": tokens.prefix,
        }
        for output, reference in expected.items():
            gap = np.abs(outputs[f"{name} {output}"] - reference.numpy()).max()
            print(f"{model}, {name}, {output}: {gap:.1e}")
            assert gap < 1e-5
    assert {path.name for path in file.parent.iterdir()} == {"x.onnx", "x.onnx.md", "x.onnx.sha256"}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """An encoder that is pooled by its CLS token, and its ONNX file."""
    place = tmp_path_factory.mktemp("exported")
    backbone = encoder("vit_tiny_patch16_224", normalisation=((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)), depth=1)
    backbone.pooling = "cls"
    return backbone, export(str(write(backbone, place / "timm")), str(place / "x.onnx"), "onnx")


def test_the_file_says_how_images_are_prepared(exported):
    backbone, file = exported
    model = onnx.load(file)
    onnx.checker.check_model(model, full_check=True)
    facts = {entry.key: entry.value for entry in model.metadata_props}
    assert (json.loads(facts["mean"]), json.loads(facts["std"])) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    assert (facts["model"], facts["patch_size"], facts["fingerprint"]) == (backbone.model, "16", backbone.fingerprint)
    sizes = [[d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim] for value in model.graph.output]
    assert sizes == [["batch", "rows", "columns", 192], ["batch", 192], ["batch", 1, 192]]
    assert b".py" not in file.read_bytes()  # no path of the machine that exported it


@pytest.mark.parametrize("size", [(112, 100), (33, 32), (15, 16)])
def test_a_part_of_a_patch_is_refused(exported, size):
    session = onnxruntime.InferenceSession(exported[1], providers=["CPUExecutionProvider"])
    with pytest.raises(Exception, match="height_and_width_must_be_multiples_of_16"):
        session.run(None, {"images": np.zeros((2, 3, *size), np.float32)})


def test_pooled_is_the_vector_that_was_trained(exported):
    session = onnxruntime.InferenceSession(exported[1], providers=["CPUExecutionProvider"])
    _, pooled, prefix = session.run(None, {"images": np.zeros((2, 3, 112, 112), np.float32)})
    np.testing.assert_array_equal(pooled, prefix[:, 0])


@pytest.mark.parametrize(
    ("name", "value", "message"), [("TOLERANCE", 0.0, "differs from PyTorch by"), ("LARGEST", 1000, "ends at 2 GiB")]
)
def test_a_graph_that_is_not_right_is_refused(tmp_path, monkeypatch, name, value, message):
    place = write(encoder("vit_tiny_patch16_224", depth=1), tmp_path / "timm")
    monkeypatch.setattr(ours, name, value)
    with pytest.raises(UserError, match=rf"{message}.*[Uu]se --to timm") as error:
        export(str(place), str(tmp_path / "x.onnx"), "onnx")
    assert error.value.code == 4
    assert [path.name for path in tmp_path.iterdir()] == ["timm"]


def test_a_model_that_cannot_be_traced_is_refused_and_timm_is_as_before(monkeypatch):
    backbone = encoder("vit_small_patch16_dinov3", depth=1)
    backbone.vit.rope.normalize_coords = "max"
    modules = timm.models.vision_transformer, timm.models.eva
    with pytest.raises(UserError, match="PyTorch cannot export vit_small_patch16_dinov3 to ONNX.*use --to timm"):
        ours.convert(backbone, {})
    assert all(module.resample_abs_pos_embed is resample_abs_pos_embed for module in modules)
    assert "_create_embed" not in vars(backbone.vit.rope)


def test_missing_libraries_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"needs onnx and onnxruntime and onnxscript; install with: pip install 'gtsa\[onnx\]'"
    ):
        export("random:test_vit", str(tmp_path / "x.onnx"), "onnx")


def test_an_onnx_file_is_no_weights(tmp_path):
    (tmp_path / "x.onnx").write_bytes(b"")
    with pytest.raises(UserError, match="gtsa does not read ONNX files; give the run"):
        load_backbone(str(tmp_path / "x.onnx"))


@settings(max_examples=60, deadline=None)
@given(*4 * [st.integers(2, 40)])
def test_two_matrices_resample_as_pytorch_does(old_rows, old_columns, rows, columns):
    """From 2 columns on: PyTorch 2.14 on a CPU repeats the first row of a single column."""
    grid = torch.randn(old_rows, old_columns, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(grid[None, None], (rows, columns), mode="bicubic", antialias=True)[0, 0]
    torch.testing.assert_close(
        bicubic(rows, old_rows) @ grid @ bicubic(columns, old_columns).T, expected, rtol=0, atol=1e-4
    )
