"""Every command and snippet of the documentation and the README is run, page by page, as on a reader's own folder.

Commands of gtsa run in this process, others in a shell. Sizes are those of docs/small.yaml, except on pages that say
`run: as written`. A comment `<!-- not run: REASON -->` above a block leaves it out.
"""

import contextlib
import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from ruamel.yaml import YAML

import gtsa
from conftest import run, shared
from gtsa.cli.main import VERBS, app
from gtsa.core.settings import merged
from pages import DOCS, ROOT, SHELL, as_written, blocks, gtsa_words, lines, name_of, pages

pytestmark = pytest.mark.long
SAMPLE = ROOT / "src/gtsa/data/sample"
SMALL = YAML(typ="safe").load(DOCS / "small.yaml")
RUN = [
    page
    for page in (*pages(), ROOT / "README.md")
    if any(b.language in (*SHELL, "python") and not b.not_run for b in blocks(page))
]


@pytest.fixture(scope="session")
def reader(tmp_path_factory):
    """The folder of a reader: images without labels, labelled ones of every kind, and a run."""
    return shared(tmp_path_factory, "reader", make_reader)


def make_reader(folder):
    images = sorted((SAMPLE / "images").iterdir())
    boxes = boxes_of(SAMPLE / "instances.json")
    copy(images, folder / "scenes")
    copy(images[:1], folder, "photo.jpg")
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    for part, chosen in (("train", images[:16]), ("val", images[16:24])):
        labelled = "images" if part == "train" else "images-val"
        copy(chosen, folder / labelled)
        draw_masks(chosen, boxes, folder / labelled.replace("images", "masks"))
        if part == "train":
            draw_masks(chosen, boxes, folder / "instance_masks", numbered=True)
        write_labels(chosen, boxes, folder, part)
    with contextlib.chdir(folder):
        gtsa.pretrain("scenes", out="runs/mine", **SMALL["pretrain"])
    for name, given in (("photos", "scenes"), ("unlabelled", "scenes"), ("labelled", "train"), ("RUN", "runs/mine")):
        shutil.copytree(folder / given, folder / name)  # names in the README


def boxes_of(file):
    content = json.loads(file.read_text())
    names = {image["id"]: image["file_name"] for image in content["images"]}
    boxes = {name: [] for name in names.values()}
    for annotation in content["annotations"]:
        boxes[names[annotation["image_id"]]].append(annotation["bbox"])
    return boxes


def size_of(image):
    with Image.open(image) as picture:
        return picture.size


def copy(images, folder, name=None):
    folder.mkdir(parents=True, exist_ok=True)
    for image in images:
        shutil.copy(image, folder / (name or image.name))


def draw_masks(images, boxes, folder, numbered=False):
    """Masks of trees: 1 for all, or a number for each."""
    folder.mkdir()
    for image in images:
        mask = Image.new("L", size_of(image), 0)
        for number, (x, y, w, h) in enumerate(boxes[image.name], start=1):
            ImageDraw.Draw(mask).ellipse((x, y, x + w, y + h), fill=number if numbered else 1)
        mask.save(folder / f"{image.stem}.png")


def write_labels(images, boxes, folder, part):
    """Class folders by the number of trees, a JSON of several classes an image, and COCO JSON with masks."""
    many = np.median([len(boxes[image.name]) for image in images])
    tags, coco = (
        {},
        {"images": [], "annotations": [], "categories": [{"id": 1, "name": "tree"}, {"id": 2, "name": "bush"}]},
    )
    for number, image in enumerate(images, start=1):
        forest = len(boxes[image.name]) > many
        copy([image], folder / part / ("forest" if forest else "meadow"))
        tags[image.name] = ["trees", "shade"] if forest else ["grass"]
        width, height = size_of(image)
        coco["images"].append({"id": number, "file_name": image.name, "width": width, "height": height})
        for x, y, w, h in boxes[image.name]:
            outline = [x, y, x + w, y, x + w, y + h, x, y + h]
            kind = 1 if w * h > 600 else 2
            coco["annotations"].append(
                {"id": len(coco["annotations"]) + 1, "image_id": number, "category_id": kind, "bbox": [x, y, w, h],
                 "area": w * h, "iscrowd": 0, "segmentation": [outline]}
            )  # fmt: skip
    (folder / f"{part}.json").write_text(json.dumps(coco))
    (folder / f"tags-{part}.json").write_text(json.dumps(tags))


def make_small(monkeypatch):
    """Puts the sizes of docs/small.yaml in place of those given, for commands and for Python alike."""
    for verb, small in SMALL.items():
        monkeypatch.setattr(gtsa, verb, smaller(getattr(gtsa, verb), small))


def smaller(function, small):
    first = next(iter(inspect.signature(function).parameters))

    def call(*given, **settings):
        settings = {**dict(zip((first, "task"), given, strict=False)), **settings}
        for name in ("init", "weights"):
            if str(settings.get(name)).startswith("timm:"):
                settings[name] = "runs/mine"  # published weights need the network
        if settings.get("init") or settings.get("resume"):
            settings.pop("model", None)
            return function(**merged(settings, {k: v for k, v in small.items() if k != "model"}))
        return function(**merged(settings, small))

    return call


@pytest.mark.parametrize("page", RUN, ids=name_of)
def test_commands_and_snippets(page, reader, tmp_path, monkeypatch):
    place = tmp_path / "reader"
    shutil.copytree(reader, place)
    monkeypatch.chdir(place)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if not as_written(page):
        make_small(monkeypatch)
    names = {"__name__": "__main__"}
    for block in blocks(page):
        where = f"{name_of(page)}:{block.line}"
        if block.not_run:
            continue
        if block.language == "python":
            exec(compile(block.text, where, "exec"), names)
        elif block.language in SHELL:
            run_shell(block.text, where)
        elif block.language == "yaml" and block.text.startswith("# "):
            Path(block.text.split()[1]).write_text(block.text)  # a file of settings that the page shows by name


def run_shell(text, where):
    commands = lines(text)
    if any(gtsa_words(command, VERBS) is None for command in commands):
        commands = [text] if "<<" in text else commands
    for command in commands:
        words = gtsa_words(command, VERBS)
        if words is None or "|" in command:
            done = subprocess.run(["bash", "-ec", command], capture_output=True, text=True, timeout=600)
            code, out, err = done.returncode, done.stdout, done.stderr
        else:
            code, out, err = run(*words)
        assert code == 0, f"{where}: {command}\n{out[-2000:]}\n{err[-2000:]}"


def test_all_pages_build_and_every_flag_is_in_the_reference(tmp_path):
    """`make docs`: warnings are errors."""
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-n", "-W", "--keep-going", "-q", "docs", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    for verb in (*VERBS, "completion"):
        page = tmp_path / f"reference/{verb if (DOCS / f'reference/{verb}.md').exists() else 'commands'}.html"
        shown = page.read_text()
        known = {name for argument in app[verb].assemble_argument_collection() for name in argument.names}
        missing = [flag for flag in known - {"*", "--config", "--print-config"} if f">{flag}</span>" not in shown]
        assert not missing, verb


@pytest.mark.parametrize("path", sorted((DOCS / "notebooks").glob("*.ipynb")), ids=lambda path: path.name)
def test_notebooks(path, tmp_path, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    book = nbformat.read(path, as_version=4)
    NotebookClient(book, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
