"""The card of an export says what the run's files say, and its code opens the export beside it."""

import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from ruamel.yaml import YAML

import gtsa
from conftest import scene
from gtsa.models import card
from gtsa.models.formats import OPENS
from gtsa.models.weight_sources import Weights, read_weights

AFTER = "\nimport sys\nimport numpy\nassert 'gtsa' not in sys.modules\nnumpy.savez('out.npz', vector=vector, patches=patches)\n"


@pytest.fixture(scope="module")
def folder(finished, tmp_path_factory):
    """An export in each format, of a run; and an image of their size."""
    root = tmp_path_factory.mktemp("cards")
    for to in OPENS:
        gtsa.export(str(finished), str(root / to / "x"), to)
        scene(3, 48, 48).save((root / to / "x" if to in ("timm", "hf") else root / to) / "photo.jpg", quality=95)
    return root


def card_of(folder, to):
    return folder / to / "x" / "README.md" if to in ("timm", "hf") else folder / to / "x.md"


@pytest.mark.parametrize("to", OPENS)
def test_its_code_opens_the_export_without_us(folder, finished, to):
    text = card_of(folder, to).read_text()
    code = text.split("```python\n")[1].split("```")[0]
    beside = card_of(folder, to).parent
    done = subprocess.run([sys.executable, "-I", "-c", code + AFTER], cwd=beside, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    outputs = np.load(beside / "out.npz")
    backbone = gtsa.load(finished)
    tokens = backbone(backbone.transform(beside / "photo.jpg")[None])
    assert np.abs(outputs["vector"] - backbone.pooled(tokens).numpy()).max() < 1e-5
    assert np.abs(outputs["patches"].reshape(1, 3, 3, 64) - tokens.patches.numpy()).max() < 1e-5


@pytest.mark.parametrize("to", OPENS)
def test_the_hub_can_read_its_head(folder, to):
    head = YAML(typ="safe").load(card_of(folder, to).read_text().split("---\n")[1])
    library = {"timm": "timm", "hf": "transformers", "onnx": "onnx"}
    assert head["pipeline_tag"] == "image-feature-extraction" and "gtsa" in head["tags"]
    assert head.get("library_name") == library.get(to)
    assert "license" not in head  # it is the user's to choose


def test_its_facts_are_those_of_the_run(folder, finished):
    text = card_of(folder, "timm").read_text()
    for fact in (
        "| method | `gtsa` |",
        "Exported after step 12. The network is the EMA teacher. The loss does not use the CLS token.",
        "| images for training | 8 |",
        "`cells automatic`; `matches automatic`",
        "`rotations yes`",
        "too short to tell",
    ):
        assert fact in text
    assert not {"None", "True", "False"} & set(re.findall(r"\w+", text.partition("## Training")[2]))
    assert f"`{read_weights_fingerprint(finished)}`" in text
    assert "no sign of collapse: effective rank" in text
    assert str(finished) not in text and str(finished.parent) not in text
    own = (finished / "exports" / "timm" / "README.md").read_text()
    assert own.partition("## Training")[2].splitlines()[:20] == text.partition("## Training")[2].splitlines()[:20]


@pytest.mark.parametrize(("pooling", "words"), [("cls", "was trained"), ("mean", "loss does not use the CLS token")])
def test_it_names_the_network_and_whether_cls_was_trained(finished, pooling, words):
    backbone = gtsa.load(finished, network="student")
    backbone.pooling = pooling
    weights = read_weights(str(finished), "student")
    text = card.model_card(backbone, "timm", "x", card.origin_of(str(finished), weights.source, weights.network))
    assert "The network is the student." in text and words in text


def read_weights_fingerprint(source):
    weights = read_weights(str(source))
    assert isinstance(weights, Weights)
    return gtsa.load(source).fingerprint


def test_an_export_of_an_export_carries_what_is_known(folder, tmp_path):
    gtsa.export(str(folder / "timm" / "x"), str(tmp_path / "again"), "hf")
    first, second = card_of(folder, "timm").read_text(), (tmp_path / "again" / "README.md").read_text()
    assert first.partition("## Training")[2].split("<!--")[0] == second.partition("## Training")[2].split("<!--")[0]


def test_weights_of_nobody_say_so(tmp_path):
    gtsa.export("random:test_vit", str(tmp_path / "x"))
    assert "Nothing is recorded with these weights" in (tmp_path / "x" / "README.md").read_text()


def test_public_initial_weights_bring_their_licence(folder, finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    config = (run / "config.yaml").read_text().replace("init: null", "init: timm:vit_small_patch16_dinov3.lvd1689m").replace("init:\n", "init: timm:vit_small_patch16_dinov3.lvd1689m\n")  # fmt: skip
    (run / "config.yaml").write_text(config)
    origin = card.origin_of(str(run), str(run / "checkpoints" / "step-00000012"))
    text = card.model_card(gtsa.load(finished), "timm", "x", origin)
    assert "base_model: timm/vit_small_patch16_dinov3.lvd1689m" in text
    assert "Their licence applies, too. timm lists it as `dinov3-license`." in text


def test_a_card_that_was_edited_is_kept(tmp_path):
    from gtsa.models.export import write

    place = write(gtsa.load("random:test_vit"), tmp_path / "x")
    text = (place / "README.md").read_text()
    assert card.is_unchanged(text) and not card.is_unchanged(text.replace("tokens", "words"))
    (place / "README.md").write_text(text.replace("# license: the", "license: mit  # the"))
    write(gtsa.load("random:test_vit"), place)
    assert "license: mit" in (place / "README.md").read_text()
    gtsa.load(place)  # the checksums do not cover the card


# gtsa.load


def test_load_takes_paths_images_and_tensors(finished, tmp_path):
    import timm
    from PIL import Image

    backbone = gtsa.load(finished)
    assert not backbone.training and not any(p.requires_grad for p in backbone.parameters())
    scene(1).save(tmp_path / "photo.png")
    image = Image.open(tmp_path / "photo.png")
    model = timm.create_model(f"local-dir:{finished}/exports/timm", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    expected = transform(image.convert("RGB"))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    for form in (tmp_path / "photo.png", str(tmp_path / "photo.png"), image, pixels):
        torch.testing.assert_close(backbone.transform(form), expected, rtol=0, atol=0)
    tokens = backbone(backbone.transform(image)[None])
    torch.testing.assert_close(backbone.pooled(tokens), model(expected[None]), rtol=0, atol=1e-5)
    assert backbone.transform(image, (32, 64)).shape == (3, 32, 64)


@pytest.mark.parametrize(
    "picture",
    [
        3,
        torch.zeros(3, 4, 4),
        torch.zeros(3, 0, 4, dtype=torch.uint8),
        torch.zeros(4, 4, dtype=torch.uint8),
        "nowhere.png",
    ],
)
def test_load_refuses_what_is_no_image(finished, picture):
    with pytest.raises(
        gtsa.UserError, match=r"an image is a path, a PIL image or a uint8 tensor|nowhere.png: No such file"
    ):
        gtsa.load(finished).transform(picture)


@pytest.mark.parametrize("size", [0, (33, 32), (0, 0), (16, 16, 16), ()])
def test_a_size_is_of_whole_patches(finished, size):
    with pytest.raises(gtsa.UserError, match=r"--size .*multiples of the patch of 16 px"):
        gtsa.load(finished).transform(scene(1), size)
    assert gtsa.load(finished).transform(scene(1), 32).shape == (3, 32, 32)


def test_load_refuses_another_network(finished):
    with pytest.raises(gtsa.UserError, match="--network both: choose from teacher, student"):
        gtsa.load(finished, network="both")
