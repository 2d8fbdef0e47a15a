"""The account of a folder: what is left out and why, what is remarked on, and how much is decoded at a time."""

import io
import json
import re
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from conftest import make_scenes, scene
from gtsa.core import terminal
from gtsa.core.errors import UserError
from gtsa.core.types import Draw
from gtsa.data import run_images, scan
from gtsa.data.batches.loader import ViewSet
from gtsa.data.frozen import Frozen, list_line, parse_list
from gtsa.data.images.pixels import BadImage
from gtsa.data.remarks import RemarkCollector
from gtsa.data.scan import describe_links, group_by_reason
from gtsa.data.sources import Selection, open_source
from gtsa.data.sources.folder import Folder
from gtsa.data.sources.list_file import Listing
from gtsa.data.sources.torch_dataset import Items
from gtsa.data.threaded import PixelBudget, map_in_order
from gtsa.data.views.multicrop import MultiCrop
from gtsa.pretraining.check import check
from gtsa.pretraining.preview import preview
from gtsa.pretraining.settings import Pretrain


def names(source):
    return [source.name(i) for i in range(len(source))]


def put(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        scene(len(path)).save(root / path)
    return root


def remarks(folder, range16=(0, 65535)):
    return scan.scan(Folder(str(folder)), range16=range16).remarks


# Links


def test_links_out_of_the_folder_are_named_and_left_out(tmp_path, capsys):
    data = put(tmp_path / "data", "a.png", "sub/b.png")
    put(tmp_path, "elsewhere/c.png", "database/d.png")
    (data / "in.png").symlink_to(data / "a.png")
    (data / "out.png").symlink_to(tmp_path / "elsewhere/c.png")
    (data / "passwd.jpg").symlink_to("/etc/passwd")
    (data / "etc.jpg").symlink_to("/etc")
    (data / "beside").symlink_to("../database")
    (data / "loop").symlink_to(data)
    source = Folder(str(data), Selection(follow_links=False))
    assert names(source) == ["a.png", "in.png", "sub/b.png"]
    assert sorted(name for name, _ in source.outside) == ["beside", "etc.jpg", "out.png", "passwd.jpg"]
    check(str(data))
    out = capsys.readouterr().out
    assert "left out: 4 links lead out of the folder (beside -> " in out and "--follow-links" in out
    assert names(Folder(str(data), Selection(follow_links=True)))[:4] == ["a.png", "beside/d.png", "in.png", "out.png"]


def test_a_farm_of_links_says_how_to_follow_them(tmp_path):
    (tmp_path / "farm").mkdir()
    for i in range(3):
        put(tmp_path, f"real/{i}.png")
        (tmp_path / "farm" / f"{i}.png").symlink_to(tmp_path / f"real/{i}.png")
    source = Folder(str(tmp_path / "farm"), Selection(follow_links=False))
    actual = scan.scan(source)
    with pytest.raises(UserError, match="3 links lead out of the folder .*follow with --follow-links"):
        scan.check_scan(actual, "farm", 0.01)
    assert "3 links" in describe_links(actual)
    check(str(tmp_path / "farm"), follow_links=True)


def test_a_root_that_is_a_link_is_the_root(tmp_path):
    put(tmp_path, "real/a.png")
    (tmp_path / "data").symlink_to("real")
    assert names(Folder(str(tmp_path / "data"), Selection(follow_links=False))) == ["a.png"]


# Patterns


@pytest.mark.parametrize(
    ("include", "exclude", "taken"),
    [
        ((), (), ["a.png", "a_mask.png", "masks/a.png", "x/b.jpg", "x/masks/b.png"]),
        ((), ("masks",), ["a.png", "a_mask.png", "x/b.jpg"]),
        ((), ("masks/",), ["a.png", "a_mask.png", "x/b.jpg"]),
        ((), ("./masks/*",), ["a.png", "a_mask.png", "x/b.jpg", "x/masks/b.png"]),
        ((), ("*_mask.png", "x"), ["a.png", "masks/a.png"]),
        (("x",), (), ["x/b.jpg", "x/masks/b.png"]),
        (("x/**/*.png",), (), ["x/masks/b.png"]),
        (("**/masks/*",), (), ["masks/a.png", "x/masks/b.png"]),
        (("*.png",), ("masks", "a_*"), ["a.png"]),
        (("a.png",), (), ["a.png", "masks/a.png"]),
        (("A.png",), (), []),
        (("[ab].*",), ("x/**",), ["a.png", "masks/a.png"]),
    ],
)
def test_include_and_exclude(tmp_path, include, exclude, taken):
    put(tmp_path, "a.png", "a_mask.png", "masks/a.png", "x/b.jpg", "x/masks/b.png")
    folder = Folder(str(tmp_path), Selection(include=include, exclude=exclude))
    assert names(folder) == taken
    assert folder.ignored.get("not chosen", 0) == 5 - len(taken)
    (tmp_path / "l.txt").write_text("\n".join(names(Folder(str(tmp_path)))))
    listing = Listing(str(tmp_path / "l.txt"), Selection(include=include, exclude=exclude))
    assert (names(listing), listing.ignored.get("not chosen", 0)) == (taken, 5 - len(taken))


@pytest.mark.parametrize(
    ("include", "exclude", "patterns"),
    [
        (("*.gif", "c"), (), "--include *.gif c"),
        ((), ("*",), "--exclude *"),
        (("x",), ("*.jpg",), "--include x and --exclude *.jpg"),
    ],
)
def test_patterns_that_leave_nothing_are_named_with_paths_to_compare(tmp_path, include, exclude, patterns):
    put(tmp_path, "a.png", "x/b.jpg", "x/c.jpg")
    words = (
        f"{patterns} leaves none of 3 images; patterns are compared with paths below the folder, e.g. a.png, x/b.jpg"
    )
    given = {"include": include, "exclude": exclude}
    for verb in (
        lambda: check(str(tmp_path), **given),
        lambda: preview(str(tmp_path), str(tmp_path / "p.png"), model="test_vit", **given),
        lambda: run_images.scan_images(str(tmp_path), "", Selection(**given), 0.0),
        lambda: scan.open_images(str(tmp_path), Selection(**given)),
    ):
        with pytest.raises(UserError, match=re.escape(words)) as error:
            verb()
        assert error.value.code == 3


def test_patterns_are_not_to_blame_where_there_are_no_images(tmp_path):
    with pytest.raises(UserError, match="no images \\(it is empty\\)"):
        check(str(tmp_path), include=("*.gif",))


def test_patterns_are_for_files():
    with pytest.raises(UserError, match="include and exclude select files"):
        Items([scene(0)], Selection(exclude=("a",)))


def test_archives_are_to_be_extracted(tmp_path):
    for name in ("a.tgz", "b.TAR.GZ", "c.zip"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(UserError, match="is a compressed archive: extract it and give the folder with its images"):
            open_source(str(tmp_path / name))


# Remarks


def test_masks_among_the_images_are_remarked_on(tmp_path):
    make_scenes(tmp_path / "pictures", 4)
    (tmp_path / "my masks").mkdir()
    for i in range(12):
        Image.fromarray((np.mgrid[:40, :40].sum(0) // 30).astype(np.uint8)).save(tmp_path / f"my masks/{i}.png")
    (remark,) = remarks(tmp_path)
    assert "12 of 16 images (75 %) are single-channel, with 3 values or fewer" in remark
    assert "--exclude 'my masks'" in remark
    assert remarks(tmp_path / "pictures") == []


def test_grey_photos_are_no_masks(tmp_path):
    for i in range(4):
        scene(i).convert("L").save(tmp_path / f"{i}.png")
        scene(i).convert("L").save(tmp_path / f"{i}.jpg")
    assert remarks(tmp_path) == []


def test_twelve_bits_in_sixteen_are_remarked_on(tmp_path):
    values = np.random.default_rng(0).integers(0, 4096, (20, 20)).astype(np.uint16)
    values[0, :2] = 0, 4095
    Image.fromarray(values).save(tmp_path / "a.png")
    Image.fromarray(values).save(tmp_path / "b.tif")
    (remark,) = remarks(tmp_path)
    assert "values from 0 to 4,095 in 2 of 2, of 0 to 65535: nearly black; give --range16 0 4095" in remark
    assert remarks(tmp_path, (0, 4095)) == []
    (remark,) = remarks(tmp_path, (0, 1000))
    assert "above the 1000 of --range16" in remark
    Image.fromarray(values * 16).save(tmp_path / "a.png")
    assert remarks(tmp_path) == []


def test_depths_below_zero_are_no_twelve_bits(monkeypatch):
    one = RemarkCollector.__new__(RemarkCollector)
    one.deep, one.range16, one._read_sample = [0], (0, 65535), lambda _: [np.array([-9, -3], np.int16)]
    assert one._remark_on_range() == ""


# Messages


def test_check_says_what_it_used_and_one_line_for_one_reason(tmp_path, capsys):
    make_scenes(tmp_path, 5)
    for i in range(7):
        (tmp_path / f"bad {i}.png").write_bytes(b"<html>")
    (tmp_path / "empty.jpg").write_bytes(b"")
    with pytest.raises(UserError):
        check(str(tmp_path))
    out = " ".join(capsys.readouterr().out.split())
    assert "5 readable" in out
    assert "7 files: an HTML page, not an image: download it again (bad 0.png, bad 1.png, bad 2.png, ...)" in out
    assert "empty.jpg: empty file" in out


def test_reasons_come_by_their_number():
    assert group_by_reason([("a", "x"), ("b", "y"), ("c", "y")]) == ["2 files: y (b, c)", "a: x"]


def test_slow_work_shows_a_count(monkeypatch):
    messages = []
    clock = iter(range(0, 1000, 7))
    monkeypatch.setattr(terminal.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(terminal, "say", messages.append)
    with terminal.Count("checked", 200) as count:
        for done in range(1, 21):
            count(done, "3 bad" if done > 10 else "")
    assert messages[0] == "checked 5 of 200  ETA 22 min 45 s"
    assert 3 <= len(messages) <= 6 and messages[-1].endswith("3 bad")
    assert terminal.Count("listed").line(12000, 3) == "listed 12,000"


def test_a_terminal_has_its_line_rewritten(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(terminal, "console", Console(file=out, force_terminal=True, width=120, highlight=False))
    clock = iter(range(0, 1000, 7))
    monkeypatch.setattr(terminal.time, "perf_counter", lambda: next(clock))
    with terminal.Count("checked", 20) as count:
        count(1)
        count(2)
    shown = out.getvalue()
    assert "checked 1 of 20" in shown and "checked 2 of 20" in shown
    assert shown.count("\n") <= 1 and shown.rindex("\x1b[2K") > shown.rindex("checked")  # and it goes at the end


def test_listing_tells_how_far_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr("gtsa.data.sources.folder.EVERY", 2)
    put(tmp_path, *(f"{i}.png" for i in range(5)))
    counts = []
    Folder(str(tmp_path), progress=counts.append)
    assert counts == [2, 4]


# Memory, threads


def test_no_more_pixels_at_a_time_than_there_is_room_for():
    budget, taken, most = PixelBudget(100), 0, 0
    lock = threading.Lock()

    def work(pixels):
        nonlocal taken, most
        with budget.reserve(pixels):
            with lock:
                taken += pixels
                most = max(most, taken)
            time.sleep(0.001)
            with lock:
                taken -= pixels

    list(map_in_order(work, [30, 40, 100, 500, 10, 60, 60, 60] * 5))
    assert 60 < most <= 500
    assert budget.free == 100
    most = 0
    list(map_in_order(work, [30, 60, 60] * 10))
    assert most <= 100


def test_work_comes_in_order_and_stops_at_once():
    begun = []

    def work(item):
        begun.append(item)
        return item * 2

    assert list(map_in_order(work, range(500))) == list(range(0, 1000, 2))
    begun.clear()
    results = map_in_order(work, range(100_000))
    assert next(results) == 0
    results.close()
    assert len(begun) < 1000


def test_a_large_jpeg_is_decoded_small_but_whole(tmp_path):
    scene(0, 1600, 1200).save(tmp_path / "a.jpg", quality=95)
    details = []
    source = Folder(str(tmp_path))
    read = source.read
    source.read = lambda index, detail=None: details.append(detail(1600, 1200)) or read(index, detail)
    assert scan.scan(source, decode=True).decoded == 1
    assert details == [1 / 8]
    data = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(data[:-50])
    assert len(scan.scan(source, decode=True).bad) == 1


# Files that are others by now


def test_an_image_that_was_exchanged_is_bad(tmp_path):
    put(tmp_path, "a.png", "b.bmp", "c.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    scene(3, 60, 40).save(tmp_path / "d.jpg", exif=exif)
    source = Folder(str(tmp_path))
    sides = scan.scan(source).sides
    listed = parse_list("".join(list_line(source, i, sides.get(i)) for i in range(4)).encode())
    again = Frozen(Folder(str(tmp_path), files=listed.names), listed.sizes)
    for i in range(4):
        assert torch.equal(again.read(i), source.read(i))
    assert again.read(2, lambda w, h: 0.1).shape[-1] < 96
    scene(9, 40, 30).save(tmp_path / "a.png")
    with pytest.raises(BadImage, match="another image than when the run began: 40 x 30 px, was 96 x 72"):
        again.read(0)
    (tmp_path / "b.bmp").write_bytes((tmp_path / "b.bmp").read_bytes() + b"x")
    with pytest.raises(BadImage, match="another file than when the run began: .* bytes, was "):
        again.read(1)
    old = parse_list("".join(json.dumps({"name": name}) + "\n" for name in names(source)).encode())  # earlier versions
    assert Frozen(Folder(str(tmp_path), files=names(source)), old.sizes).read(0).shape[-1] == 40


def test_a_run_replaces_an_image_that_was_exchanged(tmp_path):
    data = make_scenes(tmp_path / "data", 6)
    settings = Pretrain(data=str(data), out=str(tmp_path), hold_out=0, max_bad=0.5)
    files = run_images.scan_images(str(data), settings.data, settings.selection, settings.max_bad)
    (tmp_path / "images.jsonl").write_text(files["images.jsonl"])
    (tmp_path / "scan.json").write_text(files["scan.json"])
    messages = []
    images = run_images.RunImages(str(data), settings, messages.append)
    scene(50, 64, 64).save(data / "scene_02.jpg")
    views = ViewSet(images.source, images.train, MultiCrop(1, 32, 1, 16), 0)
    actual = [views[Draw(0, position)] for position in range(6)]
    images.unreadable((entry for view in actual for entry in view.replaced), "step 3: ")
    (line,) = messages
    assert "scene_02.jpg could not be read (another image than when the run began: 64 x 64 px, was 96 x 72)" in line


def test_what_was_decoded_before_a_stop_is_not_decoded_again(tmp_path):
    data = make_scenes(tmp_path / "data", 8)
    source = Folder(str(data))
    read, seen = source.read, []

    def reading(index, detail=None):
        if len(seen) == 5:
            raise KeyboardInterrupt
        seen.append(index)
        return read(index, detail)

    source.read = reading
    with pytest.raises(KeyboardInterrupt):
        scan.scan(source, decode=True)
    again = []
    source.read = lambda index, detail=None: again.append(index) or read(index, detail)
    assert scan.scan(source, decode=True).decoded == 8
    assert sorted(again + seen) == list(range(8))
