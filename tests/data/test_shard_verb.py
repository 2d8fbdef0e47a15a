"""gtsa shard: the files as they are, the same bytes again, and what is refused or left out."""

import json
import os
import random
import shutil
import signal
import tarfile
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gtsa
from conftest import run
from forking import fork
from gtsa.core.errors import UserError
from gtsa.data.shards.shard_plan import Limits, limits_of, split
from gtsa.data.sources import open_source


@pytest.fixture
def photos(scenes, tmp_path):
    """14 scenes, some in a folder with an odd name, and beside them a damaged one and a label."""
    folder = shutil.copytree(scenes, tmp_path / "photos")
    (folder / "añ\n").mkdir()
    for file in sorted(folder.glob("*.*"))[:4]:
        file.rename(folder / "añ\n" / file.name)
    (folder / "zz.jpg").write_text("no image")
    (folder / "labels.json").write_text("{}")
    return folder


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def tars(folder):
    return {name: raw for name, raw in content(folder).items() if name.endswith(".tar")}


def test_it_packs_the_files_as_they_are(photos, tmp_path):
    out = tmp_path / "shards"
    code, printed, _ = run("shard", photos, "--out", out, "--images-per-shard", "5")
    assert code == 0
    assert "left out: zz.jpg: not a JPEG" in printed and "not packed: 1 .json" in printed
    assert f"{out}: 14 images in 3 shards" in printed and f"pretrain --data {out} --out" in printed
    packed = {}
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as archive:
            packed |= {m.name: archive.extractfile(m).read() for m in archive}
            assert all((m.mtime, m.uid, m.uname) == (0, 0, "") for m in archive)
    files = {str(p.relative_to(photos)): p.read_bytes() for p in photos.rglob("*") if p.is_file()}
    assert packed == {name: raw for name, raw in files.items() if name not in ("zz.jpg", "labels.json")}
    record = json.loads((out / "shards.json").read_text())
    assert [shard["images"] for shard in record["shards"]] == [5, 5, 4]
    assert [entry["name"] for entry in record["left_out"]] == ["zz.jpg"]


def test_shards_hold_the_images_of_the_folder_in_its_order(photos, tmp_path):
    (photos / "zz.jpg").unlink()
    out = gtsa.shard(str(photos), str(tmp_path / "shards"), images_per_shard=4)
    folder, shards = open_source(str(photos)), open_source(str(out))
    assert [shards.name(i).partition("/")[2] for i in range(len(shards))] == [
        folder.name(i) for i in range(len(folder))
    ]
    assert all(torch.equal(folder.read(i), shards.read(i)) for i in range(len(folder)))
    again = gtsa.shard(str(out), str(tmp_path / "repacked"), images_per_shard=100)
    assert len(open_source(str(again))) == len(shards)


def test_the_same_images_give_the_same_bytes(photos, tmp_path):
    listed = photos / "list.txt"
    listed.write_text("\n".join(str(p.relative_to(photos)) for p in photos.rglob("*.png") if "\n" not in str(p)))
    for out in ("a", "b"):
        gtsa.shard(str(listed), str(tmp_path / out), shard_size="5kB")
        os.utime(next(photos.glob("*.png")))
    assert tars(tmp_path / "a") == tars(tmp_path / "b")
    assert len(tars(tmp_path / "a")) > 1


def test_damaged_images_are_packed_if_wanted(photos, tmp_path):
    out = gtsa.shard(str(photos), str(tmp_path / "all"), keep_bad=True)
    source = open_source(str(out))
    assert source.name(len(source) - 1) == "000000.tar/zz.jpg"


def test_it_resumes_shard_by_shard(photos, tmp_path, monkeypatch):
    whole = gtsa.shard(str(photos), str(tmp_path / "whole"), images_per_shard=3)
    out = gtsa.shard(str(photos), str(tmp_path / "part"), images_per_shard=3)
    record = json.loads((out / "shards.json").read_text())
    kept = (out / "000000.tar").stat().st_mtime_ns
    (out / "shards.json").write_text(json.dumps(record | {"shards": record["shards"][:2], "left_out": []}))
    (out / "000003.tar").unlink()
    (out / ".000002.tar.999999999").write_bytes(b"half")
    code, printed, _ = run("shard", photos, "--out", out, "--images-per-shard", "3")
    assert code == 0 and "2 of 5 shards are complete" in printed and "left out: zz.jpg" in printed
    assert tars(out) == tars(whole)
    assert (out / "000000.tar").stat().st_mtime_ns == kept
    assert set(content(out)) == set(content(whole))


def test_it_may_be_killed_at_any_time(photos, tmp_path):
    whole = gtsa.shard(str(photos), str(tmp_path / "whole"), images_per_shard=1)
    out = tmp_path / "out"
    process = fork("shard", photos, "--out", out, "--images-per-shard", "1")
    while len(list(out.glob("*.tar"))) < random.randint(1, 12) and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    gtsa.shard(str(photos), str(out), images_per_shard=1)
    assert tars(out) == tars(whole)
    assert set(content(out)) == set(content(whole))


def test_what_is_refused(photos, tmp_path):
    def refused(code, *words, data=photos, out=tmp_path / "out", **options):
        with pytest.raises(UserError) as caught:
            gtsa.shard(str(data), str(out), **options)
        assert caught.value.code == code, caught.value
        assert all(word in str(caught.value) for word in words), caught.value

    gtsa.shard(str(photos), str(tmp_path / "out"))
    refused(8, "other images or settings", images_per_shard=3)
    (photos / "zz.jpg").write_text("another size")
    refused(8, "the images have changed since")
    refused(8, "holds other files", out=photos)
    (tmp_path / "out" / "mine.txt").write_text("")
    refused(8, "mine.txt")
    refused(2, "is a file", out=photos / "zz.jpg")
    refused(2, "--images-per-shard 0", images_per_shard=0)
    (tmp_path / "empty").mkdir()
    refused(3, "no images", data=tmp_path / "empty", out=tmp_path / "new")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_text("")
    refused(3, "none of 1 images can be used", data=tmp_path / "bad", out=tmp_path / "new")


def test_a_shard_that_was_changed_is_not_taken_for_complete(photos, tmp_path):
    out = gtsa.shard(str(photos), str(tmp_path / "out"))
    with open(out / "000000.tar", "ab") as file:
        file.write(b"more")
    code, _, err = run("shard", photos, "--out", out)
    assert code == 8 and "000000.tar is missing or was changed" in err
    (out / "shards.json").write_text("{")
    assert run("shard", photos, "--out", out)[0] == 8


@pytest.mark.parametrize(
    ("text", "size"), [("1GB", 10**9), ("1.5 MiB", 3 * 2**19), ("500mb", 5 * 10**8), ("2kB", 2000), ("1TiB", 2**40)]
)
def test_sizes(text, size):
    assert limits_of(text, None) == Limits(size, None)


@pytest.mark.parametrize("text", ["", "1", "GB", "0MB", "1 XB", "1e9GB"])
def test_a_size_needs_a_number_and_a_unit(text):
    code, _, err = run("shard", ".", "--out", "nowhere", "--shard-size", text)
    assert code == 2 and "500MB or 1GiB" in err


@given(
    st.lists(st.integers(0, 5000), max_size=40),
    st.one_of(st.builds(Limits, st.integers(1, 20_000), st.none()), st.builds(Limits, st.none(), st.integers(1, 9))),
)
def test_shards_are_full_and_in_order(sizes, limits):
    shards = split(sizes, limits)
    assert [index for shard in shards for index in shard] == list(range(len(sizes)))
    assert all(shards)

    def fits(images):
        if limits.images is not None:
            return len(images) <= limits.images
        return sum(512 + -(-sizes[i] // 512) * 512 for i in images) <= limits.bytes

    for shard, following in zip(shards, [*shards[1:], None], strict=False):
        assert len(shard) == 1 or fits(shard)
        assert following is None or not fits([*shard, following[0]])
