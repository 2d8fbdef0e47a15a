"""The stream of views: the same for any workers, ranks and restarts; every image in every epoch; nothing lost in silence."""

import ctypes
import os
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gtsa.core.errors import UserError
from gtsa.core.seeds import Stream, epoch_order, generator
from gtsa.core.types import Draw
from gtsa.data.batches.loader import StepSampler, ViewSet, collate, loader
from gtsa.data.images.pixels import BadImage
from gtsa.data.views.multicrop import MultiCrop
from gtsa.training.run_folder import RunFolder

few = settings(deadline=None, max_examples=50)
SMALL = MultiCrop(global_crops_size=16, local_crops_size=8, local_crops_number=2)


class Numbers:
    """A source whose image i is noise of its own; ``bad`` ones cannot be read, ``tiny`` ones are too small."""

    def __init__(self, bad=(), tiny=()):
        self.bad, self.tiny, self.details = set(bad), set(tiny), []

    def read(self, index, detail=None):
        self.details.append(detail)
        if index in self.bad:
            raise BadImage(f"number {index} is bad")
        side = 1 if index in self.tiny else 24
        return torch.randint(0, 256, (3, side, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(index))


def view_set(images=10, bad=(), tiny=(), seed=5, multicrop=SMALL):
    return ViewSet(Numbers(bad, tiny), range(images), multicrop, seed)


def equal(a, b):
    return (
        torch.equal(a.images, b.images)
        and a.replaced == b.replaced
        and all(
            torch.equal(getattr(x, part), getattr(y, part))
            for x, y in zip(a.groups, b.groups, strict=True)
            for part in ("pixels", "boxes", "rotations", "colours")
        )
    )


def draws(*args, **options):
    return list(StepSampler(*args, **options))


# Which draws make which step

shapes = st.tuples(st.integers(1, 60), st.sampled_from([4, 8, 12]), st.integers(1, 12))


@few
@given(shapes)
def test_draws_run_through_the_epochs_position_by_position(shape):
    images, batch, steps = shape
    flat = [draw for step in draws(*shape) for draw in step]
    assert flat == [Draw(n // images, n % images) for n in range(batch * steps)]
    assert len(StepSampler(*shape)) == steps


@few
@given(shapes, st.sampled_from([1, 2, 4]), st.sampled_from([1, 2]))
def test_ranks_and_accumulation_share_out_the_same_step(shape, ranks, accumulate):
    if shape[1] % (ranks * accumulate):
        return
    whole = draws(*shape)
    parts = [draws(*shape, rank=rank, ranks=ranks, accumulate=accumulate) for rank in range(ranks)]
    assert [len(part) for part in parts] == [shape[2] * accumulate] * ranks
    for step, expected in enumerate(whole):
        micro = [part[step * accumulate + m] for m in range(accumulate) for part in parts]
        assert {len(m) for m in micro} == {shape[1] // (ranks * accumulate)}
        assert sorted(draw for m in micro for draw in m) == sorted(expected)


@few
@given(shapes, st.integers(0, 12), st.sampled_from([1, 2]))
def test_starting_late_gives_the_tail(shape, start, accumulate):
    start = min(start, shape[2])
    options = {"accumulate": accumulate, "ranks": 2, "rank": 1}
    late = StepSampler(*shape, start=start, **options)
    assert list(late) == draws(*shape, **options)[start * accumulate :]
    assert len(late) == (shape[2] - start) * accumulate


def test_a_batch_that_does_not_divide_is_named():
    with pytest.raises(UserError, match="--batch-size 6 .* 2 processes x 2") as caught:
        StepSampler(10, 6, 5, ranks=2, accumulate=2)
    assert caught.value.code == 2


@few
@given(st.integers(0, 2**40), st.integers(0, 10**6), st.integers(1, 300))
def test_an_epoch_is_a_permutation(seed, epoch, images):
    assert sorted(epoch_order(seed, epoch, images)) == list(range(images))


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = {tuple(epoch_order(seed, epoch, 50)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16
    first = Counter(int(epoch_order(0, epoch, 4)[0]) for epoch in range(400))
    assert all(60 < first[i] < 140 for i in range(4))  # 100 expected, standard deviation 8.7


@few
@given(st.integers(1, 12), st.sampled_from([1, 2, 5]))
def test_every_image_is_seen_once_an_epoch(images, batch):
    views, steps = view_set(images), 3 * images
    seen = [int(views[draw].images) for step in draws(images, batch, steps) for draw in step]
    for epoch in range(len(seen) // images):
        assert sorted(seen[epoch * images : (epoch + 1) * images]) == list(range(images))


def test_only_the_images_that_take_part_are_shown():
    views = ViewSet(Numbers(), [3, 7, 8], SMALL, 0)
    assert len(views) == 3
    assert sorted(int(views[Draw(0, position)].images) for position in range(3)) == [3, 7, 8]


# Random numbers


def test_random_numbers_are_a_pure_function_of_seed_stream_and_counter():
    positions = [
        (seed, stream, *p)
        for seed in (0, 1)
        for stream in (Stream.ORDER, Stream.VIEWS, Stream.HELD_OUT)
        for p in np.ndindex(3, 3, 3)
    ]
    values = [tuple(generator(*position).random(2)) for position in positions]
    assert len(set(values)) == len(positions)
    assert values == [tuple(generator(*position).random(2)) for position in positions]


def test_streams_of_neighbours_do_not_overlap():
    long = generator(0, Stream.VIEWS, 0, 1, 2).random(5000)
    assert not set(long) & set(generator(0, Stream.VIEWS, 1, 1, 2).random(5000))
    assert not set(long) & set(generator(0, Stream.VIEWS, 0, 2, 2).random(5000))


def test_numbers_are_those_of_earlier_versions():
    """A resumed run must continue the same stream, so these values never change."""
    assert generator(1, 2, 3, 4, 5).random(3).tolist() == [0.22712908488982364, 0.686645454093741, 0.218159770339326]
    assert epoch_order(0, 0, 10).tolist() == [5, 3, 7, 8, 2, 4, 1, 0, 6, 9]


# Views of a draw


def test_views_of_a_draw_are_the_same_again_and_others_elsewhere():
    views, again = view_set(), view_set()
    assert equal(views[Draw(0, 3)], again[Draw(0, 3)])
    image = int(views[Draw(0, 3)].images)
    later = list(epoch_order(5, 1, 10)).index(image)
    assert int(views[Draw(1, later)].images) == image
    assert not equal(views[Draw(0, 3)], views[Draw(1, later)])
    other = view_set(seed=6)
    position = list(epoch_order(6, 0, 10)).index(image)
    assert not equal(views[Draw(0, 3)], other[Draw(0, position)])
    held = ViewSet(Numbers(), range(10), SMALL, 5, stream=Stream.HELD_OUT)
    assert not equal(views[Draw(0, 3)], held[Draw(0, 3)])


def test_images_are_read_with_the_detail_that_crops_need():
    views = view_set()
    views[Draw(0, 0)]
    assert views.source.details == [SMALL.detail]


def test_reading_leaves_the_global_random_numbers():
    torch.manual_seed(0)
    np.random.seed(0)
    list(loader(view_set(), StepSampler(10, 4, 3), workers=0))
    after = torch.rand(1), np.random.rand()
    torch.manual_seed(0)
    np.random.seed(0)
    assert after == (torch.rand(1), np.random.rand())


def test_batches_are_their_draws_one_after_the_other():
    views = view_set(bad=[2])
    parts = [views[Draw(0, position)] for position in range(10)]
    batch = collate(parts)
    assert batch.images.tolist() == [int(part.images) for part in parts]
    assert batch.replaced == [r for part in parts for r in part.replaced]
    assert batch.global_crops.pixels.shape == (10, 2, 3, 16, 16)
    assert batch.local_crops.pixels.shape == (10, 2, 3, 8, 8)
    for i, part in enumerate(parts):
        for whole, one in zip(batch.groups, part.groups, strict=True):
            for field in ("pixels", "boxes", "rotations", "colours"):
                assert torch.equal(getattr(whole, field)[i], getattr(one, field)[0])


def test_batches_without_local_crops():
    views = view_set(multicrop=MultiCrop(global_crops_size=16, local_crops_number=0))
    assert collate([views[Draw(0, 0)], views[Draw(0, 1)]]).local_crops is None


# The stream


def stream(workers, views=None, **options):
    return list(loader(views or view_set(bad=[1, 4]), StepSampler(10, 8, 4, **options), workers))


def test_the_stream_is_the_same_for_any_number_of_workers():
    alone = stream(0)
    assert len(alone) == 4
    assert any(batch.replaced for batch in alone)
    for workers in (1, 2):
        assert all(equal(a, b) for a, b in zip(alone, stream(workers), strict=True))


def test_the_stream_continues_from_its_start():
    assert all(equal(a, b) for a, b in zip(stream(0)[2:], stream(0, start=2), strict=True))


@pytest.mark.parametrize(("ranks", "accumulate"), [(2, 1), (1, 2), (2, 2), (4, 2)])
def test_the_stream_is_the_same_for_any_number_of_processes(ranks, accumulate):
    parts = [stream(0, rank=rank, ranks=ranks, accumulate=accumulate) for rank in range(ranks)]
    for step, whole in enumerate(stream(0)):
        micro = [part[step * accumulate + m] for m in range(accumulate) for part in parts]
        assert equal(collate(micro), whole)


class Telling(Numbers):
    """Image 0 cannot be read; the reason is what Linux knows of the process that tried to."""

    def read(self, index, detail=None):
        if index:
            return super().read(index, detail)
        dies_by = ctypes.c_int()
        ctypes.CDLL(None).prctl(2, ctypes.byref(dies_by))  # PR_GET_PDEATHSIG
        opened = [os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]
        locks = [name for name in opened if name.endswith(".lock")]
        raise BadImage(f"dies by {dies_by.value}, group {os.getpgid(0) == os.getpid()}, locks {locks}")


@pytest.mark.skipif(sys.platform != "linux", reason="what Linux knows of a process")
def test_a_worker_ends_with_its_parent_has_its_own_group_and_holds_no_lock(tmp_path):
    run = RunFolder(tmp_path / "run")
    try:
        views = ViewSet(Telling(), range(2), SMALL, 0)
        (batch,) = loader(views, StepSampler(2, 2, 1), 1)
        assert [entry.reason for entry in batch.replaced] == ["dies by 9, group True, locks []"]
        with pytest.raises(UserError, match="another run is writing"):
            RunFolder(tmp_path / "run", resume=True)
    finally:
        run.close()


# Images that cannot be read in mid-run


def by_place(views, epoch=0):
    return [views[Draw(epoch, position)] for position in range(len(views))]


def order(views, epoch=0):
    return [int(i) for i in epoch_order(views.seed, epoch, len(views))]


@few
@given(st.sets(st.integers(0, 9), max_size=9), st.integers(0, 3))
def test_the_next_readable_image_replaces_a_bad_one(bad, epoch):
    views = view_set(bad=bad)
    wanted = order(views, epoch)
    for position, shown in enumerate(by_place(views, epoch)):
        line = wanted[position:] + wanted[:position]
        good = next(image for image in line if image not in bad)
        skipped = line[: line.index(good)]
        assert shown.images.tolist() == [good]
        assert shown.replaced == [(image, f"number {image} is bad", good) for image in skipped]


def test_a_replacement_has_views_of_its_own():
    order_ = order(view_set())
    views = view_set(bad=order_[2:4])  # two in a row: the third image is shown three times
    first, second, itself = by_place(views)[2:5]
    assert {int(v.images) for v in (first, second, itself)} == {order_[4]}
    for a, b in ((first, second), (first, itself), (second, itself)):
        assert not torch.equal(a.global_crops.boxes, b.global_crops.boxes)
        assert not torch.equal(a.local_crops.colours, b.local_crops.colours)


def test_the_other_images_are_not_touched_by_a_replacement():
    whole, order_ = by_place(view_set()), order(view_set())
    mended = by_place(view_set(bad=[order_[3]]))
    assert all(equal(a, b) for i, (a, b) in enumerate(zip(whole, mended, strict=True)) if i != 3)


def test_images_of_a_pixel_are_replaced():
    views = view_set(tiny=[6])
    (replaced,) = views[Draw(0, order(views).index(6))].replaced
    assert replaced.image == 6
    assert "30 x 1 px" in replaced.reason


@pytest.mark.parametrize("workers", [0, 1])
def test_no_image_left_is_bad_data(workers):
    batches = iter(loader(view_set(bad=range(10)), StepSampler(10, 4, 2), workers))
    with pytest.raises(UserError, match="^no image of the run can be read any more") as caught:
        next(batches)
    assert caught.value.code == 3


def test_mistakes_of_ours_are_not_taken_for_bad_images():
    class Broken(Numbers):
        def read(self, index, detail=None):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        ViewSet(Broken(), range(3), SMALL, 0)[Draw(0, 0)]


def test_workers_are_forked_whatever_the_interpreter_does_by_default():
    """What a worker does when it starts counts on the trainer being its parent."""
    views = view_set()
    made = loader(views, StepSampler(len(views), 2, 1, 0, 0, 1), workers=1)
    assert made.multiprocessing_context.get_start_method() == "fork"
