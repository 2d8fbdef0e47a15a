"""The run folder: nobody's files are lost, and a start that fails changes nothing."""

import json
import shutil

import pytest

import gtsa
from conftest import TINY, make_scenes, run, shared
from gtsa.core.errors import UserError
from gtsa.core.seeds import Stream, generator
from gtsa.pretraining.requested import SAMPLE, requested_settings

SHORT = {**TINY, "steps": 4, "checkpoint_every": 2, "evaluate_every": 2}


def contents(folder):
    """All files but the log, which tells of every start."""
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "train.log"}


@pytest.fixture(scope="module")
def old(tmp_path_factory, scenes):
    return shared(tmp_path_factory, "short", lambda out: gtsa.pretrain(str(scenes), out=str(out), **SHORT))


@pytest.fixture
def copied(old, tmp_path):
    return shutil.copytree(old, tmp_path / "run")


def test_overwrite_needs_a_run_of_ours(tmp_path, scenes):
    for name in ("pictures/holiday.png", "checkpoints/user.txt", "notes.txt"):
        (tmp_path / "home" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "home" / name).write_text("mine")
    before = contents(tmp_path / "home")
    for way in ("overwrite", "resume"):
        with pytest.raises(UserError, match="no run of gtsa"):
            gtsa.pretrain(str(scenes), out=str(tmp_path / "home"), **{way: True}, **SHORT)
        assert contents(tmp_path / "home") == before


def test_overwrite_leaves_what_is_not_ours_in_our_folders(copied, scenes):
    for name in ("pictures/holiday.png", "checkpoints/user.txt", "exports/mine/a.bin"):
        (copied / name).parent.mkdir(parents=True, exist_ok=True)
        (copied / name).write_text("mine")
    gtsa.pretrain(str(scenes), out=str(copied), overwrite=True, **{**SHORT, "steps": 2})
    assert [
        (copied / n).read_text() for n in ("pictures/holiday.png", "checkpoints/user.txt", "exports/mine/a.bin")
    ] == ["mine"] * 3
    assert [p.name for p in (copied / "checkpoints").glob("step-*")] == ["step-00000002"]


@pytest.mark.parametrize(
    ("settings", "code"),
    [
        ({"data": "nowhere"}, 3),
        ({"init": "nowhere.pth"}, 4),
        ({"model": "resnet50"}, 2),
        ({"eval": ("knn",)}, 2),
        ({"batch_size": 5000}, 2),
    ],
)
def test_a_start_that_fails_costs_no_run(copied, scenes, settings, code):
    before = contents(copied)
    with pytest.raises(UserError) as error:
        gtsa.pretrain(**{"data": str(scenes), "out": str(copied), "overwrite": True, **SHORT, **settings})
    assert error.value.code == code
    assert contents(copied) == before


def test_data_inside_the_folder_to_be_overwritten_is_refused(copied):
    data = make_scenes(copied / "pictures", 4)
    with pytest.raises(UserError, match="lies inside --out") as error:
        gtsa.pretrain(str(data), out=str(copied), overwrite=True, **SHORT)
    assert error.value.code == 8
    assert len(list(data.glob("scene_*"))) == 4


def test_a_failed_start_leaves_no_folder(tmp_path, scenes):
    with pytest.raises(UserError):
        gtsa.pretrain(str(tmp_path / "nowhere"), out=str(tmp_path / "run"), **SHORT)
    assert not (tmp_path / "run").exists()
    gtsa.pretrain(str(scenes), out=str(tmp_path / "run"), **{**SHORT, "steps": 2})


def test_a_failed_resume_changes_nothing(copied, tmp_path):
    before = contents(copied)
    code, _, err = run("pretrain", "--out", copied, "--resume", "--data", tmp_path / "nowhere")
    assert code == 3, err
    assert contents(copied) == before
    assert run("pretrain", "--out", copied, "--resume")[0] == 0


@pytest.mark.parametrize("place", ["missing", "empty", "foreign"])
def test_resume_without_data_needs_a_run(tmp_path, place):
    out = tmp_path / place
    if place != "missing":
        out.mkdir()
    if place == "foreign":
        (out / "notes.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    code, printed, err = run("pretrain", "--resume", "--out", out)
    expected = f"gtsa: --resume: there is no run in {out}; check --out, or give --data to start a run there\n"
    assert (code, printed, err) == (2, "", expected)
    assert run("pretrain", "--resume", "--plan", "--out", out)[0] == 2
    assert sorted(tmp_path.rglob("*")) == before


def test_resume_without_data_needs_out(tmp_path):
    for given in (("--resume",), ("--resume", "--plan")):
        assert run("pretrain", *given)[::2] == (
            2,
            "gtsa: --out is missing: --resume needs the folder of the run\n",
        )


def test_resume_with_data_starts_a_run(tmp_path, scenes):
    out = str(tmp_path / "new")
    settings = requested_settings({"out": out, "resume": True, "data": str(scenes)})
    assert (settings.data, settings.out) == (str(scenes), out)
    gtsa.pretrain(str(scenes), out=out, resume=True, **{**SHORT, "steps": 2})
    assert list((tmp_path / "new" / "checkpoints").glob("step-00000002"))


def test_without_data_a_run_on_the_sample_starts(tmp_path):
    out = str(tmp_path / "new")
    new = requested_settings({"out": out})
    assert new.data == str(SAMPLE / "images") and new.model == "test_vit" and new.out == out


def test_resume_of_a_run_whose_settings_are_gone_does_not_start_the_sample(copied):
    (copied / "config.yaml").unlink()
    shutil.rmtree(copied / "checkpoints")  # which have them, too
    with pytest.raises(UserError, match=r"config\.yaml is missing") as error:
        gtsa.pretrain(out=str(copied), resume=True)
    assert error.value.code == 4


def test_resume_of_a_finished_run_evaluates_once(copied):
    gtsa.pretrain(out=str(copied), resume=True)
    assert [json.loads(line)["step"] for line in (copied / "health.jsonl").read_text().splitlines()] == [2, 4]
    with pytest.raises(UserError, match="4 steps are done"):
        gtsa.pretrain(out=str(copied), resume=True, steps=2)


def test_what_is_left_to_us_stays_as_it_was_resolved(copied):
    gtsa.pretrain(
        out=str(copied), resume=True, precision="auto", learning_rate="auto", views={"local_crops_size": "auto"}
    )
    with pytest.raises(UserError, match="precision"):
        gtsa.pretrain(out=str(copied), resume=True, precision="bf16")


def test_checkpoints_without_their_images_are_refused(copied):
    (copied / "images.jsonl").unlink()
    with pytest.raises(UserError, match=r"images\.jsonl is gone"):
        gtsa.pretrain(out=str(copied), resume=True)
    assert list((copied / "checkpoints").glob("step-*"))


def test_a_held_out_image_that_goes_bad_is_named_and_left_out(tmp_path):
    data = make_scenes(tmp_path / "data", 14)
    out = tmp_path / "run"
    gtsa.pretrain(str(data), out=str(out), **SHORT)
    names = [json.loads(line)["name"] for line in (out / "images.jsonl").read_text().splitlines()]
    held = generator(0, Stream.HELD_OUT).random(len(names)).argsort(kind="stable")[: TINY["hold_out"]]
    name = names[held[0]]
    (data / name).write_bytes((data / name).read_bytes()[:50])
    done = gtsa.pretrain(out=str(out), resume=True)
    assert done.verdict.metrics["images"] == TINY["hold_out"] - 1
    assert name in (out / "train.log").read_text()
