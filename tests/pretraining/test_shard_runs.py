"""Runs on tar shards: the same weights as from the folder, bit for bit, whatever happens on the way."""

import json
import shutil
import signal

import pytest
import torch
from serving import served
from test_exact import ended_after, lines_of

import gtsa
from conftest import TINY, final_weights, run
from forking import fork
from gtsa.core.errors import UserError
from gtsa.core.types import Draw
from gtsa.data.batches.loader import ViewSet
from gtsa.data.sources import Selection, open_source
from gtsa.data.views.multicrop import MultiCrop


@pytest.fixture(scope="module")
def shards(scenes, tmp_path_factory):
    return gtsa.shard(str(scenes), str(tmp_path_factory.mktemp("packed") / "shards"), images_per_shard=5)


def entries(out):
    return [json.loads(line) for line in (out / "images.jsonl").read_text().splitlines()]


def test_views_are_those_of_the_folder_and_the_list(shards, scenes, tmp_path):
    """Whatever the images come from: the same draws cut the same crops."""
    listed = tmp_path / "list.txt"
    listed.write_text("\n".join(path.name for path in scenes.iterdir()))
    multicrop = MultiCrop(**TINY["views"])
    folder, *others = (
        ViewSet(open_source(str(data), Selection(data_root=str(scenes))), range(14), multicrop, seed=3)
        for data in (scenes, listed, shards, shards / "{000000..000002}.tar")
    )
    for draw in (Draw(0, 0), Draw(0, 9), Draw(5, 13)):
        for views in (other[draw] for other in others):
            assert torch.equal(views.images, folder[draw].images)
            for crops, expected in zip(views.groups, folder[draw].groups, strict=True):
                for part in ("pixels", "boxes", "rotations", "colours"):
                    assert torch.equal(getattr(crops, part), getattr(expected, part))


def test_a_cache_has_no_effect_on_shards_and_is_refused(shards, tmp_path):
    with pytest.raises(UserError, match="leave it out with tar shards"):
        gtsa.pretrain(str(shards), out=str(tmp_path / "run"), cache=str(tmp_path / "cache"), **TINY)
    assert not (tmp_path / "cache").exists()


@pytest.mark.long
@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_on_shards_behind_http_is_the_run_on_the_folder(shards, finished, tmp_path, workers):
    """Workers are forked after the first requests of their parent."""
    with served(shards) as url:
        gtsa.pretrain(f"{url}/{{000000..000002}}.tar", out=str(tmp_path), workers=workers, **TINY)
    assert final_weights(tmp_path) == final_weights(finished)
    fields = ("bytes", "width", "height")
    assert [[e[f] for f in fields] for e in entries(tmp_path)] == [[e[f] for f in fields] for e in entries(finished)]


def test_a_killed_run_resumes_bit_for_bit(shards, finished, tmp_path, tiny_yaml):
    out = tmp_path / "run"
    process = fork("pretrain", "--config", tiny_yaml, "--data", f"{shards}/*.tar", "--out", out, "--workers", 2)
    code, printed = ended_after(process, out, 4)
    assert code in (-signal.SIGKILL, 0), printed
    code, _, err = run("pretrain", "--out", out, "--resume")
    assert code == 0, err
    assert final_weights(out) == final_weights(finished)
    assert lines_of(out) == lines_of(finished)


def stopped(shards, tmp_path):
    """A run on a copy of the shards, which ended at step 4."""
    copy, out = shutil.copytree(shards, tmp_path / "copy"), tmp_path / "run"
    gtsa.pretrain(str(copy), out=str(out), **TINY | {"steps": 4})
    return copy, out


def test_shards_may_move_and_their_indexes_go(shards, tmp_path):
    """The list of a run is enough; indexes are made again."""
    copy, out = stopped(shards, tmp_path)
    moved = copy.rename(tmp_path / "moved")
    for index in moved.glob("*.index"):
        index.unlink()
    gtsa.pretrain(str(moved), out=str(out), resume=True, steps=12)
    assert "could not be read" not in (out / "train.log").read_text()
    assert len(list(moved.glob("*.index"))) == 3


def test_images_that_changed_since_are_replaced_and_named(shards, scenes, tmp_path):
    copy, out = stopped(shards, tmp_path)
    other = shutil.copytree(scenes, tmp_path / "other")
    for path in sorted(other.iterdir())[:5]:
        path.write_bytes(path.read_bytes() + b"more")
    changed = gtsa.shard(str(other), str(tmp_path / "changed"), images_per_shard=5, keep_bad=True)
    for name in ("000000.tar", "000000.tar.index"):
        shutil.copy(changed / name, copy / name)
    gtsa.pretrain(out=str(out), resume=True, steps=12, max_bad=1.0)
    log = (out / "train.log").read_text()
    assert "000000.tar/" in log and "another file than when the run began" in log


def test_a_shard_that_went_missing_is_noticed_at_its_images(shards, tmp_path):
    copy, out = stopped(shards, tmp_path)
    (copy / "000001.tar").unlink()
    with pytest.raises(UserError, match="000001.tar/.*: no longer in the shards"):
        gtsa.pretrain(out=str(out), resume=True, steps=12, max_bad=0.01)
