"""Wrong input, typed as a user types it: one clear sentence, the right exit code, nothing imported or overwritten."""

import shlex
import struct
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from ruamel.yaml import YAML

from conftest import make_scenes, run
from gtsa.cli.main import run as in_process
from gtsa.core.terminal import command, lasting
from gtsa.pretraining import preview_picture


def run_command(capsys, *arguments):
    code = in_process([str(a) for a in arguments])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err + captured.out
    return code, captured.err


def test_empty_folder(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    code, err = run_command(capsys, "pretrain", "--data", tmp_path / "data", "--out", tmp_path / "run")
    assert code == 3
    assert "no images (it is empty)" in err


def test_a_file_instead_of_a_folder(tmp_path, scenes, capsys):
    code, err = run_command(capsys, "pretrain", "--data", scenes / "scene_00.jpg", "--out", tmp_path / "run")
    assert code == 3
    assert "is a file: give the folder that it is in" in err


def test_a_missing_folder(tmp_path, capsys):
    code, err = run_command(capsys, "pretrain", "--data", tmp_path / "nowhere", "--out", tmp_path / "run")
    assert code == 3
    assert "no such folder" in err


def test_a_folder_of_text_files(tmp_path, capsys):
    for i in range(3):
        (tmp_path / f"{i}.md").write_text("words")
    code, err = run_command(capsys, "pretrain", "--data", tmp_path, "--out", tmp_path.parent / "run")
    assert code == 3
    assert "no images (it holds 3 .md)" in err


def test_truncated_jpegs(tmp_path, capsys):
    data = make_scenes(tmp_path / "data", 4)
    for name in ("scene_00.jpg", "scene_02.jpg"):
        whole = (data / name).read_bytes()
        (data / name).write_bytes(whole[: len(whole) // 2])
    code, err = run_command(capsys, "pretrain", "--data", data, "--out", tmp_path / "run")
    assert code == 3
    assert "2 of 4 images cannot be used" in err
    assert "scene_00.jpg: damaged: image file is truncated" in err
    assert "--max-bad" in err


def test_a_60000_x_1_image(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    Image.new("RGB", (60_000, 1)).save(tmp_path / "data" / "line.png")
    code, err = run_command(capsys, "pretrain", "--data", tmp_path / "data", "--out", tmp_path / "run")
    assert code == 3
    assert "line.png: 60000 x 1 px: the short side needs at least 16 px" in err


def test_a_decompression_bomb_is_refused_from_its_header(tmp_path, capsys):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    (tmp_path / "data").mkdir()
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    (tmp_path / "data" / "bomb.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    )
    code, err = run_command(capsys, "check", tmp_path / "data")
    assert code == 3
    assert "1 of 1 images cannot be used" in err


def test_a_folder_that_is_not_empty(tmp_path, scenes, capsys):
    out = tmp_path / "run"
    out.mkdir()
    (out / "thesis.tex").write_text("mine")
    code, err = run_command(capsys, "pretrain", "--data", scenes, "--out", out)
    assert code == 2
    assert "--resume" in err
    assert "--overwrite" in err
    code, err = run_command(capsys, "pretrain", "--data", scenes, "--out", out, "--resume")
    assert code == 2
    assert "no run of gtsa" in err
    assert (out / "thesis.tex").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--epoch", "3"], 2, "Did you mean --epochs"),
        (["--epochs", "-1"], 2, "epochs: -1 should be greater than or equal to 1"),
        (["--epochs", "1", "--steps", "2"], 2, "steps and epochs: give one of the two"),
        (["--views.global-crops-size", "230"], 2, "patch is 16 px: choose 224 or 240"),
        (
            [
                "--model",
                "vit_small_patch14_reg4_dinov2",
                "--views.global-crops-size",
                "224",
                "--views.local-crops-size",
                "96",
            ],
            2,
            "choose 84 or 98",
        ),
        (["--precision", "fp16", "--device", "cpu"], 2, "fp16 needs a GPU"),
        (["--model", "resnet50"], 2, "no plain vision transformer"),
        (["--model", "vit_smal_patch16_224"], 2, "vit_small_patch16_224"),
        (["--method", "simclr"], 2, "'simclr' is unknown; choose from dino, "),
        (["--views.color-jitter", "2"], 2, "gtsa: views.color_jitter: from 0 to 1, not 2.0"),
        (["--views.hue", "9"], 2, "gtsa: views.hue: from 0 to 0.5, not 9.0"),
        (["--views.contrast", "-1"], 2, "gtsa: views.contrast: from 0 upwards, not -1.0"),
        (["--views.sigma", "3", "1"], 2, "gtsa: views.sigma: 0 < low <= high, not 3.0 1.0"),
        (
            ["--range16", "9", "1"],
            2,
            "gtsa: --range16 9 1: black must be below white; for images of 12 bits give --range16 0 4095",
        ),
        (["--gtsa.cells", "0", "0"], 2, "must be at least 1"),
        (["--gtsa.momentum", "2"], 2, "gtsa.momentum: from 0 to 1"),
        (["--gtsa.patch-weight", "-1"], 2, "must not be negative"),
        (["--init", "nowhere.safetensors"], 4, "no weights there"),
        (["--batch-size", "many"], 2, "batch-size"),
        (["--config", "nowhere.yaml"], 2, "nowhere.yaml"),
        (["--batch-size", "10", "--accumulate", "4"], 2, "10 does not divide over 4 micro-batches; give 8 or 12"),
        (["--hold-out", "99"], 2, "leaves none of 14 images"),
    ],
)
def test_wrong_settings(tmp_path, scenes, capsys, arguments, code, words):
    actual_code, err = run_command(capsys, "pretrain", "--data", scenes, "--out", tmp_path / "run", *arguments)
    assert (actual_code, words in err) == (code, True), err


def test_all_errors_at_once(tmp_path, scenes, capsys):
    path = tmp_path / "bad.yaml"
    path.write_text("epochs: 0\nlearning_rates: 1\nviews: {local_crop: 3}\n")
    code, err = run_command(capsys, "pretrain", "--config", path, "--data", scenes, "--out", tmp_path / "run")
    assert code == 2
    for words in ("epochs: 0", "did you mean learning_rate?", "did you mean local_crops_size?"):
        assert words in err
    assert not (tmp_path / "run").exists()


def test_a_class_path_is_refused_and_not_imported(tmp_path, scenes, monkeypatch, capsys):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'proof')!r}, 'w').close()\n")
    (tmp_path / "bad.yaml").write_text("gtsa:\n  class_path: evil.Method\n  init_args: {}\n")
    code, err = run_command(
        capsys, "pretrain", "--config", tmp_path / "bad.yaml", "--data", scenes, "--out", tmp_path / "run"
    )
    assert code == 2
    assert "gtsa.class_path: there is no such setting" in err
    assert not (tmp_path / "proof").exists()


def test_a_python_tag_in_yaml_is_refused(tmp_path, scenes, capsys):
    (tmp_path / "bad.yaml").write_text(f"seed: !!python/object/apply:os.mkdir [{tmp_path / 'proof'}]\n")
    code, err = run_command(
        capsys, "pretrain", "--config", tmp_path / "bad.yaml", "--data", scenes, "--out", tmp_path / "run"
    )
    assert code == 2
    assert "not plain YAML" in err
    assert not (tmp_path / "proof").exists()


def test_duplicate_keys_in_yaml_are_refused(tmp_path, scenes, capsys):
    (tmp_path / "bad.yaml").write_text("seed: 1\nseed: 2\n")
    code, err = run_command(
        capsys, "pretrain", "--config", tmp_path / "bad.yaml", "--data", scenes, "--out", tmp_path / "run"
    )
    assert code == 2
    assert "duplicate key" in err


def test_later_files_of_settings_override_earlier_ones_and_flags_override_all(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text("steps: 7\nseed: 1\nviews: {local_crops_number: 3, local_crops_size: 32}\n")
    (tmp_path / "b.yaml").write_text("seed: 2\nbatch_size: 5\nviews: {local_crops_number: 4}\n")
    files = ["--config", str(tmp_path / "a.yaml"), "--config", str(tmp_path / "b.yaml")]
    assert in_process(["pretrain", *files, "--batch-size", "6", "--print-config"]) == 0
    printed = YAML(typ="safe").load(capsys.readouterr().out)
    assert (printed["steps"], printed["seed"], printed["batch_size"]) == (7, 2, 6)
    assert (printed["views"]["local_crops_number"], printed["views"]["local_crops_size"]) == (4, 32)


def test_print_config_can_be_read_back(tmp_path, scenes, capsys):
    assert in_process(["pretrain", "--data", str(scenes), "--views.local-crops-number", "3", "--print-config"]) == 0
    (tmp_path / "a.yaml").write_text(capsys.readouterr().out)
    assert in_process(["pretrain", "--config", str(tmp_path / "a.yaml"), "--seed", "5", "--print-config"]) == 0
    text = capsys.readouterr().out
    assert "local_crops_number: 3" in text
    assert "seed: 5" in text


def test_check_accounts_for_every_file(tmp_path, capsys):
    data = make_scenes(tmp_path / "data", 5)
    (data / "broken\x1b[31m.png").write_bytes(b"<html>not found</html>")
    (data / "notes.csv").write_text("a,b")
    code = in_process(["check", str(data), "--json", str(tmp_path / "report.json")])
    captured = capsys.readouterr()
    assert code == 3
    assert "an HTML page, not an image" in captured.out
    assert "\x1b[31m" not in captured.out + captured.err
    import json

    report = json.loads((tmp_path / "report.json").read_text())
    assert report["images"] == 6
    assert report["used"] == 5
    assert report["other_files"] == {".csv": 1}


def test_check_of_clean_data(scenes, capsys):
    assert in_process(["check", str(scenes)]) == 0
    assert "14 readable" in capsys.readouterr().out


def test_preview_draws_the_views(tmp_path, scenes, capsys):
    assert in_process(["preview", str(scenes), "--image", "3", "--out", str(tmp_path / "a.png")]) == 0
    assert in_process(["preview", str(scenes), "--image", "3", "--out", str(tmp_path / "b.png")]) == 0
    assert in_process(["preview", str(scenes), "--image", "3", "--epoch", "1", "--out", str(tmp_path / "c.png")]) == 0
    a, b, c = ((tmp_path / f"{n}.png").read_bytes() for n in "abc")
    assert a == b != c
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.width > 800
    code, err = run_command(capsys, "preview", scenes, "--image", "99", "--out", tmp_path / "d.png")
    assert code == 3
    assert "14 images" in err


def test_preview_reads_as_pretrain_does(tmp_path, capsys):
    values = np.random.default_rng(0).integers(0, 4096, (64, 64)).astype(np.uint16)
    (tmp_path / "data" / "sub").mkdir(parents=True)
    Image.fromarray(values).save(tmp_path / "data" / "sub" / "a.png")
    Image.fromarray(values // 16).save(tmp_path / "data" / "sub" / "a_mask.png")
    (tmp_path / "list.txt").write_text("sub/a_mask.png\nsub/a.png\n")
    root = ["--data-root", str(tmp_path / "data"), "--exclude", "*_mask.png"]
    for name, options in (("dark", []), ("bright", ["--range16", "0", "4095"])):
        where = ["--out", str(tmp_path / f"{name}.png")]
        assert in_process(["preview", str(tmp_path / "list.txt"), *root, *options, *where]) == 0
    assert "sub/a.png -> " in capsys.readouterr().out
    pictures = [np.asarray(Image.open(tmp_path / f"{n}.png")) for n in ("dark", "bright")]
    # medians, because boxes and labels are the same in both
    dark, bright = (float(np.median(picture[45:130, 20:105])) for picture in pictures)
    assert bright > dark + 30
    assert in_process(["check", str(tmp_path / "list.txt"), *root, "--range16", "0", "4095"]) == 0


def test_boxes_at_the_edge_of_a_tile_are_whole():
    hue = (250, 0, 0)
    tile = np.asarray(preview_picture.boxed(torch.zeros(32, 32, 3), torch.tensor([0.0, 0.0, 32.0, 32.0]), hue, 1))
    edge = preview_picture.EDGE
    assert (tile[:edge] == hue).all() and (tile[-edge:] == hue).all() and (tile[:, :edge] == hue).all()
    assert (tile[edge:-edge, edge:-edge] == 0).all()


def test_paths_that_cannot_be_written(tmp_path, scenes, capsys):
    (tmp_path / "file").write_text("")
    for arguments in (
        ["check", scenes, "--json", tmp_path / "file" / "x.json"],
        ["preview", scenes, "--out", tmp_path / "no" / "x.png"],
    ):
        code, err = run_command(capsys, *arguments)
        assert code == 6
        assert "cannot be written" in err


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (123, "2 min 03 s"),
        (3599.6, "1 h 00 min"),
        (7545, "2 h 05 min"),
    ],
)
def test_durations_are_no_times_of_day(seconds, words):
    assert lasting(seconds) == words


@pytest.mark.parametrize(
    ("called", "typed"),
    [("/my things/.venv/bin/gtsa", ["/my things/.venv/bin/gtsa"]), ("train.py", [sys.executable, "-m", "gtsa"])],
)
def test_commands_are_shown_with_a_path_if_gtsa_is_not_on_the_path(monkeypatch, tmp_path, called, typed):
    monkeypatch.setattr(sys, "argv", [called])
    monkeypatch.setenv("PATH", str(tmp_path))
    assert shlex.split(command()) == typed
    (tmp_path / "gtsa").write_text("")
    (tmp_path / "gtsa").chmod(0o755)
    assert command() == "gtsa"


def test_settings_of_another_method_are_reported(scenes, tmp_path, capsys):
    arguments = [
        "--data",
        scenes,
        "--out",
        tmp_path / "run",
        "--model",
        "test_vit",
        "--plan",
        "--views.global-crops-size",
        48,
    ]
    message = "without effect, as the method is gtsa: mae.mask_ratio"
    assert run("pretrain", *arguments, "--mae.mask-ratio", 0.5)[1].count(message) == 1
    assert "without effect" not in run("pretrain", *arguments, "--gtsa.momentum", 0.5)[1]
    message = "without effect, as gtsa.region_loss is cosine and gtsa.image_weight is 0.0: gtsa.num_prototypes\n"
    assert run("pretrain", *arguments, "--gtsa.num-prototypes", 64)[1].count(message) == 1
    used = ("--gtsa.num-prototypes", 64, "--gtsa.region-loss", "prototypes", "--gtsa.region-temp", 0.2)
    assert "without effect" not in run("pretrain", *arguments, *used)[1]


def test_an_empty_folder_is_reported(tmp_path):
    (tmp_path / "empty").mkdir()
    code, _, error = run("check", tmp_path / "empty", "--json", tmp_path / "new" / "report.json")
    assert (code, "no images (it is empty); put" in error) == (3, True) and (tmp_path / "new" / "report.json").exists()
    code, _, error = run("preview", tmp_path / "empty", "--out", tmp_path / "p.png")
    assert (code, "no images" in error) == (3, True)
