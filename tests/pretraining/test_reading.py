"""How a run reads its images: --cut, --cache and --decoder are declared, exact, and the run's own."""

import sys

import numpy as np
import pytest
from PIL import Image

import gtsa
from conftest import TINY, final_weights, run

QUICK = {**TINY, "steps": 4, "log_every": 2, "evaluate_every": 100, "hold_out": 0}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """JPEGs that are larger than their views need."""
    folder = tmp_path_factory.mktemp("photographs")
    for number in range(8):
        y, x = np.mgrid[:160, :210]
        values = [127 + 120 * np.sin(x / (9 + number)), 127 + 120 * np.cos(y / 13), 127 + 120 * np.sin((x + y) / 29)]
        Image.fromarray(np.stack(values, -1).astype(np.uint8)).save(folder / f"{number}.jpg")
    return folder


@pytest.fixture(scope="module")
def plain(photographs, tmp_path_factory):
    return gtsa.pretrain(str(photographs), out=str(tmp_path_factory.mktemp("plain") / "run"), **QUICK).folder


def test_a_cache_changes_pixels_but_not_from_run_to_run(photographs, plain, tmp_path, capsys):
    folder = tmp_path / "cache"
    made = gtsa.pretrain(str(photographs), out=str(tmp_path / "made"), cache=str(folder), **QUICK).folder
    assert len(list(folder.rglob("*.jpg"))) == 8
    used = gtsa.pretrain(str(photographs), out=str(tmp_path / "used"), cache=str(folder), workers=1, **QUICK).folder
    (tmp_path / "file").write_text("")
    none = gtsa.pretrain(str(photographs), out=str(tmp_path / "none"), cache=str(tmp_path / "file"), **QUICK).folder
    assert capsys.readouterr().out.count("no more images are kept") == 1
    assert final_weights(made) == final_weights(used) == final_weights(none) != final_weights(plain)


def test_how_images_are_read_does_not_change_on_resume(plain):
    for flags in (["--cut", "device"], ["--cache", "elsewhere"], ["--decoder", "simplejpeg"]):
        code, _, err = run("pretrain", "--out", plain, "--resume", *flags)
        assert code == 2
        assert f"{flags[0][2:]}: " in err


def test_cut_on_the_device_is_the_same_for_any_number_of_workers(photographs, plain, tmp_path):
    runs = [
        gtsa.pretrain(str(photographs), out=str(tmp_path / f"{n}"), cut="device", workers=n, **QUICK).folder
        for n in (0, 1)
    ]
    assert final_weights(runs[0]) == final_weights(runs[1]) != final_weights(plain)


def test_simplejpeg_is_a_run_of_its_own(photographs, plain, tmp_path):
    other = gtsa.pretrain(str(photographs), out=str(tmp_path / "run"), decoder="simplejpeg", **QUICK).folder
    assert final_weights(other).keys() == final_weights(plain).keys()
    assert "decoder: simplejpeg" in (other / "config.yaml").read_text()


def test_simplejpeg_that_is_not_installed_is_said_before_anything_is_written(photographs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, err = run("pretrain", "--data", photographs, "--out", tmp_path / "run", "--decoder", "simplejpeg")
    assert code == 2
    assert "gtsa[jpeg]" in err
    assert not (tmp_path / "run").exists()
