"""--patch-size: another patch than the model's own, in the run, its export, and what starts from it."""

import json

import pytest
import timm

import gtsa
from conftest import TINY, run
from gtsa.models.weights import load_backbone

QUICK = {**TINY, "steps": 2, "views": {**TINY["views"], "local_crops_number": 1}}


@pytest.fixture(scope="module")
def fine(scenes, tmp_path_factory):
    out = tmp_path_factory.mktemp("patch") / "run"
    gtsa.pretrain(str(scenes), out=str(out), patch_size=8, **QUICK)
    return out


def test_a_run_and_its_export_have_the_patches(fine):
    assert load_backbone(str(fine))[0].patch_size == 8
    config = json.loads((fine / "exports/timm/config.json").read_text())
    assert config["architecture"] == "test_vit" and config["model_args"]["patch_size"] == 8
    opened = timm.create_model(f"local-dir:{fine}/exports/timm", pretrained=True)
    assert opened.patch_embed.proj.kernel_size == (8, 8)


def test_a_run_that_starts_from_it_keeps_the_patches(fine, scenes, tmp_path):
    init = str(fine / "exports" / "timm")
    gtsa.pretrain(str(scenes), out=str(tmp_path / "next"), init=init, **{**QUICK, "model": "auto"})
    assert load_backbone(str(tmp_path / "next"))[0].patch_size == 8
    code, _, error = run("pretrain", "--data", scenes, "--out", tmp_path / "no", "--init", init, "--patch-size", 16)
    assert code == 2 and "--patch-size 16: the weights of --init have patches of 8 px" in error


def test_crops_are_multiples_of_the_given_patch(scenes, tmp_path):
    code, _, error = run(
        *("pretrain", "--data", scenes, "--out", tmp_path / "no", "--model", "test_vit", "--patch-size", 14),
        *("--views.global-crops-size", 112, "--views.local-crops-size", 48),
    )
    assert code == 2 and "48 does not suit test_vit, whose patch is 14 px" in error


def test_the_models_own_patch_leaves_the_export_as_it_was(finished):
    assert "patch_size" not in json.loads((finished / "exports/timm/config.json").read_text())["model_args"]
