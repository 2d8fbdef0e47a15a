"""What leaves the house opens elsewhere, and gives the same numbers."""

import json

import pytest
import timm
import torch

from gtsa import Remedy, export, weights
from gtsa.backbone import Backbone
from gtsa.export import backbone_of, write

MODELS = ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3", "eva02_tiny_patch14_224"]


def encoder(model, **options):
    torch.manual_seed(0)
    arguments = {"depth": 2}
    backbone = Backbone(model, 112, arguments=arguments, **options).eval()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return backbone


@pytest.mark.parametrize("model", MODELS)
def test_timm_opens_it_and_agrees(tmp_path, model):
    backbone = encoder(model, normalisation=((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)))
    place = write(backbone, tmp_path / "timm")
    opened = timm.create_model(f"local-dir:{place}", pretrained=True).eval()
    images = torch.randn(2, 3, 112, 112)
    with torch.no_grad():
        ours, tokens = backbone(images), opened.forward_features(images)
        torch.testing.assert_close(tokens[:, backbone.prefix :], ours.patches.flatten(1, 2), rtol=0, atol=1e-5)
        torch.testing.assert_close(opened(images), ours.patches.mean((1, 2)), rtol=0, atol=1e-5)
    config = timm.data.resolve_model_data_config(opened)
    assert tuple(config["mean"]) == (0.1, 0.2, 0.3)
    assert tuple(config["std"]) == (0.4, 0.5, 0.6)
    assert tuple(config["input_size"]) == (3, 112, 112)
    assert {p.name for p in place.iterdir()} == {"config.json", "model.safetensors"}


def test_an_export_is_weights_again(tmp_path):
    backbone = encoder("vit_tiny_patch16_224")
    place = write(backbone, tmp_path / "timm")
    again = backbone_of(str(place))
    for a, b in zip(backbone.vit.state_dict().values(), again.vit.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    export(str(place), str(tmp_path / "second"))
    assert (tmp_path / "second" / "model.safetensors").read_bytes() == (place / "model.safetensors").read_bytes()


def test_nothing_is_overwritten(tmp_path):
    place = write(encoder("vit_tiny_patch16_224"), tmp_path / "timm")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("x")
    with pytest.raises(Remedy, match="give another folder"):
        export(str(place), str(tmp_path / "mine"))
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["file"]


def test_tensors_are_counted(tmp_path):
    source, target = encoder("vit_tiny_patch16_224"), encoder("vit_tiny_patch16_224")
    torch.save(
        {"teacher": {f"module.backbone.{k}": v for k, v in source.vit.state_dict().items()}}, tmp_path / "dino.pth"
    )
    count = len(source.vit.state_dict())
    assert weights.load(weights.find(str(tmp_path / "dino.pth")), target).startswith(
        f"{count} of {count} tensors loaded"
    )
    for a, b in zip(source.vit.state_dict().values(), target.vit.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("norm.weight"), "norm.weight is missing"),
        (lambda s: s.update({"blocks.9.norm1.weight": torch.ones(3)}), "blocks.9.norm1.weight has no place"),
        (lambda s: s.update({"norm.weight": torch.ones(7)}), "norm.weight is 7, 192 is needed"),
        (lambda s: s.update({"norm.weight": torch.full((192,), float("nan"))}), "NaN"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, change, words):
    state = encoder("vit_tiny_patch16_224").vit.state_dict()
    change(state)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(Remedy, match=words) as remedy:
        weights.load(weights.find(str(tmp_path / "w.pth")), encoder("vit_tiny_patch16_224"))
    assert remedy.value.code == 4


def test_positions_of_another_grid_are_resampled_by_timm(tmp_path):
    big = Backbone("vit_tiny_patch16_224", 224, arguments={"depth": 1})
    small = Backbone("vit_tiny_patch16_224", 112, arguments={"depth": 1})
    weights.load(weights.find(str(write(big, tmp_path / "timm"))), small)
    wanted = timm.layers.resample_abs_pos_embed(big.vit.pos_embed, [7, 7], [14, 14])
    torch.testing.assert_close(small.vit.pos_embed, wanted)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_malicious_pickle_is_not_run(tmp_path):
    torch.save({"model": Evil(tmp_path / "proof")}, tmp_path / "w.pth")
    with pytest.raises(Remedy, match="cannot be read as weights"):
        weights.find(str(tmp_path / "w.pth"))
    assert not (tmp_path / "proof").exists()


def test_the_config_names_no_class(tmp_path):
    config = json.loads((write(encoder("vit_tiny_patch16_224"), tmp_path / "t") / "config.json").read_text())
    assert config["architecture"] == "vit_tiny_patch16_224"
    assert config["model_args"]["global_pool"] == "avg"
    assert config["model_args"]["fc_norm"] is False
