"""The list of a run: written and read line by line, and opened again without a look at the files."""

import json
import os
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from gtsa.data import frozen, scan, threaded
from gtsa.data.frozen import list_line, parse_list
from gtsa.data.images import decoding
from gtsa.data.images.pixels import BadImage
from gtsa.data.run_images import ImageSettings, RunImages, scan_images
from gtsa.data.sources import Selection, open_source
from gtsa.data.threaded import map_short


class Names:
    """A source of files of which the names and sizes alone matter."""

    def __init__(self, entries):
        self.entries = entries

    def name(self, index):
        return self.entries[index][0]

    def size(self, index):
        return self.entries[index][1]

    def file(self, index):
        return self.name(index)


entry = st.tuples(
    st.text(min_size=1) | st.binary(min_size=1).map(os.fsdecode),
    st.integers(0, 2**40),
    st.none() | st.tuples(st.integers(1, 10**5), st.integers(1, 10**5)),
)


@given(st.lists(entry, max_size=8), st.integers(1, 4))
def test_lines_are_those_of_json_and_are_read_again(entries, together):
    source = Names(entries)
    lines = [list_line(source, i, entries[i][2]) for i in range(len(entries))]
    for line, (name, size, sides) in zip(lines, entries, strict=True):
        expected = {"name": name, "bytes": size} | (dict(zip(("width", "height"), sides, strict=True)) if sides else {})
        assert line == json.dumps(expected) + "\n"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frozen, "TOGETHER", together)
        listed = parse_list("".join(lines).encode())
    assert listed.names == [name for name, _, _ in entries]
    assert listed.sizes.tolist() == [[size, *(sides or (0, 0))] for _, size, sides in entries]


@pytest.mark.parametrize(
    "line", ['{"name": "a", "bytes": "x"}', '{"bytes": 1}', "[1]", '"a"', "{", "", '{"name": "a", "bytes": 1e99}']
)
def test_a_damaged_line_is_refused(line):
    with pytest.raises(ValueError, match="."):
        parse_list(f'{{"name": "b.png"}}\n{line}\n'.encode())


@pytest.fixture
def begun(tmp_path):
    """(data, settings) of a run on a list file, and what its folder holds."""
    for n in range(12):
        path = tmp_path / "data" / f"{n % 3}" / f"{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((20, 20, 3), n, np.uint8)).save(path)
    settings = ImageSettings(str(tmp_path), 0, 2, 0.5, (0, 65535), None)
    (tmp_path / "list.txt").write_text("\n".join(f"data/{n % 3}/{n}.png" for n in range(12)))
    return tmp_path, settings


@pytest.mark.parametrize("data", ["data", "list.txt"])
def test_resume_lists_nothing_and_notices_what_is_missing_when_it_is_read(begun, data, monkeypatch):
    folder, settings = begun
    for name, text in scan_images(str(folder / data), data, Selection(), 0.5).items():
        (folder / name).write_text(text)

    def refuse(*_):
        raise AssertionError("a resumed run looks at its files when it reads them")

    with monkeypatch.context() as patch:
        patch.setattr(decoding, "read_header", refuse)
        patch.setattr(os.path, "getsize", refuse)
        patch.setattr("gtsa.data.sources.folder.Folder._walk", refuse)
        patch.setattr("gtsa.data.sources.list_file.Listing._read_paths", refuse)
        images = RunImages(str(folder / data), settings, print)
    assert len(images.source) == 12
    (folder / "data" / "0" / "0.png").unlink()
    with pytest.raises(BadImage, match="No such file"):
        images.source.read(0)


def test_links_in_a_list_lead_where_they_lead(tmp_path):
    """Folders are resolved once, files that are links each."""
    for name in ("real/a.png", "real/b.png", "c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "real" / "b.png").write_bytes(b"12345")
    (tmp_path / "linked").symlink_to("real")
    (tmp_path / "d.png").symlink_to("real/b.png")
    lines = ["linked/a.png", "real/../c.png", "./d.png", f"{tmp_path}/real/a.png", "linked/../linked/b.png"]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    source = open_source(str(tmp_path / "list.txt"))
    assert [source.name(i) for i in range(len(source))] == ["c.png", "real/a.png", "real/b.png"]
    assert [source.size(i) for i in range(3)] == [0, 0, 5]
    assert source.ignored == {"repeated": 2}


def test_a_long_scan_names_its_phases(begun, monkeypatch, capsys):
    folder, _ = begun
    monkeypatch.setattr(scan, "DECODED", 0)
    for module in ("folder", "list_file"):
        monkeypatch.setattr(f"gtsa.data.sources.{module}.EVERY", 1)
    monkeypatch.setattr("gtsa.data.run_images.EVERY", 1)
    ticks = iter(range(0, 10**6, 40))
    monkeypatch.setattr("gtsa.core.terminal.time.perf_counter", lambda: next(ticks))
    for data in ("data", "list.txt"):
        scan_images(str(folder / data), data, Selection(), 0.5)
        printed = capsys.readouterr().out
        assert all(f"\n{phase}" in printed for phase in ("listed 12", "headers read: 12 of 12", "sizes read: 11 of 12"))


@pytest.mark.parametrize("waits", [False, True])
def test_short_work_is_done_in_order_by_threads_if_it_waits(waits, monkeypatch):
    monkeypatch.setattr(threaded, "BLOCK", 40)
    used = []
    inner = threaded.map_in_order
    monkeypatch.setattr(threaded, "map_in_order", lambda work, items: used.append(len(items)) or inner(work, items))
    monkeypatch.setattr(threaded, "WAITING", 1e6 if not waits else threaded.WAITING)

    def work(item):
        if waits:
            time.sleep(0.001)
        return 2 * item

    assert list(map_short(work, range(100))) == list(range(0, 200, 2))
    assert used == ([24, 24, 4] if waits else [])
