"""Memory of batches is used in turns, never while somebody holds a batch, and changes no view."""

import gc

import pytest
import torch

from gtsa.core.types import Draw
from gtsa.data.batches.batch_memory import BatchMemory
from gtsa.data.batches.loader import StepSampler, ViewSet, loader
from gtsa.data.views.multicrop import MultiCrop

SMALL = MultiCrop(global_crops_size=16, local_crops_size=8, local_crops_number=2)
STD = ((0.5,) * 3, (0.25,) * 3)


class Noise:
    def read(self, index, detail=None):
        return torch.randint(0, 256, (3, 24, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(index))


def view_set(normalisation=None):
    return ViewSet(Noise(), range(7), SMALL, 5, normalisation=normalisation)


def address(batch):
    return batch.global_crops.pixels.untyped_storage().data_ptr()


def filled(memory, views, step=0):
    return memory.send(views.batch([Draw(step, 0), Draw(step, 1)], memory.take()))


def same(a, b):
    return torch.equal(a.images, b.images) and all(
        torch.equal(getattr(x, part), getattr(y, part))
        for x, y in zip(a.groups, b.groups, strict=True)
        for part in ("pixels", "boxes", "rotations", "colours")
    )


@pytest.mark.parametrize("normalisation", [None, STD], ids=["uint8", "floats"])
def test_a_slot_is_free_when_the_last_tensor_of_its_batch_is_gone(normalisation):
    views = view_set(normalisation)
    memory = BatchMemory(2, views.bytes(2), views.arrange)
    first, second = filled(memory, views), filled(memory, views, 1)
    slots = {address(first), address(second)}
    third = filled(memory, views, 2)
    assert address(third) not in slots  # both are held: it has memory of its own
    assert [same(batch, views.batch([Draw(e, 0), Draw(e, 1)])) for e, batch in enumerate((first, second, third))]
    kept = second.local_crops.pixels[0, 0]
    value = kept.clone()
    del second
    gc.collect()
    assert address(filled(memory, views, 3)) not in slots
    assert torch.equal(kept, value)
    del kept
    gc.collect()
    fourth = filled(memory, views, 4)
    assert address(fourth) in slots - {address(first)}
    assert same(fourth, views.batch([Draw(4, 0), Draw(4, 1)]))


@pytest.mark.parametrize("normalisation", [None, STD], ids=["uint8", "floats"])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_that_are_held_and_batches_that_are_not_are_the_same(workers, normalisation):
    views, steps = view_set(normalisation), 30
    held = list(loader(views, StepSampler(7, 4, steps), workers))
    expected = [views.batch(draws) for draws in StepSampler(7, 4, steps)]
    assert all(map(same, held, expected))
    for batch, reference in zip(loader(views, StepSampler(7, 4, steps), workers), expected, strict=True):
        assert same(batch, reference)


def test_few_slots_are_enough_for_many_steps():
    views = view_set()
    places = {address(batch) for batch in loader(views, StepSampler(7, 4, 100), workers=1)}
    assert len(places) <= 4 + 1 + 2
