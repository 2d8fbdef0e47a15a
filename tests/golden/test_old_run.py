"""A run that 0.1.0 wrote before its settings were renamed (schema 1) still opens: for evaluation, export and resume.

Its weights were rounded to three values a tensor, so that the file is small. The expected numbers are that version's.
"""

import json
import shutil
import tarfile
from pathlib import Path

import pytest
from safetensors.torch import load_file

from conftest import run, run_apart
from gtsa.core import files
from gtsa.core.settings import validated
from gtsa.core.settings_file import plain_yaml, read_yaml, to_yaml
from gtsa.models.weights import load_backbone
from gtsa.pretraining.requested import settings_of
from gtsa.pretraining.settings import Pretrain
from gtsa.training import checkpoint

ARCHIVE = Path(__file__).with_name("run_of_schema_1.tar.xz")
FINGERPRINT = "860c081a03574daa"


@pytest.fixture
def old(tmp_path):
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "run"


def test_it_opens_with_the_same_weights_and_metrics(old, scenes, tmp_path):
    backbone, loaded = load_backbone(str(old))
    assert backbone.fingerprint == FINGERPRINT
    assert loaded.startswith("78 of 78 tensors loaded")
    tasks = ("--task", "health", "rotation", "--train", scenes, "--folds", 2, "--rotation.size", 64)
    code, _, err = run("evaluate", old, *tasks, "--out", tmp_path / "report.json")
    assert code == 0, err
    health, rotation = json.loads((tmp_path / "report.json").read_text())["results"]
    assert health["metrics"]["rank"] == pytest.approx(21.60655612815082, rel=1e-4)
    assert health["metrics"]["spread"] == pytest.approx(0.8711979434435464, rel=1e-4)
    assert rotation["metrics"]["rotation accuracy"] == pytest.approx(80.35714285714286, abs=4)  # two of 56


def test_it_is_exported(old, tmp_path):
    code, _out, err = run("export", old, "--out", tmp_path / "export")
    assert code == 0, err
    (checkpoint_folder,) = (old / "checkpoints").iterdir()
    teacher = checkpoint.read(checkpoint_folder)[0]["objective"]
    exported = load_file(tmp_path / "export" / "model.safetensors")
    assert all(value.equal(teacher[f"teacher.encoder.vit.{name}"]) for name, value in exported.items())


def test_its_settings_have_todays_names(old):
    now = settings_of(old)
    assert now["views"]["global_crops_size"] == 48
    assert (now["gram_weight"], now["clip_grad"], now["keep_checkpoints"]) == (0.0, 3.0, 1)
    assert now["dino"]["teacher_temp_warmup"] == now["ibot"]["teacher_temp_warmup"] == 0.29


def test_a_setting_that_its_version_lacked_has_the_value_of_the_one_that_stood_for_it(old):
    """Patches of iBOT had the temperature of CLS tokens."""
    assert "teacher_patch_temp" not in settings_of(old)["ibot"]  # auto, as the run is not of iBOT
    config = old / "config.yaml"
    values = {**read_yaml(config, schema=1), "schema": 2}
    values["ibot"] |= {"teacher_temp": [0.02, 0.03]}
    shutil.rmtree(old / "checkpoints")
    config.write_text(files.sealed(plain_yaml(values)))
    assert settings_of(old)["ibot"]["teacher_patch_temp"] == [0.02, 0.03]


def test_it_resumes_with_its_images_in_another_folder(old, scenes):
    """In a process of its own: a resume sets the number of threads."""
    code, out, err = run_apart("pretrain", "--out", old, "--data", scenes, "--resume", "--steps", 13)
    assert code == 0, err
    assert "training from step 12 to 13" in out + err
    assert read_yaml(old / "config.yaml")["views"]["hflip"] == 0.0
    assert "schema: 2" in (old / "config.yaml").read_text()


def test_settings_that_its_version_lacked_may_be_resolved_since(old):
    """A resume writes them into config.yaml, and may be killed before the next checkpoint."""
    settings = validated(Pretrain, {**settings_of(old), "compile": "off", "evaluate_images": 5})
    (old / "config.yaml").write_text(files.sealed(to_yaml(settings)))
    assert settings_of(old)["evaluate_images"] == 5


def test_as_a_file_of_settings_it_is_refused_with_the_new_names(old, scenes, tmp_path):
    code, _, err = run("pretrain", "--config", old / "config.yaml", "--data", scenes, "--out", tmp_path / "new")
    assert code == 2
    assert "clip: is called clip_grad now" in err
    assert "views.global_size: is called global_crops_size now" in err


def test_a_run_of_a_newer_version_is_refused(old):
    text = (old / "config.yaml").read_text()
    (old / "config.yaml").write_text("schema: 3\n" + text)
    code, _, err = run("pretrain", "--out", old, "--resume")
    assert code == 4
    assert "has schema 3, and this gtsa reads schemas up to 2: update gtsa" in err
