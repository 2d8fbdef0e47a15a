"""gtsa embed: the vectors of an export in timm, in files that pandas, pyarrow and numpy read, whole after any stop."""

import json
import os
import re
import shutil
import signal
import time

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
import timm
import torch
from PIL import Image

import gtsa
from conftest import run, scene
from forking import Forked, fork
from gtsa import UserError, embed
from gtsa.evaluation import embedding_files, embedding_work

RANDOM = "random:test_vit"


@pytest.fixture(scope="module")
def expected(finished, scenes):
    """{name: (mean, cls, patches)} by the export of a run in timm, with timm's own transform."""
    model = timm.create_model(f"local-dir:{finished}/exports/timm", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    vectors = {}
    for file in sorted(scenes.iterdir()):
        with torch.no_grad():
            image = transform(Image.open(file).convert("RGB"))[None]
            tokens = model.forward_features(image)[0].numpy()
            vectors[file.name] = (model(image)[0].numpy(), tokens[0], tokens[1:])
    return vectors


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float16", 4e-3)])
def test_vectors_are_those_of_the_export_in_timm(finished, scenes, expected, tmp_path, dtype, tolerance):
    out = tmp_path / "x.parquet"
    code, _, err = run("embed", finished, "--data", scenes, "--out", out, "--tokens", "mean", "cls", "patches", "--dtype", dtype)  # fmt: skip
    assert (code, err) == (0, "")
    table = pd.read_parquet(out)
    assert list(table["name"]) == sorted(expected)
    assert set(zip(table["width"], table["height"], strict=True)) == {(96, 72)}
    for name, *rows in zip(table["name"], table["mean"], table["cls"], table["patches"], strict=True):
        for row, reference in zip(rows, expected[name], strict=True):
            assert row.dtype == dtype
            np.testing.assert_allclose(row.reshape(reference.shape), reference, rtol=0, atol=tolerance)
    facts = {key.decode(): value.decode() for key, value in pq.read_schema(out).metadata.items()}
    assert facts["weights"] == gtsa.load(finished).fingerprint
    assert (facts["model"], facts["patch_size"], facts["grid"]) == ("test_vit", "16", "[3, 3]")
    assert facts["gtsa_version"] == gtsa.__version__
    assert pq.read_schema(out).field("patches").type == pa.list_(pa.from_numpy_dtype(np.dtype(dtype)), 9 * 64)
    assert [path.name for path in tmp_path.iterdir()] == ["x.parquet"]


def test_numpy_files_have_their_names_beside_them(finished, scenes, expected, tmp_path):
    embed(str(finished), scenes, tmp_path / "x.npy")
    vectors = np.load(tmp_path / "x.npy")
    lines = [json.loads(line) for line in (tmp_path / "x.images.jsonl").read_text().splitlines()]
    assert lines[0] == {"name": "scene_00.jpg", "width": 96, "height": 72}
    np.testing.assert_allclose(vectors, [expected[line["name"]][0] for line in lines], rtol=0, atol=1e-5)
    assert json.loads((tmp_path / "x.json").read_text())["embed_dim"] == 64
    embed(str(finished), scenes, tmp_path / "y.npy", ["patches", "cls"])
    assert np.load(tmp_path / "y.patches.npy").shape == (14, 3, 3, 64)
    np.testing.assert_allclose(
        np.load(tmp_path / "y.cls.npy"), [expected[line["name"]][1] for line in lines], atol=1e-5
    )
    assert not (tmp_path / "y.npy").exists()


def test_another_size_need_not_be_square(finished, scenes, tmp_path):
    embed(str(finished), scenes, tmp_path / "x.npy", "patches", size=(32, 64))
    assert np.load(tmp_path / "x.npy").shape == (14, 2, 4, 64)
    with pytest.raises(UserError, match=r"--size 100: .*multiples of the patch of 16 px; use 96"):
        embed(str(finished), scenes, tmp_path / "y.npy", size=100)


@pytest.mark.parametrize("suffix", ["parquet", "npy"])
@pytest.mark.parametrize("workers", [0, 2])
def test_shards_are_one_table_and_equal_one_file(scenes, tmp_path, suffix, workers):
    embed(RANDOM, scenes, tmp_path / f"one.{suffix}", "mean", size=32, batch_size=4)
    many = tmp_path / f"many.{suffix}"
    embed(RANDOM, scenes, many, "mean", size=32, batch_size=4, shard_size=4, workers=workers)
    shards = sorted(many.glob(f"part-*.{suffix}"))
    if suffix == "npy":
        np.testing.assert_array_equal(
            np.concatenate([np.load(shard) for shard in shards]), np.load(tmp_path / "one.npy")
        )
        return
    assert [pq.read_metadata(shard).num_rows for shard in shards] == [4, 4, 4, 2]
    one = pq.read_table(tmp_path / "one.parquet")
    assert pa.dataset.dataset(many).to_table().equals(one)
    pd.testing.assert_frame_equal(pd.read_parquet(many), one.to_pandas())


class Slow(torch.utils.data.Dataset):
    """Scenes that take a moment to read, and are so recorded in a folder."""

    def __init__(self, seen):
        self.seen = seen

    def __len__(self):
        return 10

    def __getitem__(self, index):
        (self.seen / f"{index:02d}").touch()
        time.sleep(0.02)
        return scene(index, 48, 40)


def _embed_slowly(seen, out, options):
    embed(RANDOM, Slow(seen), out, ["mean", "patches"], size=32, batch_size=1, **options)
    return 0


@pytest.mark.parametrize("suffix", ["parquet", "npy"])
@pytest.mark.parametrize("options", [{"shard_size": 2}, {}], ids=["shards", "file"])
def test_killed_and_started_again_it_is_the_same_to_the_byte(tmp_path, monkeypatch, suffix, options):
    monkeypatch.setattr(embedding_work, "PART", 2, raising=False)
    monkeypatch.setattr("gtsa.evaluation.embed.PART", 2)
    for folder in ("whole", "killed", "seen", "again"):
        (tmp_path / folder).mkdir()
    _embed_slowly(tmp_path / "seen", tmp_path / "whole" / f"x.{suffix}", options)
    out = tmp_path / "killed" / f"x.{suffix}"
    shutil.rmtree(tmp_path / "seen")
    (tmp_path / "seen").mkdir()
    process = Forked(_killed, tmp_path / "seen", out, options)
    while process.poll() is None and not (tmp_path / "seen" / "05").exists():
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not out.exists()
    _embed_slowly(tmp_path / "again", out, options)
    assert sorted(path.name for path in (tmp_path / "again").iterdir())[0] >= "04"  # finished parts are not read again
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def _killed(seen, out, options):
    import gtsa.evaluation.embed as module

    module.PART = 2
    return _embed_slowly(seen, out, options)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Images that cannot be read


@pytest.fixture
def with_a_bad_one(scenes, tmp_path):
    folder = shutil.copytree(scenes, tmp_path / "data")
    (folder / "scene_03.png").write_bytes(b"\x89PNG nothing")
    return folder


@pytest.mark.parametrize("options", [{"shard_size": 4}, {}], ids=["shards", "file"])
def test_a_bad_file_is_named_left_out_and_recorded(with_a_bad_one, tmp_path, options, capsys):
    done = embed(RANDOM, with_a_bad_one, tmp_path / "x.parquet", size=32, **options)
    assert (done.images, [name for name, _ in done.left_out]) == (13, ["scene_03.png"])
    assert "left out: scene_03.png: not a JPEG" in capsys.readouterr().out
    assert "scene_03.png" not in set(pd.read_parquet(tmp_path / "x.parquet")["name"])
    record = tmp_path / ("x.parquet/_left_out-00000.jsonl" if options else "x.left_out.jsonl")
    assert json.loads(record.read_text())["name"] == "scene_03.png"


def test_too_many_bad_files_stop_it_and_it_resumes_when_they_are_repaired(with_a_bad_one, scenes, tmp_path):
    (with_a_bad_one / "scene_05.png").write_bytes(b"")
    arguments = ("embed", RANDOM, "--data", with_a_bad_one, "--out", tmp_path / "x.npy", "--size", "32")
    code, _, err = run(*arguments)
    assert code == 3
    assert "2 of 14 images cannot be read" in err and "scene_05.png: empty file" in err and "--max-bad" in err
    assert not (tmp_path / "x.npy").exists()
    assert run(*arguments, "--max-bad", "0.2")[0] == 0
    assert len(np.load(tmp_path / "x.npy")) == 12


def test_a_name_that_is_no_text(tmp_path):
    (tmp_path / "data").mkdir()
    scene(0).save(os.fsencode(tmp_path / "data") + b"/caf\xe9.png")
    embed(RANDOM, tmp_path / "data", tmp_path / "x.parquet", size=32)
    assert pd.read_parquet(tmp_path / "x.parquet")["name"][0] == "caf\\xe9.png"


# Mistakes


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--out", "x.csv"], 2, "has to end with .parquet or .npy"),
        (["--out", "x.npy", "--max-bad", "2"], 2, "from 0 to 1"),
        (["--out", "x.npy", "--tokens", "both"], 2, "both"),
        (["--out", "x.npy", "--size", "20"], 2, "multiples of the patch of 16 px; use 16"),
        (["--out", "exists.npy"], 2, "exists already"),
        (["--out", "exists.npy/x.npy"], 6, "cannot be written"),
        (["--out", "x.npy", "--include", "*.gif"], 3, "--include *.gif leaves none of 14 images"),
    ],
)
def test_mistakes(scenes, tmp_path, monkeypatch, flags, code, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "exists.npy").write_text("mine")
    actual, _, err = run("embed", RANDOM, "--data", scenes, *flags)
    assert actual == code and message in err
    assert [path.name for path in tmp_path.iterdir()] == ["exists.npy"]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ({"out": "x.csv"}, 2, "--out x.csv: the name has to end with .parquet or .npy"),
        ({"out": "exists.npy"}, 2, "--out exists.npy exists already; give another file"),
        ({"out": "exists.npy/x.npy"}, 6, "exists.npy is a file; give a file in another folder"),
        ({"out": "/proc/x/x.npy"}, 6, "--out /proc/x/x.npy cannot be written: /proc takes no files"),
        ({"out": "y.npy", "tokens": ("mean", "cls")}, 2, "--out y.mean.npy exists already; give another file"),
        ({"out": "z.npy"}, 2, "--out z.images.jsonl exists already; give another file"),
        ({"tokens": "both"}, 2, "--tokens both: choose from mean, cls, patches"),
        ({"dtype": "int8"}, 2, "--dtype int8: choose from float32, float16"),
        ({"size": 0}, 2, "--size 0: give one side, or height and width"),
        ({"size": (32, 32, 32)}, 2, "--size 32 32 32: give one side"),
        ({"shard_size": 0}, 2, "--shard-size 0: give at least 1"),
        ({"workers": -1}, 2, "--workers -1: give 0"),
        ({"batch_size": 0}, 2, "--batch-size 0: give at least 1"),
        ({"max_bad": 2}, 2, "--max-bad 2: give a share"),
        ({"range16": (9, 3)}, 2, "--range16 9 3: black must be below white"),
        ({"range16": (0, float("inf"))}, 2, "--range16 0 inf"),
    ],
)
def test_mistakes_are_reported_before_weights_are_read(scenes, tmp_path, monkeypatch, options, code, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gtsa.evaluation.embed.load_backbone", lambda *_: pytest.fail("weights were read"))
    for name in ("exists.npy", "y.mean.npy", "z.images.jsonl"):
        (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=re.escape(message)) as error:
        embed(RANDOM, scenes, **{"out": "x.npy", **options})
    assert error.value.code == code


def test_parquet_without_pyarrow(scenes, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs pyarrow; install with: pip install 'gtsa\[embed\]'"):
        embed(RANDOM, scenes, tmp_path / "x.parquet")


def test_the_unfinished_work_of_another_command_is_kept(with_a_bad_one, tmp_path):
    (with_a_bad_one / "scene_05.png").write_bytes(b"")
    with pytest.raises(UserError, match="cannot be read"):
        embed(RANDOM, with_a_bad_one, tmp_path / "x.npy", size=32)
    with pytest.raises(UserError, match=r"size was \[32, 32\], now \[48, 48\].*Give that command again, or remove"):
        embed(RANDOM, with_a_bad_one, tmp_path / "x.npy", size=48)


def test_two_commands_do_not_write_the_same_file(scenes, tmp_path):
    form = embedding_files.Numpy({"mean": (2,)}, "float32", {})
    first, second = (embedding_work.work_folder(tmp_path / "x.npy", form, {"a": 1}) for _ in range(2))
    with first, pytest.raises(UserError, match="another process is writing") as error, second:
        pass
    assert error.value.code == 6


def test_ctrl_c_says_how_to_go_on(tmp_path, scenes):
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(400):
        os.link(scenes / "scene_01.png", folder / f"{number}.png")
    process = fork(
        "embed", RANDOM, "--data", folder, "--out", tmp_path / "x.npy", "--batch-size", 1, "--shard-size", 10
    )
    while process.poll() is None and not list(tmp_path.glob(".x.npy.unfinished/part-*")):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert (process.returncode, "the same command resumes" in err) == (130, True)
