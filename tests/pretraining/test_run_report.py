"""gtsa report: one page of a run in any state, from its files; what it must not show, it does not."""

import itertools
import json
import re
import shutil
import tarfile
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, ImageOps

from conftest import SMALL_HEADS, TINY, make_scenes, run
from gtsa import pretrain, report
from gtsa.core import stops
from gtsa.pretraining.report import page, pictures
from gtsa.pretraining.report.network import open_network
from gtsa.pretraining.run_record import read_run
from gtsa.training import checkpoint

OLD = Path(__file__).parents[1] / "golden" / "run_of_schema_1.tar.xz"
NASTY = "<script>window.hacked=1<\u2044script>\u202egnp.png"  # "/" cannot be in a file name


class Page(HTMLParser):
    """The text, headings and images of a page."""

    def __init__(self, path):
        super().__init__()
        self.raw = Path(path).read_text()
        self.words, self.headings, self.images, self.inside = [], [], [], []
        self.feed(self.raw)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.inside.append(tag)
        if tag == "img":
            self.images.append(dict(attrs))

    def handle_data(self, data):
        tag = self.inside[-1] if self.inside else ""
        if re.fullmatch(r"h\d", tag):
            self.headings.append((int(tag[1]), data.strip()))
        if tag not in ("script", "style"):
            self.words.append(data)

    def handle_endtag(self, tag):
        while self.inside and self.inside.pop() != tag:
            pass


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def write(folder, *more):
    """The page of a run, as the command line writes it."""
    code, out, err = run("report", folder, *more)
    assert code == 0, err
    return Page(Path(out.partition("report: ")[2].strip()))


def test_a_run_ends_with_its_report(finished):
    page = Page(finished / "report.html")
    titles = [title for _, title in page.headings]
    wanted = ["Verdict", "What was learnt", "Feature maps", "Similar patches", "Rotation prediction"]
    wanted += ["Targets and predictions", "Attention", "Curves", "Throughput", "Data", "Example views"]
    assert [title for title in titles if title in wanted] == wanted
    assert "What is missing" not in titles
    assert "Finished: 12 steps." in page.text
    last = json.loads((finished / "health.jsonl").read_text().splitlines()[-1])
    assert last["reasons"] and all(f"{reason[1:]}." in page.text for reason in last["reasons"])
    plan = json.loads((finished / "plan.json").read_text())
    assert {"name": "device", "value": "1 x cpu, precision 32", "reason": "no GPU found"} in plan
    assert all(row["reason"] in page.text for row in plan)


def test_headings_are_in_order_and_pictures_have_alternative_texts(finished):
    page = Page(finished / "report.html")
    levels = [level for level, _ in page.headings]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert len(page.images) > 20
    assert all(image["alt"] and image["src"].startswith("data:image/jpeg;base64,") for image in page.images)
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", page.raw)


def test_pictures_name_their_files_and_captions_do_not_break(finished):
    """The names are those of the images that are drawn: the first held-out ones."""
    page = Page(finished / "report.html")
    tensors, _ = checkpoint.read(checkpoint.newest(finished / "checkpoints")[0])
    shown = tensors["start"]["shown"].tolist()
    record = read_run(finished)
    names = [record.images[index] for index in shown]
    for number, (name, kept) in enumerate(zip(names, tensors["start"]["gallery"], strict=True), start=1):
        assert f"Image {number}: {name}" in page.text
        with Image.open(Path(record.settings.data) / name) as image:
            central = ImageOps.fit(image.convert("RGB"), tuple(kept.shape[1:]))
        assert np.abs(np.asarray(central, float).transpose(2, 0, 1) - kept.numpy()).mean() < 8
    captions = re.findall(r"predicted \d+° \(\d+(.)%\)", page.raw)
    assert set(captions) == {"\N{NO-BREAK SPACE}"}


def test_names_below_pictures_are_text(tmp_path):
    scenes = make_scenes(tmp_path / "scenes")
    for path in scenes.iterdir():
        path.rename(path.with_name(f"{path.stem}{NASTY}"))
    pretrain(str(scenes), out=str(tmp_path / "run"), **{**TINY, "steps": 1, "evaluate_every": 1})
    page = write(tmp_path / "run")
    assert "<script>window.hacked" not in page.raw and "Image 1: scene_" in page.text
    page = write(tmp_path / "run", "--no-images")
    assert "scene_" not in page.raw


def test_charts_have_the_names_of_the_verdict(finished):
    page = Page(finished / "report.html")
    titles = set(data_of_charts(page))
    assert {"Region prediction, gain over step 0", "Patch localisation in another view, gain over step 0"} <= titles
    assert "Region prediction (cosine" in page.text and "Patch localisation in another view (1: at" in page.text


def test_its_numbers_are_those_of_the_logs(finished):
    page = Page(finished / "report.html")
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    data = data_of_charts(page)
    loss = [[line["step"], line["loss"]] for line in lines]
    assert [point[:2] for point in data["Loss"]["lines"][0]["points"]] == loss
    speed = [4 / line["seconds"] for line in lines]
    assert [p[1] for p in data["Images per second"]["lines"][0]["points"]] == pytest.approx(speed)
    rate = data["Learning rate"]["lines"][0]["points"]
    assert max(y for _, y, *_ in rate) == pytest.approx(read_run(finished).settings.learning_rate)


def test_without_images_there_are_no_pixels_and_no_names(copied, tmp_path):
    page = write(copied, "--no-images", "--out", tmp_path / "deep" / "page.html")
    assert page.images == [] and "data:image" not in page.raw
    assert "scene_" not in page.raw  # the names of all images
    assert "no pixels of images" in page.text
    assert "Curves" in [title for _, title in page.headings]


def test_bad_files_are_named_as_text_also_without_images(tmp_path):
    scenes = make_scenes(tmp_path / "scenes")
    (scenes / NASTY).write_bytes(b"no image")
    settings = {**TINY, "steps": 2, "checkpoint_every": 2, "evaluate_every": 2}
    pretrain(str(scenes), out=str(tmp_path / "run"), **settings)
    assert not (tmp_path / "run" / "report.html").exists()
    for flags in ((), ("--no-images",)):
        page = write(tmp_path / "run", *flags)
        assert "<script>window.hacked" not in page.raw
        assert "<script>window.hacked=1<\u2044script>\\u202egnp.png" in page.text
        assert "before training" in page.text


def test_an_image_that_became_unreadable_is_named(copied):
    (state,) = copied.glob("checkpoints/step-00000012/state.json")
    manifest = json.loads((state.parent / "manifest.json").read_text())
    values = json.loads(state.read_text())
    values["unreadable"] = {"3": "cut short"}
    manifest["files"]["state.json"] = checkpoint._store(state, checkpoint._json(values))
    checkpoint._store(state.parent / "manifest.json", checkpoint._json(manifest))
    page = write(copied, "--no-images")
    assert "scene_03.png cut short during training" in page.text
    assert page.raw.count("scene_") == 1


def data_of_charts(page):
    charts = re.findall(r'data-chart="([^"]+)".*?class="title">([^<]+)<', page.raw, re.S)
    return {title: json.loads(text.replace("&#34;", '"')) for text, title in charts}


def test_noise_does_not_fill_the_axes(finished):
    include = {title: chart["include"] for title, chart in data_of_charts(Page(finished / "report.html")).items()}
    assert include["Effective rank"] == include["Learning rate"] == include["Images per second"] == [0]
    assert include["Spread"] == [0, 1] and include["Loss"] == []


def test_attention_says_how_uniform_it_is(finished, monkeypatch):
    captions = re.findall(r"(all heads|head \d): ([\d.]+) x mean", Page(finished / "report.html").text)
    assert {name for name, _ in captions} == {"all heads", "head 1", "head 2"}
    peaked = torch.zeros(1, 1, 4, 4)
    peaked[0, 0, 1, 2] = 1
    for maps, *sentences in (
        (torch.ones(1, 1, 4, 4) / 16, "head 1: 1.0 x mean", "2 of 2 maps are nearly uniform"),
        (peaked, "head 1: 16.0 x mean", "0 of 2 maps are nearly uniform"),
    ):
        monkeypatch.setattr(pictures, "attention_maps", lambda *_, maps=maps: maps)
        section = "".join(pictures.attention(open_network(read_run(finished))))
        assert all(sentence in section for sentence in sentences)


def test_predictions_are_compared_with_the_targets_of_all_images(finished):
    predicted, target = torch.randn(2, 3, 2, 2, 5, generator=torch.Generator().manual_seed(0))
    cosines = pictures.similarities_of_images(predicted, target)
    expected = torch.nn.functional.cosine_similarity(predicted[0], target[2], dim=-1).mean()
    assert float(cosines[0, 2]) == pytest.approx(float(expected), abs=1e-6)
    sentence = pictures.describe_similarity(torch.tensor([[0.5, 0.1, 0.3], [0.0, 0.7, 0.0], [0.0, 0.0, 0.9]]), 0)
    assert sentence == "Cosine similarity 0.50; with the targets of other images 0.20."
    assert pictures.describe_similarity(torch.tensor([[0.5]]), 0) == "Cosine similarity 0.50."
    assert re.search(r"framed\. Cosine similarity -?\d\.\d\d; with", Page(finished / "report.html").text)


def test_the_range_of_colour_images_of_16_bits_is_in_the_report_and_in_the_plan(tmp_path, capsys):
    """Pillow calls them RGB; their depth is in the header alone."""
    (tmp_path / "data").mkdir()
    for number in range(4):
        values = np.random.default_rng(number).integers(0, 65536, (64, 64, 3), dtype=np.uint16)
        tifffile.imwrite(tmp_path / "data" / f"{number}.tif", values, photometric="rgb")
    pretrain(str(tmp_path / "data"), out=str(tmp_path / "run"), **TINY | {"steps": 1, "hold_out": 0})
    row = next(line for line in capsys.readouterr().out.splitlines() if "16-bit values" in line)
    assert "0 to 65535, black to white" in row and "all values of 16 bits" in row
    report(tmp_path / "run", images=False)
    text = Page(tmp_path / "run" / "report.html").text
    assert "16-bit values, black to white 0 to 65535" in " ".join(text.split())


def test_the_range_of_16_bit_values(copied):
    words = "16-bit values, black to white"
    assert words not in write(copied, "--no-images").text
    scan = json.loads((copied / "scan.json").read_text())
    early = {name: value for name, value in scan.items() if name != "of_16_bits"} | {"formats": {"TIFF I;16": 14}}
    for content in (scan | {"of_16_bits": 14}, early):
        (copied / "scan.json").write_text(json.dumps(content))
        assert f"{words} 0 to 65535" in write(copied, "--no-images").text
    (copied / "scan.json").write_text(json.dumps(scan))
    settings = (copied / "config.yaml").read_text()
    (copied / "config.yaml").write_text(re.sub(r"(?m)^range16:.*(\n- .*)*$", "range16: [0, 4095]", settings))
    assert f"{words} 0 to 4095" in write(copied, "--no-images").text


# Runs in other states


def test_a_run_in_progress(copied):
    import fcntl

    with open(copied / ".lock", "rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (copied / "train.log").unlink()
        text = (copied / "metrics.jsonl").read_bytes()
        (copied / "metrics.jsonl").write_bytes(text[: len(text) - 30])  # the last line is half written
        page = write(copied)
    assert "In progress: step 12 of 12 when this page was written." in page.text
    assert "cannot be read" not in page.text


def test_a_run_that_died_before_its_first_checkpoint(copied):
    shutil.rmtree(copied / "checkpoints")
    for name in ("health.jsonl", "train.log", "report.html"):
        (copied / name).unlink()
    lines = (copied / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copied / "metrics.jsonl").write_text("".join(lines[:2]) + '{"step": 6, "lo\n')
    page = write(copied)
    assert "Ended early, after step 4 of 12, without a message" in page.text
    assert "Pictures: there is no checkpoint yet." in page.text
    assert "metrics.jsonl: 1 line cannot be read." in page.text
    assert "There is none yet: the first evaluation is after step 6." in page.text


def test_a_run_that_was_stopped_says_why(copied):
    lines = (copied / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copied / "metrics.jsonl").write_text("".join(lines[:4]))
    health = (copied / "health.jsonl").read_text().splitlines(keepends=True)
    (copied / "health.jsonl").write_text(health[0])
    (copied / "train.log").write_text("2026-01-01 00:00:00 ended: stopped on request at step 8 of 12\n")
    page = write(copied)
    assert "Ended early, after step 8 of 12: stopped on request at step 8 of 12." in page.text
    assert "(at step 6, the last evaluation)" in page.text


def test_a_run_of_schema_1(tmp_path):
    with tarfile.open(OLD) as archive:
        archive.extractall(tmp_path, filter="data")
    page = write(tmp_path / "run")
    assert "Finished: 12 steps." in page.text
    assert "plan.json is missing: the run began with a version of gtsa that did not keep it" in page.text
    assert {"Feature maps", "Rotation prediction", "Curves"} <= {title for _, title in page.headings}


@pytest.mark.parametrize("method", ["dino", "mae"])
def test_a_run_of_another_method(method, scenes, tmp_path):
    few = {key: value for key, value in TINY.items() if key != "gtsa"}
    settings = {**few, "steps": 1, "evaluate_every": 1, "method": method, method: SMALL_HEADS[method]}
    pretrain(str(scenes), out=str(tmp_path / "run"), **settings)
    page = write(tmp_path / "run")
    titles = {title for _, title in page.headings}
    assert {"Feature maps", "Similar patches", "Attention", "Example views"} <= titles
    assert not {"Rotation prediction", "Targets and predictions", "What is missing"} & titles


def test_a_run_without_config_is_read_by_its_checkpoint(copied):
    (copied / "config.yaml").unlink()
    assert "Finished: 12 steps." in write(copied).text


# What must not cost a run


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("fault"), stops.Stopped(15)])
def test_an_error_of_the_report_is_one_line(scenes, tmp_path, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(page, "make_page", fail)
    settings = {**TINY, "steps": 1, "checkpoint_every": 1, "evaluate_every": 1, "report": True}
    from gtsa.core.settings_file import plain_yaml

    (tmp_path / "config.yaml").write_text(plain_yaml(settings))
    command = ("pretrain", "--data", scenes, "--out", tmp_path / "run", "--config", tmp_path / "config.yaml")
    code, out, err = run(*command)
    assert code == 0, err
    (line,) = [line for line in out.splitlines() if line.startswith("report: ")]
    assert f"'gtsa report {tmp_path / 'run'}' writes it" in line
    assert (tmp_path / "run" / "exports" / "timm" / "model.safetensors").exists()


def test_a_picture_that_fails_is_named_and_the_others_stay(copied, monkeypatch):
    def fail(_):
        raise RuntimeError("no picture today")

    monkeypatch.setattr(pictures, "attention", fail)
    page = write(copied)
    assert "Attention: could not be drawn (RuntimeError: no picture today)." in page.text
    assert "Feature maps" in [title for _, title in page.headings]


# Wrong input


def test_what_is_no_run_is_refused(tmp_path, finished):
    (tmp_path / "other").mkdir()
    (tmp_path / "comparison" / "cells").mkdir(parents=True)
    (tmp_path / "comparison" / "report.html").write_text("")
    for folder, words in (
        ("nowhere", "there is no such folder; give the --out of a gtsa pretrain"),
        ("other", "holds no run of gtsa"),
        ("comparison", "is a comparison; its page is"),
    ):
        code, _, err = run("report", tmp_path / folder)
        assert (code, words in err) == (2, True), err


def test_an_out_that_cannot_be_written(copied, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = run("report", copied, "--no-images", "--out", tmp_path / "file" / "page.html")
    assert code == 6 and "cannot be written" in err and "give another file" in err
    code, _, err = run("report", copied, "--no-images", "--out", tmp_path)
    assert code == 6 and "cannot be written" in err


def test_damaged_settings_without_a_checkpoint(copied):
    shutil.rmtree(copied / "checkpoints")
    (copied / "config.yaml").write_text("model: [")
    code, _, err = run("report", copied)
    assert code == 4 and "config.yaml cannot be read" in err and "restore config.yaml" in err
