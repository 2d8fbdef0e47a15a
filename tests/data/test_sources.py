"""Folders, list files and datasets as they come: every file is listed once, and what cannot be read says why."""

import inspect
import io
import os
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from gtsa.core.errors import UserError
from gtsa.data.images.pixels import NEUTRAL, BadImage
from gtsa.data.sources import Selection, open_source
from gtsa.data.sources.folder import Folder
from gtsa.data.sources.list_file import Listing
from gtsa.data.sources.torch_dataset import Items

ODD = [
    "new\nline.png",
    "q'uo\"te.png",
    "🌲.png",
    " space .png",
    "-rf.png",
    "a.b.png",
    "$(x).png",
    "%s.png",
    "x" * 200 + ".png",
]


def picture(value=100, size=(30, 20)):
    return Image.new("RGB", size, (value, 2, 3))


def put(root, *names, value=100):
    for name in names:
        path = os.path.join(os.fsencode(root), os.fsencode(name))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        picture(value).save(os.fsdecode(path), format="PNG")
    return root


def names(source):
    return [source.name(i) for i in range(len(source))]


def reason(source, index=0):
    with pytest.raises(BadImage) as caught:
        source.read(index)
    return str(caught.value)


# Folders


def test_nested_files_come_in_the_order_of_their_bytes(tmp_path):
    files = ["b.png", "a.png", "a/z.png", "a/b/c/d.png", "a b.png", "Z.png", "ä.png", "10.png", "9.png", "a/b.png"]
    folder = Folder(put(tmp_path, *files))
    assert names(folder) == sorted(files, key=lambda name: name.encode())
    assert names(folder) != sorted(files, key=str.lower)
    assert [folder.size(i) for i in range(10)] == [os.path.getsize(folder.path(i)) for i in range(10)]


@settings(deadline=None, max_examples=30)
@given(st.sets(st.binary(min_size=1, max_size=12).filter(lambda b: not set(b) & {0, 47} and b[:1] != b"."), max_size=8))
def test_any_name_is_listed(tmp_path_factory, stems):
    root = tmp_path_factory.mktemp("any")
    for stem in stems:
        open(os.path.join(os.fsencode(root), stem + b".jpg"), "wb").close()
    assert [os.fsencode(name) for name in names(Folder(root))] == sorted(stem + b".jpg" for stem in stems)


def test_odd_names_are_read(tmp_path):
    odd = [*ODD, os.fsdecode(b"\xff\xfe \x80.png")]
    folder = Folder(put(tmp_path, *odd))
    assert set(names(folder)) == set(odd)
    assert all(folder.read(i).shape == (3, 20, 30) for i in range(len(folder)))


def test_every_suffix_counts_in_any_case_and_the_others_are_counted(tmp_path):
    images = ["a.jpg", "b.JPEG", "c.Png", "d.webp", "e.tif", "f.TIFF", "g.bmp"]
    put(tmp_path, *images, "h.gif", "i.txt", "j.TXT", "noext", ".hidden.png", ".git/x.png")
    folder = Folder(tmp_path)
    assert names(folder) == images
    assert folder.ignored == {".gif": 1, ".txt": 2, "no suffix": 1, "hidden": 2}


def test_a_folder_may_be_called_like_an_image(tmp_path):
    assert names(Folder(put(tmp_path, "a.jpg/b.png"))) == ["a.jpg/b.png"]


def test_an_empty_folder_is_empty(tmp_path):
    (tmp_path / "sub").mkdir()
    source = open_source(str(tmp_path))
    assert len(source) == 0
    assert not source.ignored


def test_links_that_run_in_circles_end(tmp_path):
    put(tmp_path, "a/b.png")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "self").symlink_to(tmp_path / "self")
    (tmp_path / "self.jpg").symlink_to(tmp_path / "self.jpg")
    folder = Folder(tmp_path)
    assert names(folder) == ["a/b.png", "self.jpg"]
    assert "symbolic link" in reason(folder, 1)


@pytest.mark.parametrize("link", ["a", "zz"])
def test_a_linked_folder_is_listed_once_by_its_own_name(tmp_path, link):
    put(tmp_path, "m/x.png")
    (tmp_path / link).symlink_to("m")
    assert names(Folder(tmp_path)) == ["m/x.png"]


def test_a_link_to_a_folder_elsewhere_is_followed(tmp_path):
    put(tmp_path / "elsewhere", "x.png")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "b").symlink_to(tmp_path / "elsewhere")
    assert names(Folder(tmp_path / "data")) == ["a/x.png"]


def test_dangling_links_and_pipes_are_listed_and_refused(tmp_path):
    (tmp_path / "a.jpg").symlink_to("nothing")
    os.mkfifo(tmp_path / "b.jpg")
    folder = Folder(tmp_path)
    assert names(folder) == ["a.jpg", "b.jpg"]
    assert folder.size(0) == 0
    assert "No such file" in reason(folder, 0)
    assert "not a regular file" in reason(folder, 1)


def test_a_file_that_goes_away_is_refused(tmp_path):
    folder = Folder(put(tmp_path, "a.png"))
    os.remove(tmp_path / "a.png")
    assert "No such file" in reason(folder)


def test_folders_that_cannot_be_listed_are_named(tmp_path, monkeypatch):
    put(tmp_path, "a/x.png", "b/y.png")
    scandir = os.scandir

    def guarded(path):
        if str(path).endswith("/a"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    folder = Folder(tmp_path)
    assert names(folder) == ["b/y.png"]
    assert folder.unreadable == [("a", "Permission denied")]


def test_depth_is_not_limited_by_the_stack(tmp_path):
    put(tmp_path, "d/" * 300 + "x.png")
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 120)
    try:
        listed = names(Folder(tmp_path))
    finally:
        sys.setrecursionlimit(limit)
    assert listed == ["d/" * 300 + "x.png"]


def test_range_reaches_the_decoder(tmp_path):
    Image.fromarray(np.full((16, 16), 1000, dtype=np.uint16)).save(tmp_path / "a.png")
    assert Folder(tmp_path, Selection(range16=(0, 1000))).read(0).float().mean() == 255
    (tmp_path / "l.txt").write_text("a.png")
    assert Listing(tmp_path / "l.txt", Selection(range16=(0, 2000))).read(0).float().mean() == 128


# List files


def listing(root, content, **options):
    file = root / "list.txt"
    file.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogateescape"))
    return Listing(str(file), Selection(**options))


def test_lists_are_sorted_and_free_of_comments_and_duplicates(tmp_path):
    put(tmp_path, "b.png", "a/c.png", "# no.png")
    lines = [
        "# comment",
        "b.png",
        "",
        "  ",
        "a/c.png",
        "b.png",
        "./b.png",
        "a/../a/c.png",
        str(tmp_path / "b.png"),
        "#b.png",
    ]
    for end in ("\n", "\r\n"):
        assert names(listing(tmp_path, end.join(lines) + end)) == ["a/c.png", "b.png"]


def test_lists_may_start_with_a_byte_order_mark(tmp_path):
    assert names(listing(put(tmp_path, "a.png"), b"\xef\xbb\xbfa.png\n")) == ["a.png"]


def test_lists_hold_odd_names(tmp_path):
    odd = sorted((name for name in ODD if "\n" not in name), key=str.encode)
    source = listing(put(tmp_path, *odd, os.fsdecode(b"\xff.png")), "\n".join([*odd, os.fsdecode(b"\xff.png")]))
    assert names(source) == [*odd, os.fsdecode(b"\xff.png")]
    assert all(source.read(i).shape == (3, 20, 30) for i in range(len(source)))


@pytest.mark.parametrize(
    "line", ["../out.png", "a/../../out.png", "/etc/passwd", "link/out.png", "out link.png", "..", "/"]
)
def test_lists_may_not_leave_their_folder(tmp_path, line):
    put(tmp_path, "out.png", "data/a.png")
    (tmp_path / "data" / "link").symlink_to(tmp_path)
    (tmp_path / "data" / "out link.png").symlink_to(tmp_path / "out.png")
    with pytest.raises(UserError, match=r"line 2: .*outside .*--data-root") as caught:
        listing(tmp_path / "data", f"a.png\n{line}\n")
    assert caught.value.code == 8


def test_a_folder_with_the_same_beginning_is_outside(tmp_path):
    put(tmp_path, "data/a.png", "database/b.png")
    with pytest.raises(UserError):
        listing(tmp_path / "data", "../database/b.png")


def test_data_root_moves_the_root(tmp_path):
    put(tmp_path / "images", "a.png", "b/c.png")
    (tmp_path / "lists").mkdir()
    source = listing(tmp_path / "lists", "a.png\nb/c.png\n", data_root=str(tmp_path / "images"))
    assert names(source) == ["a.png", "b/c.png"]
    assert source.read(1).shape == (3, 20, 30)


def test_entries_that_are_no_files_are_refused_when_read(tmp_path):
    (tmp_path / "folder").mkdir()
    source = listing(tmp_path, "folder\nmissing.png\n")
    assert [source.size(i) for i in range(2)][1] == 0
    assert "not a regular file" in reason(source, 0)
    assert "No such file" in reason(source, 1)


def test_null_bytes_are_named(tmp_path):
    with pytest.raises(UserError, match="line 2: a null byte") as caught:
        listing(tmp_path, b"a.png\nb\0.png\n")
    assert caught.value.code == 3


def test_an_empty_list_is_empty(tmp_path):
    assert len(listing(tmp_path, "# nothing\n\n")) == 0


@pytest.mark.parametrize(
    ("data", "word"), [("nowhere", "no such folder"), ("a.png", "give the folder"), (7, "no such folder")]
)
def test_data_that_no_source_claims_are_refused(tmp_path, data, word, monkeypatch):
    monkeypatch.chdir(put(tmp_path, "a.png"))
    with pytest.raises(UserError, match=word) as caught:
        open_source(data)
    assert caught.value.code == 3


# Datasets


ARRAY = np.arange(20 * 30 * 3, dtype=np.uint8).reshape(20, 30, 3)
TENSOR = torch.from_numpy(ARRAY.copy()).permute(2, 0, 1)


def read_only():
    array = ARRAY.copy()
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    "item",
    [Image.fromarray(ARRAY), ARRAY, TENSOR, (ARRAY, 3), [TENSOR, "x"], (Image.fromarray(ARRAY),), read_only()],
    ids=["PIL", "array", "tensor", "tuple", "list", "PIL in a tuple", "read-only"],
)
def test_items_are_images_of_any_kind(item):
    assert torch.equal(open_source([item]).read(0), TENSOR)


def test_items_may_lie_backwards():
    assert torch.equal(Items([ARRAY[:, ::-1, ::-1]]).read(0), TENSOR.flip(0, 2))


def test_items_of_other_modes_are_converted_as_files_are(tmp_path):
    clear = Image.new("RGBA", (16, 16), (9, 9, 9, 0))
    deep = Image.fromarray(np.linspace(0, 65535, 1024).astype(np.uint16).reshape(32, 32))
    palette = Image.fromarray(ARRAY).convert("P")
    items = Items([clear, deep, palette, Image.fromarray(ARRAY).convert("L")])
    assert items.read(0)[:, 0, 0].tolist() == list(NEUTRAL)
    assert len(items.read(1).unique()) >= 250
    for i in range(4):
        items.dataset[i].save(tmp_path / f"{i}.png")
        assert torch.equal(Folder(tmp_path, files=[f"{i}.png"]).read(0), items.read(i))
    assert Items([deep], Selection(range16=(0, 100))).read(0).float().mean() > 250


def test_a_torch_dataset_is_a_source():
    class Numbers(torch.utils.data.Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return TENSOR + index

    source = open_source(Numbers())
    assert names(source) == ["item 0", "item 1"]
    assert torch.equal(source.read(1), TENSOR + 1)
    assert source.path(1) is None


def test_a_dataset_without_a_length_is_named():
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield TENSOR

    with pytest.raises(UserError, match="Endless has no length"):
        open_source(Endless())


@pytest.mark.parametrize(
    ("item", "word"),
    [
        (None, "NoneType"),
        ("a.png", "str"),
        ((), "tuple"),
        (ARRAY[..., 0], "(20, 30)"),
        (ARRAY.astype(np.float32), "ndarray"),
        (TENSOR.float(), "Tensor"),
        (TENSOR.permute(1, 2, 0), "(20, 30, 3)"),
        ({"image": ARRAY}, "dict"),
    ],
)
def test_items_that_are_no_images_say_what_they_are(item, word):
    assert word in reason(Items([item]))


def test_items_that_raise_say_what():
    class Broken(list):
        def __getitem__(self, index):
            raise [KeyError("no such key"), RuntimeError("CUDA"), OSError(5, "Input/output error")][index]

    source = Items(Broken([0, 0, 0]))
    assert [word in reason(source, i) for i, word in enumerate(("no such key", "CUDA", "Input/output"))] == [True] * 3


def test_files_that_a_dataset_only_opened_are_read_whole():
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)).save(buffer, "PNG")
    assert Items([Image.open(buffer)]).read(0).shape == (3, 64, 64)
    assert "damaged" in reason(Items([Image.open(io.BytesIO(buffer.getvalue()[:6000]))]))


def test_repeated_paths_of_a_list_are_counted(tmp_path):
    (tmp_path / "list.txt").write_text("a.png\nb.png\na.png\n./a.png\n\n# a.png\n")
    source = open_source(str(tmp_path / "list.txt"))
    assert [source.name(index) for index in range(len(source))] == ["a.png", "b.png"]
    assert source.ignored == {"repeated": 2}
