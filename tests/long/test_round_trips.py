"""Every export, opened without us in a process of its own: the teacher's features at its size; at another, the gap."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from test_export import MODELS, encoder

from gtsa import export
from gtsa.models.export import write

pytestmark = pytest.mark.long

OPEN = {
    "timm": """
model = timm.create_model("local-dir:" + path, pretrained=True).eval()
features = lambda images: model.forward_features(images)
""",
    "dino": """
model = timm.create_model(name, num_classes=0, global_pool="", depth=2, img_size=112, dynamic_img_size=True).eval()
state = {key.removeprefix("backbone."): value for key, value in torch.load(path, weights_only=True)["teacher"].items()}
model.load_state_dict(state)
features = lambda images: model.forward_features(images)
""",
    "hf": """
model = transformers.ViTModel.from_pretrained(path, add_pooling_layer=False).eval()
features = lambda images: model(images, interpolate_pos_encoding=True).last_hidden_state
""",
}
SCRIPT = """
import sys
import numpy as np
import timm, torch, transformers
path, name, given, out = sys.argv[1:]
{open}
with torch.no_grad():
    np.savez(out, **{{key: features(torch.from_numpy(images)).numpy() for key, images in np.load(given).items()}})
assert "gtsa" not in sys.modules
"""
CASES = [(to, model) for to in OPEN for model in MODELS if to != "hf"] + [("hf", "vit_tiny_patch16_224")]


@pytest.mark.parametrize(("to", "model"), CASES)
def test_an_export_opened_without_us_gives_the_features(tmp_path, to, model):
    backbone = encoder(model)
    path = export(str(write(backbone, tmp_path / "run")), str(tmp_path / "x"), to)
    patch, draw = backbone.patch_size, torch.Generator().manual_seed(1)
    images = {
        "own size": torch.randn(2, 3, 112, 112, generator=draw),
        "other size": torch.randn(1, 3, 5 * patch, 9 * patch, generator=draw),
    }
    np.savez(tmp_path / "in.npz", **{name: value.numpy() for name, value in images.items()})
    script = SCRIPT.format(open=OPEN[to])
    command = [sys.executable, "-I", "-c", script, path, model, tmp_path / "in.npz", tmp_path / "out.npz"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    outputs = np.load(tmp_path / "out.npz")
    gaps = {}
    for name, value in images.items():
        with torch.no_grad():
            tokens = backbone(value)
        expected = torch.cat([tokens.prefix, tokens.patches.flatten(1, 2)], 1).numpy()
        gaps[name] = float(np.abs(outputs[name] - expected).max())
    print(f"{to}, {model}: " + ", ".join(f"{name} {gap:.1e}" for name, gap in gaps.items()))
    assert gaps["own size"] < 1e-5
    if to != "hf":  # Hugging Face resamples position embeddings without antialiasing
        assert gaps["other size"] < 1e-4
