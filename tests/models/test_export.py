"""What leaves the house opens elsewhere, and gives the same numbers."""

import json
import os
import shutil
import subprocess

import onnxruntime
import pytest
import timm
import torch
import transformers

from conftest import scene
from gtsa import UserError, export
from gtsa.cli.main import run as command
from gtsa.models import weights
from gtsa.models.backbone import IMAGENET, Backbone
from gtsa.models.export import write
from gtsa.models.formats import OPENS
from gtsa.models.weight_sources import read_weights
from gtsa.models.weights import load_backbone

READABLE = ("timm", "hf", "dino")  # exports that are weights again
MODELS = ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3", "eva02_tiny_patch14_224"]


def encoder(model, normalisation=IMAGENET, **arguments):
    torch.manual_seed(0)
    backbone = Backbone(model, 112, normalisation=normalisation, arguments={"depth": 2, **arguments}).eval()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return backbone


@pytest.mark.parametrize("model", MODELS)
def test_timm_opens_it_and_agrees(tmp_path, model):
    backbone = encoder(model, normalisation=((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)))
    path = write(backbone, tmp_path / "timm")
    opened = timm.create_model(f"local-dir:{path}", pretrained=True).eval()
    images = torch.randn(2, 3, 112, 112)
    with torch.no_grad():
        ours, tokens = backbone(images), opened.forward_features(images)
        torch.testing.assert_close(
            tokens[:, backbone.num_prefix_tokens :], ours.patches.flatten(1, 2), rtol=0, atol=1e-5
        )
        torch.testing.assert_close(opened(images), ours.patches.mean((1, 2)), rtol=0, atol=1e-5)
    config = timm.data.resolve_model_data_config(opened)
    assert tuple(config["mean"]) == (0.1, 0.2, 0.3)
    assert tuple(config["std"]) == (0.4, 0.5, 0.6)
    assert tuple(config["input_size"]) == (3, 112, 112)
    assert {p.name for p in path.iterdir()} == {"config.json", "model.safetensors", "gtsa.sha256", "README.md"}


def test_an_export_is_weights_again(tmp_path):
    backbone = encoder("vit_tiny_patch16_224")
    path = write(backbone, tmp_path / "timm")
    again, _ = load_backbone(str(path))
    for a, b in zip(backbone.vit.state_dict().values(), again.vit.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    export(str(path), str(tmp_path / "second"))
    assert (tmp_path / "second" / "model.safetensors").read_bytes() == (path / "model.safetensors").read_bytes()


def test_nothing_is_overwritten(tmp_path):
    path = write(encoder("vit_tiny_patch16_224"), tmp_path / "timm")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("x")
    with pytest.raises(UserError, match="give another folder"):
        export(str(path), str(tmp_path / "mine"))
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["file"]


def test_the_config_names_no_class(tmp_path):
    config = json.loads((write(encoder("vit_tiny_patch16_224"), tmp_path / "t") / "config.json").read_text())
    assert config["architecture"] == "vit_tiny_patch16_224"
    assert config["model_args"]["global_pool"] == "avg"
    assert config["model_args"]["fc_norm"] is False


# Hugging Face and DINO

PLAIN = [
    ("vit_tiny_patch16_224", {}),
    ("vit_small_patch8_224", {"qkv_bias": False}),
    ("vit_tiny_patch16_224", {"mlp_ratio": 2.5, "num_heads": 6, "embed_dim": 96}),
]


@pytest.mark.parametrize(("model", "arguments"), PLAIN)
def test_transformers_opens_it_and_agrees(tmp_path, model, arguments):
    backbone = encoder(model, normalisation=((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)), **arguments)
    path = write(backbone, tmp_path / "timm")
    folder = export(str(path), str(tmp_path / "hf"), "hf")
    written = {"config.json", "model.safetensors", "preprocessor_config.json", "gtsa.sha256", "README.md"}
    assert {p.name for p in folder.iterdir()} == written
    vit, description = transformers.ViTModel.from_pretrained(folder, output_loading_info=True)
    assert set(description["missing_keys"]) == {"pooler.dense.weight", "pooler.dense.bias"}
    assert not any(description[name] for name in description if name != "missing_keys")
    images = torch.randn(2, 3, 112, 112, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, reference = backbone(images), vit.eval()(images).last_hidden_state
    torch.testing.assert_close(torch.cat([ours.prefix, ours.patches.flatten(1, 2)], 1), reference, rtol=0, atol=1e-5)
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    assert tuple(processor.image_mean) == (0.1, 0.2, 0.3)
    assert tuple(processor.image_std) == (0.4, 0.5, 0.6)
    picture = scene(1, 200, 150)
    prepared = processor(picture, return_tensors="pt").pixel_values[0]
    expected = backbone.transform(picture)  # torchvision and Pillow round differently on the way
    assert prepared.shape == (3, 112, 112) and (prepared - expected).abs().mean() < 0.02


@pytest.mark.parametrize("to", ["hf", "dino"])
@pytest.mark.parametrize(("model", "arguments"), PLAIN[:2])
def test_there_and_back_is_the_same_to_the_bit(tmp_path, model, arguments, to):
    normalisation = ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    path = write(encoder(model, normalisation, **arguments), tmp_path / "timm")
    there = export(str(path), str(tmp_path / "there"), to)
    back = export(str(there), str(tmp_path / "back"))
    assert (back / "model.safetensors").read_bytes() == (path / "model.safetensors").read_bytes()
    assert load_backbone(str(back))[0].normalisation == normalisation
    assert timm.create_model(f"local-dir:{back}", pretrained=True).patch_embed.img_size == (112, 112)


def test_a_dino_file_is_tensors_alone(tmp_path):
    backbone = encoder("vit_small_patch14_reg4_dinov2")
    path = export(str(write(backbone, tmp_path / "timm")), str(tmp_path / "new" / "w.pth"), "dino")
    state = torch.load(path, weights_only=True)
    assert list(state) == ["teacher", "mean", "std", "range16"]
    assert state["teacher"].keys() == {f"backbone.{k}" for k in backbone.vit.state_dict()}
    assert {p.name for p in path.parent.iterdir()} == {"w.pth", "w.pth.md", "w.pth.sha256"}
    description = load_backbone(str(path))[1]
    assert "taken for vit_small_patch16_224: 2 blocks, 6 heads, 4 registers" in description
    with pytest.raises(UserError, match="exists already"):
        export(str(tmp_path / "timm"), str(path), "dino")


@pytest.mark.parametrize(
    ("model", "options"),
    [
        *((model, {}) for model in MODELS[1:]),
        ("vit_tiny_patch16_224", {"init_values": 1e-5}),
        ("vit_tiny_patch16_224", {"no_embed_class": True}),
        ("vit_tiny_patch16_224", {"class_token": False}),
        ("vit_tiny_patch16_224", {"act_layer": "quick_gelu"}),
        ("vit_tiny_patch16_224", {"qk_norm": True}),
        ("vit_base_patch16_clip_224", {}),
    ],
)
def test_what_hugging_face_cannot_hold(tmp_path, model, options):
    path = write(encoder(model, **options), tmp_path / "timm")
    with pytest.raises(UserError, match="is no plain ViT with a CLS token.*use --to timm") as caught:
        export(str(path), str(tmp_path / "hf"), "hf")
    assert caught.value.code == 4
    assert not (tmp_path / "hf").exists()


def test_an_eps_that_timm_cannot_say(tmp_path):
    config = transformers.ViTConfig(
        hidden_size=192, num_hidden_layers=1, num_attention_heads=3, intermediate_size=768, image_size=32
    )
    transformers.ViTModel(config).save_pretrained(tmp_path / "w")
    for to in ("timm", "dino"):
        with pytest.raises(UserError, match=r"eps of 1e-12.* Use --to hf") as caught:
            export(str(tmp_path / "w"), str(tmp_path / "out"), to)
        assert caught.value.code == 4
    again = export(str(tmp_path / "w"), str(tmp_path / "hf"), "hf")
    assert weights.eps_of(load_backbone(str(again))[0]) == 1e-12


@pytest.mark.parametrize("to", OPENS)
def test_the_command_line_prints_how_to_open_an_export_and_it_is_true(tmp_path, capsys, to):
    path, out = write(encoder("vit_tiny_patch16_224", depth=1), tmp_path / "timm"), tmp_path / f"to {to}" / "x"
    assert command(["export", str(path), "--out", str(out), "--to", to]) == 0
    assert OPENS[to].split("(")[0] in capsys.readouterr().out
    libraries = {"timm": timm, "torch": torch, "transformers": transformers, "onnxruntime": onnxruntime}
    assert eval(OPENS[to].format(out), libraries) is not None


# Checksums, permissions and drafts


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """{what opens it: an export}"""
    root = tmp_path_factory.mktemp("exports")
    timm_folder = write(encoder("vit_tiny_patch16_224", depth=1), root / "timm")
    return {
        "timm": timm_folder,
        "hf": export(str(timm_folder), str(root / "hf"), "hf"),
        "dino": export(str(timm_folder), str(root / "dino" / "w.pth"), "dino"),
    }


def copy_of(path, to):
    """An export, copied with what lies beside it; returns it and its files."""
    if path.is_dir():
        there = shutil.copytree(path, to / path.name)
        return there, [file for file in sorted(there.iterdir()) if file.suffix != ".md"]  # a card is its reader's
    shutil.copytree(path.parent, to, dirs_exist_ok=True)
    return to / path.name, [file for file in sorted(to.iterdir()) if not file.name.endswith(".md")]


@pytest.mark.parametrize("to", READABLE)
def test_every_changed_or_shortened_file_is_detected(exported, tmp_path, to):
    path, files = copy_of(exported[to], tmp_path)
    read_weights(str(path))
    for file in files:
        whole = file.read_bytes()
        for at in (0, len(whole) // 3, len(whole) // 2, len(whole) - 1):
            for damaged in (whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :], whole[:at]):
                if file.suffix == ".sha256" and to == "dino" and len(damaged) > 64 and damaged[:64] == whole[:64]:
                    continue  # the name behind the checksum, which nobody reads
                file.write_bytes(damaged)
                with pytest.raises(UserError, match=r"changed or cut short|is damaged") as caught:
                    read_weights(str(path))
                assert caught.value.code == 4
        file.write_bytes(whole)
    read_weights(str(path))


@pytest.mark.parametrize("to", READABLE)
def test_an_export_of_before_there_were_checksums_opens(exported, tmp_path, to):
    path, files = copy_of(exported[to], tmp_path)
    for file in files:
        if file.suffix == ".sha256":
            file.unlink()
    load_backbone(str(path))


def test_sha256sum_can_check_an_export(exported):
    for folder, sums in ((exported["timm"], "gtsa.sha256"), (exported["dino"].parent, "w.pth.sha256")):
        description = subprocess.run(
            ["sha256sum", "--check", "--strict", sums], cwd=folder, capture_output=True, text=True
        )
        assert description.returncode == 0, description.stderr
        assert description.stdout.count(": OK") >= 1


@pytest.mark.parametrize("to", READABLE)
def test_permissions_are_those_of_other_files(exported, tmp_path, to):
    before = os.umask(0o027)
    try:
        path = export(str(exported["timm"]), str(tmp_path / "new" / "x"), to)
    finally:
        os.umask(before)
    for file in path.iterdir() if path.is_dir() else path.parent.iterdir():
        assert file.stat().st_mode & 0o777 == 0o640, file


def test_a_failed_export_leaves_nothing(exported, tmp_path, monkeypatch):
    process = subprocess.Popen(["true"])
    process.wait()
    (tmp_path / f".x.{process.pid}").mkdir()  # of an export that was killed
    real = os.fsync

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="cannot be written: No space") as caught:
        export(str(exported["timm"]), str(tmp_path / "x"))
    assert caught.value.code == 6
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(os, "fsync", real)
    export(str(exported["timm"]), str(tmp_path / "x"))
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("to", ["timm", "hf", "dino", "onnx"])
@pytest.mark.parametrize("out", ["/proc/x", "file/x", "file/deeper/x"])
def test_a_place_that_takes_no_files_is_refused_before_the_weights_are_read(tmp_path, monkeypatch, to, out):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setattr("gtsa.models.export.read_weights", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(UserError, match=f"^--out {out} cannot be written: /") as caught:
        export("random:test_vit", out, to)
    assert caught.value.code == 6


def test_a_folder_without_permission_is_refused(tmp_path, monkeypatch):
    """As a user who is not root: opening a file there fails."""

    def refuse(dir):
        raise PermissionError(13, "Permission denied", f"{dir}/tmp123")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(UserError, match=f"{tmp_path} takes no files \\(Permission denied\\)"):
        export("random:test_vit", str(tmp_path / "x"))


@pytest.mark.parametrize("to", ["dino", "onnx"])
@pytest.mark.parametrize("full_at", [1, 3])
def test_a_file_that_the_disk_refuses_leaves_nothing(exported, tmp_path, monkeypatch, to, full_at):
    """Also where the checksum does not fit any more: else the same command would be refused."""
    calls, real = [], os.fsync

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) >= full_at:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="x cannot be written: No space left on device; give another file") as caught:
        export(str(exported["timm"]), str(tmp_path / "x"), to)
    assert caught.value.code == 6 and not list(tmp_path.iterdir())


def test_a_new_export_leaves_files_of_others_in_its_folder(exported, tmp_path):
    path, _ = copy_of(exported["timm"], tmp_path)
    (path / "README.md").write_text("mine")
    (path / "config.json").write_text("{}")
    write(encoder("vit_tiny_patch16_224", depth=2), path)
    assert (path / "README.md").read_text() == "mine"
    assert load_backbone(str(path))[0].arguments["depth"] == 2
    assert [p.name for p in tmp_path.iterdir()] == ["timm"]
