"""The index of a tar file: what it says of any archive, whole or cut, is what Python's tarfile says."""

import io
import json
import tarfile

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gtsa.data.shards.tar_index import NotTar, from_json, has_member, read_index, to_json

SUFFIXES = {".jpg", ".png"}
FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)

part = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/\0"), min_size=1, max_size=30)
stem = st.one_of(part, st.text("ab", min_size=90, max_size=300), st.just("ü" * 60))
name = st.builds(
    lambda folders, last, suffix: "/".join([*folders, last + suffix]),
    st.lists(part, max_size=3),
    stem,
    st.sampled_from([".jpg", ".PNG", ".json", ""]),
)
member = st.tuples(name, st.sampled_from([0, 1, 511, 512, 513, 1024, 3000]))


def written(members, form=tarfile.PAX_FORMAT, **more):
    """The bytes of an archive of ``[(name, size or TarInfo)]``; a name that the format cannot hold is left out."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form, **more) as archive:
        for number, (one, size) in enumerate(members):
            info = tarfile.TarInfo(one)
            info.size = size
            try:
                archive.addfile(info, io.BytesIO(bytes([number % 251 + 1]) * size))
            except ValueError:
                assert form == tarfile.USTAR_FORMAT
    return file.getvalue()


def indexed(raw):
    return read_index(lambda offset, length: raw[offset : offset + length], len(raw), SUFFIXES)


def places(index):
    """{name: (offset, size)} of the images that can be read."""
    triples = zip(index.names, index.offsets, index.sizes, strict=True)
    return {n: (o, s) for number, (n, o, s) in enumerate(triples) if number not in index.bad}


def is_image(one):
    visible = not any(piece.startswith(".") for piece in one.removeprefix("./").split("/"))
    return visible and one[-4:].lower() in SUFFIXES


def from_tarfile(raw, end=None):
    """The same by Python's tarfile, of the images that lie before ``end``. The last of equal names counts."""
    with tarfile.open(fileobj=io.BytesIO(raw)) as archive:
        return {
            m.name.removeprefix("./"): (m.offset_data, m.size)
            for m in archive
            if m.isreg() and is_image(m.name) and (end is None or m.offset_data + m.size <= end)
        }


@settings(deadline=None, max_examples=150)
@given(st.lists(member, max_size=6), st.sampled_from(FORMATS))
@example([("./a.jpg", 5), ("a.jpg", 7)], tarfile.GNU_FORMAT)
@example([(f"{'d' * 99}/{'e' * 90}.jpg", 513)], tarfile.USTAR_FORMAT)
def test_it_is_that_of_tarfile(members, form):
    raw = written(members, form)
    index = indexed(raw)
    assert places(index) == from_tarfile(raw)
    assert not index.problem and not index.bad


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_a_cut_archive_gives_the_images_before_the_cut_and_says_so(data):
    """Wherever it is cut. The end mark alone may be missing without a lost image."""
    members = [(f"{n}{one}", size) for n, (one, size) in enumerate(data.draw(st.lists(member, min_size=1, max_size=4)))]
    raw = written(members, data.draw(st.sampled_from(FORMATS)))
    with tarfile.open(fileobj=io.BytesIO(raw)) as archive:
        content = max([m.offset_data + -(-m.size // 512) * 512 for m in archive], default=0)
    end = data.draw(st.integers(0, content))
    try:
        index = indexed(raw[:end])
    except NotTar:
        assert not from_tarfile(raw, end)
        return
    assert places(index) == from_tarfile(raw, end)
    assert "cut off" in index.problem or "ends within" in index.problem


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_any_bytes_give_an_index_or_a_reason(data):
    raw = bytearray(written([(f"{n}.jpg", size) for n, size in enumerate((700, 0, 20))], tarfile.PAX_FORMAT))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        index = indexed(bytes(raw))
    except NotTar as reason:
        assert str(reason)
        return
    assert all(offset + size <= len(raw) for offset, size in places(index).values())
    assert len(index.names) == 3 or index.problem or index.ignored


@given(st.binary(max_size=2000))
def test_other_files_are_no_archives(raw):
    try:
        assert not indexed(raw).names
    except NotTar as reason:
        assert str(reason)


@pytest.mark.parametrize(("mode", "form"), [("w:gz", "gzip"), ("w:bz2", "bzip2"), ("w:xz", "xz")])
def test_a_compressed_archive_says_so(mode, form):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:
        archive.addfile(tarfile.TarInfo("a.jpg"))
    with pytest.raises(NotTar, match=f"compressed with {form}"):
        indexed(file.getvalue())


def test_members_that_are_no_images_are_counted():
    raw = written(
        [("a.jpg", 3), ("a.json", 3), ("b.json", 3), ("noext", 1), (".h.jpg", 1), ("d/._x.png", 1), ("a.jpg", 4)]
    )
    index = indexed(raw)
    assert index.names == ["a.jpg"] and index.sizes == [4]
    assert index.ignored == {".json": 2, "no suffix": 1, "hidden": 2, "repeated": 1}


def test_links_and_sparse_images_have_a_reason():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo("folder.jpg/"))
        for one, kind in (("hard.jpg", tarfile.LNKTYPE), ("soft.jpg", tarfile.SYMTYPE), ("sparse.jpg", b"S")):
            info = tarfile.TarInfo(one)
            info.type, info.linkname = kind, "a.jpg"
            archive.addfile(info)
        folder = tarfile.TarInfo("b.jpg")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        archive.addfile(tarfile.TarInfo("z.jpg"))
    index = indexed(file.getvalue())
    reasons = {index.names[number]: reason for number, reason in index.bad.items()}
    assert sorted(reasons) == ["hard.jpg", "soft.jpg", "sparse.jpg"]
    assert "a hard link: pack the file itself" in reasons["hard.jpg"]
    assert "sparse" in reasons["sparse.jpg"]
    assert list(places(index)) == ["z.jpg"]


def test_sizes_of_more_than_eight_gigabytes_are_read():
    """Only the headers: nothing of that size is written."""
    huge = tarfile.TarInfo("huge.jpg")
    huge.size = 9 * 2**30
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        head = huge.tobuf(form)
        tail = written([("a.jpg", 3)])
        total = len(head) + huge.size + len(tail)

        def read(offset, length, head=head, tail=tail, total=total):
            start = total - len(tail)
            return (
                head[offset : offset + length] if offset < len(head) else tail[offset - start : offset - start + length]
            )

        index = read_index(read, total, SUFFIXES)
        assert (index.names, index.sizes, index.problem) == (["huge.jpg", "a.jpg"], [9 * 2**30, 3], "")


@settings(deadline=None)
@given(st.lists(member, max_size=5))
def test_it_is_kept_as_json(members):
    index = indexed(written([*members, ("link.jpg", 0)]))
    index.bad[0] = "a reason"
    mark = {"bytes": 5, "mtime_ns": 7}
    raw = to_json(index, mark)
    assert from_json(raw, lambda other: other == mark) == index
    assert from_json(raw, lambda other: other == {"bytes": 6}) is None


@pytest.mark.parametrize("change", [{"schema": 99}, {"names": []}, {"offsets": ["x"]}, {"bad": [1]}, {"more": 1}])
def test_a_damaged_index_is_not_used(change):
    raw = to_json(indexed(written([("a.jpg", 3)])), {})
    assert from_json(json.dumps(json.loads(raw) | change).encode(), lambda _: True) is None
    assert from_json(raw[: len(raw) // 2], lambda _: True) is None


def test_the_header_before_an_image_is_recognised():
    raw = written([("a.jpg", 700), ("x" * 300 + ".jpg", 20)])
    index = indexed(raw)

    def read(offset, length, by=0):
        return raw[offset + by : offset + by + length]

    assert all(has_member(read, index, number) for number in (0, 1, -1))
    assert not has_member(lambda offset, length: read(offset, length, 512), index, 0)
    index.sizes[0] += 1
    assert not has_member(read, index, 0)
