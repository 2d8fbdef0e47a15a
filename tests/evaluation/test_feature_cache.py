"""Features on disk: what was written is read back by any later process, whole or not at all."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from gtsa.evaluation.feature_cache import FeatureCache, FileDigests


def features(grids, seed=0, width=8):
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{seed}-{i}": F.normalize(torch.randn(*grid, width, generator=generator), dim=-1)
        for i, grid in enumerate(grids)
    }


def test_a_later_process_reads_what_was_written(tmp_path):
    first, second = features([(2, 3), (4, 1)]), features([(1, 1)], seed=1)
    cache = FeatureCache(tmp_path / "a" / "b")
    cache.add(first)
    cache.add(second)
    for reader in (cache, FeatureCache(cache.folder)):
        for name, value in {**first, **second}.items():
            assert name in reader
            assert torch.equal(reader.read(name), value.half())
        assert "another" not in reader


@settings(max_examples=40, deadline=None)
@given(
    shards=st.lists(
        st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=4), min_size=1, max_size=3
    ),
    data=st.data(),
)
def test_maxima_are_those_of_every_patch(tmp_path_factory, shards, data):
    cache, everything = FeatureCache(tmp_path_factory.mktemp("cache")), {}
    for seed, grids in enumerate(shards):
        cache.add(written := features(grids, seed))
        everything |= written
    names = data.draw(st.lists(st.sampled_from(sorted(everything)), min_size=1))
    query = torch.randn(8, generator=torch.Generator().manual_seed(99))
    expected = [
        max(float(np.dot(p, query.numpy())) for p in everything[n].half().double().reshape(-1, 8).numpy())
        for n in names
    ]
    values, error = cache.maxima(query, names)
    assert (np.abs(values - expected) <= error).all() and (error < 5e-3).all()
    assert [cache.maximum(query, name) for name in names] == pytest.approx(expected, abs=1e-5)


def test_the_error_of_many_wide_rows_is_small_enough_to_distinguish_images(tmp_path):
    """384 dimensions and a query that half precision holds, as in the explorer."""
    cache, written = FeatureCache(tmp_path), features([(8, 8)] * 30, width=384)
    cache.add(written)
    query = cache.read("0-3")[2, 5].float()
    expected = [float((value.half().double() @ query.double()).max()) for value in written.values()]
    values, error = cache.maxima(query, list(written))
    assert (np.abs(values - expected) <= error).all() and error.max() < 6e-4


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"x" * 99])
def test_a_damaged_shard_is_removed_and_the_others_stay(tmp_path, damage):
    cache = FeatureCache(tmp_path)
    cache.add(features([(2, 2)]))
    cache.add(features([(3, 3)], seed=1))
    victim = sorted(tmp_path.iterdir())[0]
    victim.write_bytes(damage(victim.read_bytes()))
    again = FeatureCache(tmp_path)
    assert again.removed == [victim.name] and not victim.exists()
    assert ("0-0" in again) != ("1-0" in again)


def test_a_draft_of_a_process_that_was_killed_is_removed(tmp_path):
    draft = tmp_path / ".abc.safetensors.999999999"
    draft.write_bytes(b"half")
    assert FeatureCache(tmp_path).removed == [] and not draft.exists()


def test_two_processes_may_write_the_same(tmp_path):
    one, other = FeatureCache(tmp_path), FeatureCache(tmp_path)
    one.add(features([(2, 2)]))
    other.add(features([(2, 2)]))
    assert torch.equal(one.read("0-0"), other.read("0-0")) and len(list(tmp_path.iterdir())) == 1


def test_a_file_is_read_again_only_if_it_changed(tmp_path, monkeypatch):
    file, kept = tmp_path / "image", tmp_path / "kept.json"
    file.write_bytes(b"one")
    digests = FileDigests(kept)
    before = digests(str(file))
    digests.save()
    monkeypatch.setattr("gtsa.core.files.digest", lambda path: "read again")
    assert FileDigests(kept)(str(file)) == before
    file.write_bytes(b"another")
    assert FileDigests(kept)(str(file)) == "read again"
    kept.write_text("[1, 2")
    assert FileDigests(kept)(str(file)) == "read again"
