"""The contract of every source in gtsa.data.sources: a new one needs only an example here that it claims."""

import pickle
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from gtsa.data.images.pixels import BadImage
from gtsa.data.sources import Selection, kinds, open_source

GOOD, BAD = 4, 2


def picture(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 30, 3)).astype(np.uint8))


class Dataset:
    """Four pictures and two items that raise."""

    def __len__(self):
        return GOOD + BAD

    def __getitem__(self, index):
        if index >= GOOD:
            raise OSError(f"no item {index}")
        return picture(index), "label"


@pytest.fixture
def examples(tmp_path):
    """Data for a source to open; each holds four pictures and two that cannot be read."""
    for i in range(GOOD):
        picture(i).save(tmp_path / f"{i}.png")
    for i in range(BAD):
        (tmp_path / f"bad {i}.jpg").write_text("nothing")
    listed = tmp_path / "list.txt"
    listed.write_text("\n".join(f.name for f in tmp_path.iterdir()))
    shards = tmp_path / ".shards" / "0.tar"
    shards.parent.mkdir()
    with tarfile.open(shards, "w") as archive:
        for file in tmp_path.glob("*.*g"):
            archive.add(file, file.name)
    return [str(tmp_path), str(listed), Dataset(), str(shards)]


@pytest.fixture(params=kinds(), ids=lambda kind: kind.__name__)
def kind(request):
    return request.param


@pytest.fixture
def example(kind, examples):
    claimed = [example for example in examples if kind.claims(example)]
    assert len(claimed) == 1, f"no example here is for {kind.__name__}: add one"
    return claimed[0]


def reads(source):
    """{name: pixels or the reason why there are none}"""
    read_images = {}
    for i in range(len(source)):
        try:
            read_images[source.name(i)] = source.read(i)
        except BadImage as reason:
            read_images[source.name(i)] = str(reason)
    return read_images


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k] for k in a)


def test_one_kind_claims_it_and_opens_it(kind, example):
    assert [k for k in kinds() if k.claims(example)] == [kind]
    assert isinstance(open_source(example), kind)


def test_it_has_the_protocol(kind, example):
    source = kind(example, Selection(range16=(0, 65535), data_root=None))
    assert len(source) == GOOD + BAD
    assert isinstance(source.ignored, dict)
    assert list(source.unreadable) == []
    for i in range(len(source)):
        assert isinstance(source.name(i), str)
        assert isinstance(source.size(i), int)
        assert source.size(i) >= 0
        assert source.path(i) is None or open(source.path(i), "rb").close() is None
        assert source.path(i) is None or source.file(i) == source.path(i)


def test_names_are_unique_and_come_in_the_same_order_again(kind, example):
    names = [[source.name(i) for i in range(len(source))] for source in (kind(example), kind(example))]
    assert names[0] == names[1]
    assert len(set(names[0])) == GOOD + BAD


def test_images_are_read_and_the_others_have_a_reason(kind, example):
    read_images = reads(kind(example))
    images = [value for value in read_images.values() if torch.is_tensor(value)]
    reasons = [value for value in read_images.values() if isinstance(value, str)]
    assert (len(images), len(reasons)) == (GOOD, BAD)
    assert all(reasons)
    expected = {picture(i).tobytes() for i in range(GOOD)}
    assert {x.permute(1, 2, 0).numpy().tobytes() for x in images} == expected
    assert all(x.dtype == torch.uint8 for x in images)


def test_it_says_how_16_bits_are_read(kind, example):
    assert kind(example, Selection((0, 4095))).range16 == (0, 4095)


def test_the_same_read_twice_is_equal(kind, example):
    source = kind(example)
    assert equal(reads(source), reads(source))


def test_what_a_reader_does_to_pixels_stays_with_them(kind, example):
    source = kind(example)
    before = reads(source)
    kept = {k: v.clone() if torch.is_tensor(v) else v for k, v in before.items()}
    for value in before.values():
        if torch.is_tensor(value):
            value.zero_()
    assert equal(reads(source), kept)


def test_detail_may_be_given(kind, example):
    source = kind(example)
    index = next(i for i in range(len(source)) if torch.is_tensor(list(reads(source).values())[i]))
    assert source.read(index, lambda width, height: 0.5).shape[0] == 3


def test_a_copy_in_another_process_reads_the_same(kind, example):
    source = kind(example)
    assert equal(reads(pickle.loads(pickle.dumps(source))), reads(source))


def test_some_of_the_images_may_be_named(kind, example):
    whole = kind(example)
    wanted = [whole.name(i) for i in (4, 1, 2)]
    part = kind(example, files=wanted)
    assert [part.name(i) for i in range(len(part))] == wanted
    assert equal(reads(part), {name: reads(whole)[name] for name in wanted})
    assert len(kind(example, files=[])) == 0


def test_reading_leaves_the_random_numbers(kind, example):
    source, before = kind(example), (torch.get_rng_state(), np.random.get_state()[1].tolist())
    reads(source)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]
