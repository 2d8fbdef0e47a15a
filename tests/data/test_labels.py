"""Labels of every format: clean ones give the right targets, every planted fault is reported by file and location."""

import json
import os
import pickle
import shutil

import pytest
import torch
from PIL import Image

from gtsa.core.errors import UserError
from gtsa.data.labels import IGNORE, SHOWN, Boxes, Labelled, Problems, UnknownFormat, formats, open_labelled, split_part

COCO_SMALL = os.environ.get("GTSA_COCO_SMALL", "")  # a small real COCO set, where there is one; no test needs it


def put(root, *names, size=(20, 18)):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (9, 8, 7)).save(path, format="JPEG")
    return root


def refused(images, labels, kind, **options):
    """The error message about wrong labels."""
    with pytest.raises(UserError) as caught:
        open_labelled(str(images), labels if labels is None else str(labels), kind, **options)
    assert caught.value.code == 3
    assert not isinstance(caught.value, UnknownFormat)
    return str(caught.value)


def of(data):
    """{image: target}"""
    return {data.name(i): data.target(i) for i in range(len(data))}


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def moved(data, tmp_path):
    """The same data set in another folder."""
    return shutil.copytree(data, tmp_path / "elsewhere" / "copy", symlinks=True)


# What all formats share


def test_every_format_is_discovered_once():
    names = [form.__name__ for form in formats()]
    assert {"ClassFolders", "Coco", "INaturalist", "Masks", "Multilabel", "Table", "Unlabelled"} <= set(names)
    assert len(set(names)) == len(names)


def test_problems_are_bounded_and_every_kind_has_a_line():
    problems = Problems("a\nfile.json")
    for number in range(5000):
        problems.add("many", f"annotation {number}", "x" * 10_000)
    problems.add("rare", "image\x1b[31m 7", "said\tonce")
    with pytest.raises(UserError) as caught:
        problems.raise_if_any()
    lines = str(caught.value).split("\n")
    assert len(lines) == 2 + 2 + SHOWN + 1  # heads, kinds, problems, and how many more
    assert "a\\nfile.json" in lines[0] and "5,000 x many" in str(caught.value) and "1 x rare" in str(caught.value)
    assert "image\\x1b[31m 7: said\\tonce" in str(caught.value)
    assert lines[-1].strip() == f"and {5001 - SHOWN:,} more"
    assert max(map(len, lines)) < 500


def test_without_problems_nothing_is_raised():
    Problems("here").raise_if_any()


@pytest.mark.parametrize("labels", [None, "nothing.csv", "nothing.json:train"])
def test_missing_files_are_reported(tmp_path, labels):
    images = tmp_path / "images" if labels is None else put(tmp_path, "a.jpg")
    location = images if labels is None else tmp_path / labels
    assert f"{location}: there is no such file or folder" in refused(images, labels and tmp_path / labels, "classes")


@pytest.mark.parametrize(
    ("labels", "kind", "needs"),
    [
        ("x.txt", "classes", "class folders, a CSV"),
        ("x.csv", "multilabel", "a JSON object"),
        ("x.csv", "masks", "a folder of PNG masks"),
        ("x.csv", "boxes", "a COCO JSON file"),
        ("x.json:train", "boxes", "a COCO JSON file"),
    ],
)
def test_labels_of_no_known_format_are_refused_with_what_is_needed(tmp_path, labels, kind, needs):
    put(tmp_path, "a.jpg")
    write(tmp_path / labels.partition(":")[0], "{}")
    with pytest.raises(UnknownFormat) as caught:
        open_labelled(str(tmp_path), str(tmp_path / labels), kind)
    assert needs in str(caught.value) and caught.value.code == 3


def test_a_part_of_a_file(tmp_path):
    file = write(tmp_path / "a.json", "{}")
    odd = write(tmp_path / "b:c.json", "{}")
    assert split_part(f"{file}:train") == (str(file), "train")
    assert split_part(str(file)) == (str(file), None)
    assert split_part(str(odd)) == (str(odd), None)
    assert split_part(f"{odd}:val") == (str(odd), "val")
    assert split_part("no/such.json:val") == ("no/such.json:val", None)


# Class folders


def test_class_folders(tmp_path, capsys):
    put(tmp_path, "cat/1.jpg", "cat/deep/er/2.jpg", "dog/1.jpg", "dog/2.jpg", "a b/1.jpg", "a b/2.jpg", ".git/x.jpg")
    write(tmp_path / "cat" / "notes.txt", "nothing")
    data = open_labelled(str(tmp_path), None, "classes")
    assert data.kind == "classes" and data.classes == ("a b", "cat", "dog")
    assert of(data) == {
        "a b/1.jpg": 0,
        "a b/2.jpg": 0,
        "cat/1.jpg": 1,
        "cat/deep/er/2.jpg": 1,
        "dog/1.jpg": 2,
        "dog/2.jpg": 2,
    }
    assert "1 .txt" in capsys.readouterr().out
    assert of(data.take([5, 0])) == {"dog/2.jpg": 2, "a b/1.jpg": 0}
    assert data.take([5, 0]).fingerprint not in (data.fingerprint, data.take([0, 5]).fingerprint)


@pytest.mark.parametrize(
    ("plant", "kind", "location"),
    [
        (lambda root: put(root, "lost.jpg"), "image outside a class folder", "lost.jpg"),
        (lambda root: (root / "empty").mkdir(), "class folder without images", "empty"),
        (lambda root: write(root / "text" / "a.txt", ""), "class folder without images", "text"),
        (lambda root: put(root, "one/a.jpg"), "class folder with one image", "one"),
        (lambda root: shutil.rmtree(root / "dog"), "too few classes", ""),
    ],
)
def test_faults_of_class_folders(tmp_path, plant, kind, location):
    put(tmp_path, "cat/1.jpg", "cat/2.jpg", "dog/1.jpg", "dog/2.jpg")
    open_labelled(str(tmp_path), None, "classes")
    plant(tmp_path)
    message = refused(tmp_path, None, "classes")
    assert f"1 x {kind}\n" in message and f"\n  {location}" in message and str(tmp_path) in message


def test_all_faults_of_class_folders_at_once(tmp_path):
    put(tmp_path, "lost.jpg", "one/a.jpg", "cat/1.jpg", "cat/2.jpg")
    (tmp_path / "empty").mkdir()
    message = refused(tmp_path, None, "classes")
    assert message.count("1 x ") == 3 and all(f"\n  {name}: " in message for name in ("lost.jpg", "one", "empty"))


def test_an_empty_folder_has_no_classes(tmp_path):
    assert "0, at least two are needed" in refused(tmp_path, None, "classes")


def test_a_list_of_classes_makes_train_and_val_alike(tmp_path):
    put(tmp_path / "train", *(f"{name}/{i}.jpg" for name in "abc" for i in range(2)))
    put(tmp_path / "val", *(f"{name}/{i}.jpg" for name in "ac" for i in range(2)))
    names = write(tmp_path / "names.txt", "c\nb\na\n\n")
    train, val = (open_labelled(str(tmp_path / part), None, "classes", classes=str(names)) for part in ("train", "val"))
    assert train.classes == val.classes == ("c", "b", "a")
    assert of(val) == {"a/0.jpg": 2, "a/1.jpg": 2, "c/0.jpg": 0, "c/1.jpg": 0}
    write(names, "c\na\n")
    message = refused(tmp_path / "train", None, "classes", classes=str(names))
    assert "2 x unknown class" in message and "b/0.jpg: b: not in the list of 2 classes" in message


def test_classes_are_numbered_as_in_another_set():
    """b, d of a, b, c, d: every kind of target keeps its names."""

    def labelled(kind, classes, targets, **more):
        return Labelled(None, range(len(targets)), targets, kind, classes, "digest", **more)

    few, many = ("b", "d"), ("a", "b", "c", "d")
    actual = {}
    boxes = Boxes(torch.zeros(2, 4), torch.tensor([1, 0]), None, torch.zeros(2), torch.zeros(2), torch.zeros(2))
    for kind, target in (
        ("classes", 1),
        ("multilabel", torch.tensor([False, True])),
        ("masks", torch.tensor([[0, 1], [IGNORE, 1]])),
        ("boxes", boxes),
    ):
        other = labelled(kind, many, [], category_ids=(5, 6, 7, 8))
        same = labelled(kind, few, [target], category_ids=(6, 8)).numbered_as(other)
        assert (same.classes, same.category_ids) == (many, (5, 6, 7, 8))
        assert pickle.loads(pickle.dumps(same)).classes == many
        actual[kind] = same.target(0)
        assert other.numbered_as(other) is other
    assert actual["classes"] == 3
    assert actual["multilabel"].tolist() == [False, False, False, True]
    assert actual["masks"].tolist() == [[1, 3], [IGNORE, 3]]
    assert actual["boxes"].classes.tolist() == [3, 1]


@pytest.mark.parametrize(
    ("content", "messages"),
    [
        ("", "no classes"),
        ("a\nb\na\n", "line 3: a: as line 1"),
        ("a\n\nb\n", "line 2: give it a name"),
        (b"\xff\xfea", "not UTF-8"),
    ],
)
def test_faults_of_a_list_of_classes(tmp_path, content, messages):
    put(tmp_path, "a/1.jpg", "a/2.jpg", "b/1.jpg", "b/2.jpg")
    file = tmp_path / "names.txt"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    message = refused(tmp_path, None, "classes", classes=str(file))
    assert messages in message and "names.txt" in message
    assert "No such file" in refused(tmp_path, None, "classes", classes=str(tmp_path / "none.txt"))


# CSV


@pytest.fixture
def four(tmp_path):
    return put(tmp_path / "images", "a.jpg", "b.jpg", "sub/c.jpg", " d, e.jpg")


@pytest.mark.parametrize(
    "text",
    [
        'a.jpg,cat\nb.jpg,dog\nsub/c.jpg,cat\n" d, e.jpg",dog\n',
        '\ufeffpath,label\r\na.jpg,cat\r\nb.jpg,dog\r\n\r\nsub/c.jpg, cat \r\n" d, e.jpg", dog\r\n',
        'filename,class\na.jpg,cat\nb.jpg,dog\nsub/c.jpg,cat\n" d, e.jpg",dog\n',
        'Label,split, Path\ncat,train,a.jpg\ndog,,./b.jpg\ncat,,sub//c.jpg\ndog,val," d, e.jpg"\ncat,again,a.jpg\n',
    ],
)
def test_table(tmp_path, four, text):
    data = open_labelled(str(four), str(write(tmp_path / "labels.CSV", text)), "classes")
    assert data.classes == ("cat", "dog")
    assert of(data) == {"a.jpg": 0, "b.jpg": 1, "sub/c.jpg": 0, " d, e.jpg": 1}
    assert data.read(2).shape == (3, 18, 20)


def test_names_that_are_no_utf8_in_a_table(tmp_path):
    images, odd = tmp_path / "images", os.fsdecode(b"\xff\xe9.jpg")
    put(images, odd, "b.jpg")
    file = tmp_path / "x.csv"
    file.write_bytes(b"\xff\xe9.jpg,cat\nb.jpg,d\xe9g\n")
    assert "label that is no text" in refused(images, file, "classes") and "line 2" in refused(images, file, "classes")
    file.write_bytes(b"\xff\xe9.jpg,cat\nb.jpg,d\xc3\xa9g\n")
    data = open_labelled(str(images), str(file), "classes")
    assert of(data) == {odd: 0, "b.jpg": 1} and data.classes == ("cat", "dég")


@pytest.mark.parametrize(
    ("row", "kind", "location"),
    [
        ("none.jpg,cat", "image missing on disk", "none.jpg"),
        ("sub,cat", "image missing on disk", "not a regular file"),
        ("pipe,cat", "image missing on disk", "not a regular file"),
        ("x\0y.jpg,cat", "wrong type", "the image's path"),
        (",cat", "wrong type", "the image's path"),
        ("../secret.jpg,cat", "path outside the images", "../secret.jpg"),
        ("sub/../../secret.jpg,cat", "path outside the images", "secret.jpg"),
        ("/etc/hostname,cat", "path outside the images", "/etc/hostname"),
        ("link.jpg,cat", "path outside the images", "link.jpg"),
        ("out/secret.jpg,cat", "path outside the images", "out/secret.jpg"),
        ("a.jpg,dog", "two labels for one image", "a.jpg: dog, but cat in line 1"),
        ("./sub/../a.jpg,dog", "path outside the images", "sub"),
        ("./a.jpg,dog", "two labels for one image", "a.jpg: dog, but cat in line 1"),
        ("b.jpg,", "empty label", "b.jpg"),
        ("b.jpg, \t", "empty label", "b.jpg"),
        ("b.jpg,do\x1bg", "label that is no text", "do\\x1bg"),
        ("b.jpg", "row of another width", "1 cells"),
        ("b.jpg,dog,3", "row of another width", "3 cells"),
    ],
)
def test_faults_of_a_table(tmp_path, four, row, kind, location):
    os.mkfifo(four / "pipe")
    put(tmp_path, "secret.jpg")
    (four / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (four / "out").symlink_to(tmp_path)
    message = refused(four, write(tmp_path / "x.csv", f"a.jpg,cat\nb.jpg,dog\n{row}\n"), "classes")
    assert f"1 x {kind}\n" in message and message.count(" x ") == 1
    assert "\n  line 3: " in message and location in message and "x.csv" in message


def test_links_inside_the_folder_are_good(tmp_path, four):
    (four / "link.jpg").symlink_to("sub/c.jpg")
    (four / "alias").symlink_to("sub")
    data = open_labelled(str(four), str(write(tmp_path / "x.csv", "link.jpg,a\nalias/c.jpg,b\n")), "classes")
    assert of(data) == {"link.jpg": 0, "alias/c.jpg": 1}


def test_all_faults_of_a_table_at_once(tmp_path, four):
    rows = ["a.jpg,cat", "b.jpg,dog", "none.jpg,cat", "a.jpg,dog", "../x.jpg,dog", "b.jpg,", "b.jpg"]
    message = refused(four, write(tmp_path / "x.csv", "\n".join(rows)), "classes")
    assert [f"\n  line {line}: " in message for line in range(1, 8)] == [False, False, *[True] * 5]
    assert message.count("1 x ") == 5


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("", "no rows"),
        ("path,label\n", "no rows"),
        ("photo,kind\na.jpg,cat\nb.jpg,dog\n", "photo: No such file"),
        ("a.jpg,cat\nb.jpg,cat\n", "too few classes"),
        pytest.param('a.jpg,cat\n"b.jpg,' + "x" * 200_000, "not CSV", id="open quote"),
    ],
)
def test_faults_of_a_whole_table(tmp_path, four, text, messages):
    assert messages in refused(four, write(tmp_path / "x.csv", text), "classes")


# iNaturalist


def species():
    return {
        "info": {"year": 2019},
        "images": [
            {"id": 10, "file_name": "a.jpg", "width": 20, "height": 18},
            {"id": 11, "file_name": "sub/c.jpg"},
            {"id": 12, "file_name": "b.jpg"},
        ],
        "annotations": [
            {"id": 0, "image_id": 12, "category_id": 5},
            {"id": 1, "image_id": 10, "category_id": 0},
            {"id": 2, "image_id": 11, "category_id": 5},
        ],
        "categories": [{"id": 5, "name": "Quercus"}, {"id": 0, "name": "Zea"}, {"id": 7, "name": "Acer"}],
    }


def test_inaturalist(tmp_path, four):
    data = open_labelled(str(four), str(write(tmp_path / "x.json", species())), "classes")
    assert data.classes == ("Zea", "Quercus", "Acer")  # by id; without images too, so that train and val agree
    assert of(data) == {"a.jpg": 0, "sub/c.jpg": 1, "b.jpg": 1}


def change(content, *path, to=None, **values):
    """Plants a value, or removes it."""
    *path, last = path
    for key in path:
        content = content[key]
    if to is None:
        del content[last]
    else:
        content[last] = to


@pytest.mark.parametrize(
    ("path", "to", "kind", "location"),
    [
        (("images",), None, "missing key", "images"),
        (("annotations",), {"a": 1}, "wrong type", "annotations"),
        (("categories",), [], "empty list", "categories"),
        (("images", 1), "b.jpg", "wrong type", "images[1]"),
        (("images", 1, "id"), None, "missing key", "images[1]"),
        (("images", 1, "id"), "11", "wrong type", "images[1]"),
        (("images", 1, "id"), True, "wrong type", "images[1]"),
        (("images", 1, "id"), 10, "duplicate id", "image 10"),
        (("images", 1, "file_name"), None, "missing key", "image 11"),
        (("images", 1, "file_name"), 5, "wrong type", "image 11"),
        (("images", 1, "file_name"), "none.jpg", "image missing on disk", "image 11"),
        (("images", 1, "file_name"), "\ud800.jpg", "image missing on disk", "image 11"),
        (("images", 1, "file_name"), "../images/b.jpg", "path outside the images", "image 11"),
        (("images", 1, "file_name"), "./a.jpg", "image named twice", "image 11"),
        (("annotations", 1, "id"), 0, "duplicate id", "annotation 0"),
        (("annotations", 1, "image_id"), None, "missing key", "annotation 1"),
        (("annotations", 1, "image_id"), [1], "wrong type", "annotation 1"),
        (("annotations", 1, "image_id"), 99, "unknown image id", "annotation 1"),
        (("annotations", 1, "image_id"), 12, "two labels for one image", "annotation 1"),
        (("annotations", 1), None, "image without a label", "image 10"),
        (("annotations", 1, "category_id"), 6, "unknown category id", "annotation 1"),
        (("annotations", 1, "category_id"), 2**70, "wrong type", "annotation 1"),
        (("categories", 1, "name"), None, "missing key", "category 0"),
        (("categories", 1, "name"), "", "category without a name", "category 0"),
        (("categories", 1, "name"), "Acer", "category named twice", "category 7"),
    ],
)
def test_faults_of_inaturalist(tmp_path, four, path, to, kind, location):
    content = species()
    change(content, *path, to=to)
    message = refused(four, write(tmp_path / "x.json", content), "classes")
    assert f"1 x {kind}\n" in message and f"\n  {location}: " in message and "x.json" in message


def test_a_damaged_json_is_reported(tmp_path, four):
    message = refused(four, write(tmp_path / "x.json", json.dumps(species())[:-20]), "classes")
    assert "1 x not JSON" in message and "line 1" in message


# Several classes an image


PLAIN = {"a.jpg": ["dog", "cat"], "b.jpg": [], "sub/c.jpg": ["emu"]}


def test_several(tmp_path, four):
    data = open_labelled(str(four), str(write(tmp_path / "x.json", PLAIN)), "multilabel")
    assert data.classes == ("cat", "dog", "emu") and data.kind == "multilabel"
    rows = {name: target.tolist() for name, target in of(data).items()}
    assert rows == {"a.jpg": [True, True, False], "b.jpg": [False] * 3, "sub/c.jpg": [False, False, True]}
    assert data.target(0).dtype == torch.bool
    data.target(1).fill_(True)
    assert not data.target(1).any()  # what is done to a target is done to no other


def test_parts_of_a_file(tmp_path, four):
    parts = {"info": "x", "classes": ["emu", "cat", "dog", "fox"], "images_per_class": {"cat": {"train": 1}}}
    parts |= {"train": PLAIN, "val": {" d, e.jpg": ["dog"]}}
    file = write(tmp_path / "x.json", parts)
    train, val = (open_labelled(str(four), f"{file}:{part}", "multilabel") for part in ("train", "val"))
    assert train.classes == val.classes == ("emu", "cat", "dog", "fox")
    assert train.target(0).tolist() == [False, True, True, False] and len(train) == 3
    assert val.target(0).tolist() == [False, False, True, False] and len(val) == 1
    assert train.fingerprint != val.fingerprint
    message = refused(four, file, "multilabel")
    assert f"write {file}:train or {file}:val" in message
    assert "has train, val" in refused(four, f"{file}:test", "multilabel")
    del parts["classes"]
    write(file, parts)
    assert open_labelled(str(four), f"{file}:val", "multilabel").classes == ("cat", "dog", "emu")  # of all parts
    names = write(tmp_path / "names.txt", "emu\ndog\ncat")
    assert open_labelled(str(four), f"{file}:val", "multilabel", classes=str(names)).classes == ("emu", "dog", "cat")


def test_several_is_no_inaturalist(tmp_path, four):
    """Evaluations that take both kinds ask for one class first."""
    for content in (PLAIN, {"images": ["cat"], "categories": [], "a.jpg": ["annotations"]}, "nonsense"):
        with pytest.raises(UnknownFormat):
            open_labelled(str(four), str(write(tmp_path / "x.json", content)), "classes")


@pytest.mark.parametrize(
    ("content", "kind", "location"),
    [
        ("{", "not JSON", "x.json"),
        pytest.param("[" * 200_000, "not JSON", "x.json", id="deep"),
        (b"\xff\xff".decode("latin1"), "not JSON", "x.json"),
        ("[]", "wrong type", "x.json"),
        ("{}", "no images", "x.json"),
        ({"a.jpg": []}, "no classes", "x.json"),
        ({**PLAIN, "a.jpg": "dog"}, "wrong type", "image a.jpg"),
        ({**PLAIN, "a.jpg": {}}, "wrong type", "image a.jpg"),
        ({**PLAIN, "a.jpg": ["dog", 3]}, "wrong type", "image a.jpg"),
        ({**PLAIN, "a.jpg": [["dog"]]}, "wrong type", "image a.jpg"),
        ({**PLAIN, "a.jpg": ["dog", ""]}, "empty label", "image a.jpg"),
        ({**PLAIN, "x.jpg": ["dog"]}, "image missing on disk", "image x.jpg"),
        ({**PLAIN, "/etc/passwd": ["dog"]}, "path outside the images", "image /etc/passwd"),
        ({**PLAIN, "./a.jpg": ["dog"]}, "image named twice", "image ./a.jpg"),
        ('{"a.jpg": ["dog"], "b.jpg": ["cat"], "a.jpg": []}', "key that is written twice", "a.jpg"),
    ],
)
def test_faults_of_several(tmp_path, four, content, kind, location):
    message = refused(four, write(tmp_path / "x.json", content), "multilabel")
    assert f"1 x {kind}\n" in message and f"{location}: " in message.partition("in detail")[2]


@pytest.mark.parametrize(
    ("classes", "kind", "location"),
    [
        (["dog", "cat"], "unknown class", "image sub/c.jpg: emu"),
        (["dog", "cat", "emu", "dog"], "class named twice", "classes[3]: dog"),
        (["dog", "cat", "emu", 4], "wrong type", "classes: "),
        ("dog", "wrong type", "classes: "),
    ],
)
def test_faults_of_classes_in_parts(tmp_path, four, classes, kind, location):
    message = refused(four, f"{write(tmp_path / 'x.json', {'classes': classes, 'train': PLAIN})}:train", "multilabel")
    assert f"1 x {kind}\n" in message and f"\n  {location}" in message


# No labels


def test_plain(tmp_path, four):
    data = open_labelled(str(four), None, "none")
    assert [data.name(i) for i in range(4)] == [" d, e.jpg", "a.jpg", "b.jpg", "sub/c.jpg"]
    assert data.classes == () and data.target(2) is None
    listed = open_labelled(str(write(four / "list.txt", "b.jpg\na.jpg\n")), None, "none")
    assert [listed.name(i) for i in range(2)] == ["a.jpg", "b.jpg"] and listed.read(0).shape == (3, 18, 20)
    assert len(open_labelled(str(four), str(write(tmp_path / "x.csv", "a.jpg,b")), "none")) == 4


def test_faults_of_plain(tmp_path, four):
    (tmp_path / "void").mkdir()
    assert "no images" in refused(tmp_path / "void", None, "none")
    message = refused(write(four / "list.txt", "b.jpg\nmissing.jpg\n"), None, "none")
    assert "1 x image missing on disk" in message and "missing.jpg" in message


# The same data set is known again, and goes to other processes


def all_of(root):
    put(root / "images", "a.jpg", "b.jpg", "sub/c.jpg")
    put(root / "folders", *(f"{name}/{i}.jpg" for name in "ab" for i in range(2)))
    write(root / "x.csv", "a.jpg,cat\nb.jpg,dog\n")
    write(root / "i.json", species())
    write(root / "s.json", PLAIN)
    return root


PLACES = [
    ("folders", None, "classes"),
    ("images", "x.csv", "classes"),
    ("images", "i.json", "classes"),
    ("images", "s.json", "multilabel"),
    ("images", None, "none"),
]


@pytest.mark.parametrize(("images", "labels", "kind"), PLACES)
def test_fingerprints_are_of_the_data_and_labels_pickle(tmp_path, images, labels, kind):
    root = all_of(tmp_path / "one")
    copy = moved(root, tmp_path)
    data, other = (open_labelled(str(r / images), labels and str(r / labels), kind) for r in (root, copy))
    assert data.fingerprint == other.fingerprint
    back = pickle.loads(pickle.dumps(data))
    assert back.fingerprint == data.fingerprint and back.classes == data.classes
    assert [str(back.target(i)) for i in range(len(back))] == [str(data.target(i)) for i in range(len(data))]
    assert torch.equal(back.read(1), data.read(1))


@pytest.mark.parametrize(
    ("labels", "kind", "old", "new"),
    [
        ("x.csv", "classes", "b.jpg,dog", "b.jpg,cow"),
        ("i.json", "classes", '"category_id": 0', '"category_id": 7'),
        ("s.json", "multilabel", '["emu"]', '["cat"]'),
    ],
)
def test_other_labels_have_another_fingerprint(tmp_path, labels, kind, old, new):
    root = all_of(tmp_path)
    before = open_labelled(str(root / "images"), str(root / labels), kind)
    text = (root / labels).read_text()
    assert old in text
    (root / labels).write_text(text.replace(old, new))
    assert open_labelled(str(root / "images"), str(root / labels), kind).fingerprint != before.fingerprint


@pytest.mark.skipif(not os.path.exists(COCO_SMALL), reason="GTSA_COCO_SMALL names no small real set")
@pytest.mark.parametrize(("part", "count"), [("train", 247), ("val", 164)])
def test_no_false_alarm_on_coco_small(part, count):
    file = f"{COCO_SMALL}/multilabel.json"
    data = open_labelled(f"{COCO_SMALL}/images", f"{file}:{part}", "multilabel")
    with open(file) as text:
        truth = json.load(text)
    assert len(data) == count and data.classes == tuple(truth["classes"])
    for name, target in of(data).items():
        assert {c for c, there in zip(data.classes, target.tolist(), strict=True) if there} == set(truth[part][name])
