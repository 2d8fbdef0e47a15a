"""Tar shards as a source: on disk, in memory and behind a real HTTP server; cut, changed, missing and compressed ones."""

import importlib.util
import io
import json
import os
import shutil
import tarfile

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image
from serving import Plain, Ranges, served

from conftest import run
from gtsa.core.errors import UserError
from gtsa.core.files import cache_folder
from gtsa.data.images.decoding import SUFFIXES
from gtsa.data.images.pixels import BadImage
from gtsa.data.shards import shard_index, storage
from gtsa.data.sources import Selection, open_source
from gtsa.data.sources.folder import Folder
from gtsa.data.sources.shards import Shards


def encoded(seed, form="PNG", size=(40, 30)):
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3)).astype(np.uint8)
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


def put(path, members):
    """A tar file of {name: bytes}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


IMAGES = {f"{n:02d}.{form.lower()}": encoded(n, form) for n, form in enumerate(("PNG", "WEBP", "BMP", "TIFF", "PNG"))}


@pytest.fixture
def shards(tmp_path):
    """Two shards with five images and two other files."""
    names = list(IMAGES)
    put(tmp_path / "s" / "000.tar", {name: IMAGES[name] for name in names[:3]} | {"00.json": b"{}"})
    put(tmp_path / "s" / "001.tar", {name: IMAGES[name] for name in names[3:]} | {"03.cls": b"1"})
    return tmp_path / "s"


def names(source):
    return [source.name(i) for i in range(len(source))]


def pixels(source):
    return [source.read(i) for i in range(len(source))]


def same(a, b):
    return len(a) == len(b) and all(map(torch.equal, a, b))


def reasons(source):
    result = {}
    for i in range(len(source)):
        try:
            source.read(i)
        except BadImage as reason:
            result[source.name(i)] = str(reason)
    return result


def refused(data, code=3, **options):
    with pytest.raises(UserError) as caught:
        open_source(str(data), **options)
    assert caught.value.code == code
    return str(caught.value)


@pytest.fixture
def expected(tmp_path):
    """The pixels of IMAGES as files in a folder."""
    folder = tmp_path / "plain"
    folder.mkdir()
    for name, data in IMAGES.items():
        (folder / name).write_bytes(data)
    return pixels(Folder(str(folder)))


EXPECTED = ["000.tar/00.png", "000.tar/01.webp", "000.tar/02.bmp", "001.tar/03.tiff", "001.tar/04.png"]


@pytest.mark.parametrize("pattern", ["", "/*.tar", "/00?.tar", "/{000..001}.tar", "/{000,001}.tar", "/[0-9]*.tar"])
def test_a_folder_and_patterns_name_the_same_images(shards, expected, pattern):
    source = open_source(f"{shards}{pattern}")
    assert isinstance(source, Shards)
    assert names(source) == EXPECTED
    assert same(pixels(source), expected)
    assert [source.size(i) for i in range(5)] == [len(data) for data in IMAGES.values()]
    assert source.ignored == {".json": 1, ".cls": 1}
    assert not source.unreadable


def test_one_shard_and_nested_ones(shards, tmp_path):
    assert names(open_source(str(shards / "001.tar"))) == EXPECTED[3:]
    shutil.copytree(shards, tmp_path / "many" / "a")
    shutil.copytree(shards, tmp_path / "many" / "b" / "c")
    source = open_source(f"{tmp_path}/many/**/*.tar")
    assert names(source) == [f"{folder}/{name}" for folder in ("a", "b/c") for name in EXPECTED]


def test_paths_relative_to_here(shards, monkeypatch):
    monkeypatch.chdir(shards)
    assert names(open_source("*.tar")) == names(open_source(".")) == EXPECTED


def test_the_order_is_that_of_bytes(tmp_path):
    members = ["b.png", "a.png", "a/z.png", "a b.png", "Z.png", "ä.png", "10.png", "9.png"]
    put(tmp_path / "0.tar", dict.fromkeys(members, b"x"))
    assert names(Shards(str(tmp_path / "0.tar"))) == [f"0.tar/{name}" for name in sorted(members, key=str.encode)]


def test_a_folder_of_images_with_an_archive_in_it_stays_a_folder(shards):
    (shards / "a.png").write_bytes(IMAGES["00.png"])
    source = open_source(str(shards))
    assert isinstance(source, Folder)
    assert (names(source), source.ignored) == (["a.png"], {".tar": 2})


def test_a_folder_with_folders_stays_a_folder(shards):
    (shards / "images").mkdir()
    assert isinstance(open_source(str(shards)), Folder)


def test_patterns_select_members(shards):
    source = open_source(str(shards), Selection(include=("*.png",), exclude=("04*",)))
    assert names(source) == ["000.tar/00.png"]
    assert source.ignored["not chosen"] == 4


# The index


def opened_headers(monkeypatch):
    """Counts how often the headers of a shard are read."""
    calls = []
    read = shard_index.read_index
    monkeypatch.setattr(shard_index, "read_index", lambda *given: (calls.append(given[1]), read(*given))[1])
    return calls


def test_the_index_is_read_once_and_lies_beside_the_shards(shards, monkeypatch):
    calls = opened_headers(monkeypatch)
    open_source(str(shards))
    assert len(calls) == 2
    assert sorted(p.name for p in shards.iterdir()) == ["000.tar", "000.tar.index", "001.tar", "001.tar.index"]
    assert names(open_source(str(shards))) == EXPECTED
    assert len(calls) == 2


def test_without_permission_the_index_lies_in_the_cache_folder(shards, monkeypatch):
    calls = opened_headers(monkeypatch)
    store = shard_index.store

    def read_only(path, data):
        if path.parent == shards:
            raise PermissionError(13, "Permission denied")
        store(path, data)

    monkeypatch.setattr(shard_index, "store", read_only)
    before = set((cache_folder() / "shards").glob("*"))
    for _ in range(2):
        assert names(open_source(str(shards))) == EXPECTED
    assert len(calls) == 2
    assert len(set((cache_folder() / "shards").glob("*")) - before) == 2


@pytest.mark.parametrize("same_size", [True, False])
def test_a_stale_index_is_made_again(shards, same_size):
    open_source(str(shards))
    other = {"aa.tiff": IMAGES["03.tiff"], "bb.png": IMAGES["04.png"] if same_size else b"x" * 20_000, "b.cls": b"1"}
    was = (shards / "001.tar").stat()
    put(shards / "001.tar", other)
    assert (was.st_size == (shards / "001.tar").stat().st_size) == same_size
    assert names(open_source(str(shards)))[3:] == ["001.tar/aa.tiff", "001.tar/bb.png"]


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"schema": 1}'])
def test_a_damaged_index_is_made_again(shards, damage):
    open_source(str(shards))
    (shards / "000.tar.index").write_bytes(damage)
    assert names(open_source(str(shards))) == EXPECTED


# What is wrong


def test_a_cut_shard_keeps_its_whole_images(shards):
    index = json.loads(shard_index.to_json(shard_index.write_index(shards / "001.tar"), {}))
    raw = (shards / "001.tar").read_bytes()
    (shards / "001.tar").write_bytes(raw[: index["offsets"][1] + 10])
    source = open_source(str(shards))
    assert names(source) == EXPECTED
    assert reasons(source) == {"001.tar/04.png": "cut off: the archive ends within it"}
    assert source.unreadable == [("001.tar", "the archive is cut off")]
    code, out, err = run("check", shards)
    assert code == 3
    assert "001.tar/04.png: cut off" in out and "001.tar: the archive is cut off" in out
    assert "1 of 5 images cannot be used" in err


def test_a_damaged_member_is_named(tmp_path):
    broken = bytearray(IMAGES["00.png"])
    broken[500] ^= 1
    put(tmp_path / "0.tar", {"a.png": bytes(broken), "b.png": b"text", "c.png": b"", "d.png": IMAGES["00.png"]})
    found = reasons(open_source(str(tmp_path / "0.tar")))
    assert list(found) == ["0.tar/a.png", "0.tar/b.png", "0.tar/c.png"]
    assert "wrong checksum" in found["0.tar/a.png"] and found["0.tar/c.png"] == "empty file"


def test_a_shard_that_changes_while_it_is_open(shards):
    source = open_source(str(shards))
    put(shards / "000.tar", {"other.png": IMAGES["04.png"]})
    assert set(reasons(source)) == set(EXPECTED[:3])
    assert "000.tar has changed since it was listed" in reasons(source)[EXPECTED[0]]


def test_a_missing_number_of_a_range_is_named(shards):
    assert "000.tar" not in refused(f"{shards}/{{000..002}}.tar").split(":")[-1]
    assert "002.tar does not exist" in refused(f"{shards}/{{000..002}}.tar")


def test_a_pattern_without_a_match(tmp_path):
    assert "no shard can be read (none matches)" in refused(f"{tmp_path}/*.tar")


@pytest.mark.parametrize("data", [b"", b"text " * 300, b"\0" * 100])
def test_what_is_no_archive_is_named(shards, data):
    (shards / "001.tar").write_bytes(data)
    source = open_source(str(shards))
    assert names(source) == EXPECTED[:3]
    assert source.unreadable[0][0] == "001.tar" and "not a tar archive" in source.unreadable[0][1]
    assert "001.tar: not a tar archive" in run("check", shards)[1]


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz", "x.tgz"])
def test_compressed_archives_are_refused(tmp_path, name):
    with tarfile.open(tmp_path / name, "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a.png"))
    assert "compressed" in refused(tmp_path / name) and "a .tar file" in refused(tmp_path / name).replace("plain ", "")
    code, _, err = run("check", tmp_path / name)
    assert code == 3 and "compressed" in err


def test_named_images_that_are_gone_have_a_reason(shards):
    wanted = [EXPECTED[4], "002.tar/x.png", EXPECTED[0], "001.tar/gone.png"]
    source = open_source(str(shards), files=wanted)
    assert names(source) == wanted
    assert reasons(source) == dict.fromkeys([wanted[1], wanted[3]], "no longer in the shards")
    assert [source.size(i) > 0 for i in range(4)] == [True, False, True, False]
    (shards / "001.tar").unlink()
    assert set(reasons(open_source(f"{shards}/{{000..001}}.tar", files=wanted))) == {wanted[0], wanted[1], wanted[3]}


# Other verbs


def test_check_decodes_every_image_in_shards(shards, tmp_path):
    code, out, _ = run("check", shards, "--json", tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    assert code == 0 and "5 readable" in out
    assert (report["used"], report["decoded"], report["formats"]["PNG RGB"]) == (5, 5, 2)


def test_evaluation_without_labels_reads_shards(shards):
    from gtsa.data.labels import open_labelled

    for pattern in ("", "/{000..001}.tar"):
        data = open_labelled(f"{shards}{pattern}", None, "none")
        assert [data.name(i) for i in range(len(data))] == EXPECTED


def test_the_explorer_reads_shards(shards):
    from gtsa.evaluation.explore.gallery import Images

    images = Images(open_source(str(shards)), digests=None, salt="")
    assert len({images.digest(i) for i in range(5)}) == 5
    assert images.picture(0, 0, 16)[:2] == b"\xff\xd8"


# Elsewhere


@pytest.fixture
def remote(shards):
    """The shards behind HTTP with ranges, without an index beside them."""
    with served(shards) as url:
        yield url


def test_shards_behind_http_are_those_on_disk(remote, expected):
    source = open_source(f"{remote}/{{000..001}}.tar")
    assert names(source) == EXPECTED
    assert same(pixels(source), expected)


def test_a_signed_address_is_no_part_of_a_name(remote):
    assert names(open_source(f"{remote}/001.tar?key=secret*")) == EXPECTED[3:]


def test_only_ranges_are_requested_and_the_index_is_kept(remote, shards):
    put(
        shards / "000.tar",
        {"a.png": IMAGES["00.png"], "big.bin": bytes(10 * storage.WINDOW), "b.png": IMAGES["04.png"]},
    )
    for _ in range(2):
        assert len(open_source(f"{remote}/000.tar")) == 2
    tars = [requested for path, requested in Ranges.requests if path.endswith(".tar")]
    assert len(tars) == 3 and all(tars)  # one byte, two windows; none the second time
    assert not (shards / "000.tar.index").exists()
    put(shards / "000.tar", {"c.png": IMAGES["00.png"]})
    assert names(open_source(f"{remote}/000.tar")) == ["000.tar/c.png"]


def test_an_uploaded_index_is_used_if_it_fits(remote, shards, monkeypatch):
    for name in ("000.tar", "001.tar"):
        shard_index.write_index(shards / name)
    os.utime(shards / "000.tar", (1, 1))  # a copy has another time
    calls = opened_headers(monkeypatch)
    assert names(open_source(f"{remote}/{{000..001}}.tar")) == EXPECTED
    assert not calls


def test_an_uploaded_index_of_another_archive_of_that_size_is_not_used(remote, shards):
    put(shards / "0.tar", {"a.png": IMAGES["00.png"], "b.png": IMAGES["00.png"]})
    shard_index.write_index(shards / "0.tar")
    size = (shards / "0.tar").stat().st_size
    put(shards / "0.tar", {"a.png": IMAGES["00.png"] + b"x", "c.png": IMAGES["00.png"]})
    assert (shards / "0.tar").stat().st_size == size
    assert names(open_source(f"{remote}/0.tar")) == ["0.tar/a.png", "0.tar/c.png"]


def test_a_server_without_ranges_is_refused(shards):
    with served(shards, Plain) as url:
        message = refused(f"{url}/000.tar")
    assert "does not send parts of files (byte ranges); download the shards first" in message
    assert all(
        path != "/000.tar"
        or requested == f"bytes={(shards / '000.tar').stat().st_size - 1}-{(shards / '000.tar').stat().st_size - 1}"
        for path, requested in Plain.requests
    )


def test_what_is_not_there_behind_http(remote):
    assert "009.tar does not exist" in refused(f"{remote}/009.tar")
    assert names(open_source(f"{remote}/009.tar", files=["009.tar/a.png"])) == ["009.tar/a.png"]


def test_a_server_that_goes_away_costs_the_image_and_says_why(shards, monkeypatch):
    monkeypatch.setattr(storage.time, "sleep", lambda _: None)
    with served(shards) as url:
        source = open_source(f"{url}/000.tar")
    assert set(reasons(source)) == set(EXPECTED[:3])
    assert all(reason.startswith(url) for reason in reasons(source).values())


def test_a_failed_request_is_repeated(monkeypatch):
    files = fsspec.filesystem("memory")
    files.pipe("/again/0.tar", b"1234")
    stored, calls, pauses = storage.RemoteFile("memory://again/0.tar"), [], []
    monkeypatch.setattr(storage.time, "sleep", pauses.append)

    def flaky(path, start, end):
        calls.append(path)
        if len(calls) < 3:
            raise ConnectionError("reset")
        return b"1234"[start:end]

    monkeypatch.setattr(files, "cat_file", flaky)
    assert stored.read(1, 2) == b"23"
    assert pauses == [0.5, 1.0]


@pytest.mark.parametrize("protocol", ["memory://bucket/set", "file"])
def test_object_storage_by_folder_pattern_and_name(shards, expected, tmp_path, protocol):
    url = protocol
    if protocol == "file":
        url = f"file://{shards}"
    else:
        files = fsspec.filesystem("memory")
        for path in shards.glob("*.tar"):
            files.pipe(f"/bucket/set/{path.name}", path.read_bytes())
        files.pipe("/bucket/set/notes.txt", b"")
    for pattern in ("", "/*.tar", "/{000..001}.tar"):
        source = open_source(f"{url}{pattern}")
        assert names(source) == EXPECTED
        assert same(pixels(source), expected)


@pytest.mark.parametrize(
    ("url", "module"), [("s3://b/s", "s3fs"), ("gs://b/*.tar", "gcsfs"), ("https://h/0.tar", "aiohttp")]
)
def test_a_missing_library_is_named_with_its_extra(monkeypatch, url, module):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else find(name))
    for command in (("check", url), ("pretrain", "--data", url, "--out", "run")):
        code, _, err = run(*command)
        assert code == 2 and f"needs {module}; install with: pip install 'gtsa[cloud]'" in err


def test_an_unknown_protocol_is_named():
    code, _, err = run("check", "ipx://somewhere/0.tar")
    assert code == 2 and "ipx" in err


@pytest.mark.parametrize(
    ("data", "paths"),
    [
        ("a/{8..11}.tar", ["a/10.tar", "a/11.tar", "a/8.tar", "a/9.tar"]),
        ("a/{08..11}.tar", ["a/08.tar", "a/09.tar", "a/10.tar", "a/11.tar"]),
        ("{a,b}/{0..1}.tar", ["a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar"]),
        ("a{x}.tar", ["a{x}.tar"]),
    ],
)
def test_braces(data, paths):
    assert storage.expand(data, ".tar") == paths


@pytest.mark.parametrize(
    ("data", "root"),
    [
        ("a/b/{0..1}.tar", "a/b"), ("a/*/0.tar", "a"), ("*.tar", ""), ("s3://bucket/x/*.tar", "s3://bucket/x"),
        ("s3://bucket/x/", "s3://bucket/x"), ("s3://bucket/x/0.tar", "s3://bucket/x"),
        ("https://h/a/0.tar?key=*", "https://h/a"),
    ],
)  # fmt: skip
def test_names_start_below_the_fixed_part(data, root):
    assert storage.fixed_part(data) == root


def test_suffixes_of_images_are_those_of_folders():
    assert ".jpg" in SUFFIXES and ".tar" not in SUFFIXES
