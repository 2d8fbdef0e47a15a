"""Groups of images: read from a CSV, checked, and kept with the images."""

import pytest

from conftest import run
from evaluating import labelled, noise
from gtsa.core.errors import UserError
from gtsa.data.labels.image_groups import with_groups


def images():
    return labelled(noise(4), names=["a/1.png", "a/2.png", "b/1.png", "b/2.png"])


def write(tmp_path, text):
    file = tmp_path / "groups.csv"
    file.write_text(text)
    return str(file)


def test_groups_follow_the_images(tmp_path):
    file = write(tmp_path, "Group, note ,file\nx,,b/1.png\n,,a/2.png\nx,,a/1.png\ny,,b/2.png\nz,,other.png\n")
    data = with_groups(images(), file)
    assert [data.group(i) for i in range(4)] == ["x", "image a/2.png", "x", "y"]
    assert [data.take([3, 0]).group(i) for i in range(2)] == ["y", "x"]
    assert [images().group(i) for i in range(2)] == ["image a/1.png", "image a/2.png"]  # without a file each is alone


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: the first row names the columns: path and group are needed"),
        ("a/1.png,x\na/2.png,y\n", "line 1: the first row names the columns"),
        ("path,group\na/1.png,x\n", "a/2.png, b/1.png and 1 more: write a row"),
        ("path,group\na/1.png,x,y\n", "line 2: 3 cells, not 2"),
        ("path,group\na/1.png,x\na/1.png,y\n", "line 3: a/1.png: y, but x in a line before"),
    ],
)
def test_what_is_wrong_is_reported(tmp_path, text, message):
    file = write(tmp_path, text)
    with pytest.raises(UserError, match="the labels cannot be used") as caught:
        with_groups(images(), file)
    assert caught.value.code == 3 and message in str(caught.value) and file in str(caught.value)


def test_the_command_draws_groups_and_keeps_them_in_one_fold(scenes, tmp_path):
    names = sorted(path.name for path in scenes.iterdir())
    rows = [f"{name},{number // 2}" for number, name in enumerate(names)]
    arguments = ["evaluate", "random:test_vit", "--task", "rotation", "--train", scenes, "--device", "cpu"]
    arguments += ["--rotation.resize", 48, "--rotation.crop", 48, "--groups"]
    code, out, _ = run(*arguments, write(tmp_path, "\n".join(["path,group", *rows])), "--folds", 3)
    assert code == 0 and "3-fold over 14 images; 95 % intervals over 7 groups of images" in out
    code, _, error = run(*arguments, tmp_path / "groups.csv", "--folds", 8)
    assert code == 2 and "--folds 8: there are 7 groups" in error
    code, _, error = run(*arguments, tmp_path / "none.csv", "--folds", 3)
    assert code == 3 and "none.csv" in error and "No such file" in error
