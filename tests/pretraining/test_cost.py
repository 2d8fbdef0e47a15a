"""What a run costs: typical times, counted for all that a run does, and what would cost less."""

import time
from itertools import pairwise

import pytest
import torch
from lightning_fabric import Fabric

from gtsa.core.settings import validated
from gtsa.core.terminal import lasting
from gtsa.data.batches.loader import ViewSet
from gtsa.data.views import augment
from gtsa.data.views.multicrop import MultiCrop
from gtsa.methods.gtsa import GTSA
from gtsa.models.backbone import Backbone
from gtsa.pretraining import cost, plan
from gtsa.pretraining.cost import Cost
from gtsa.pretraining.settings import Pretrain
from gtsa.pretraining.verdict import choose_images, usual_images
from gtsa.training.devices import resolve_device

COST = Cost(loading=0.02, passing=0.1, updating=0.5, bytes_image=10**6, bytes_fixed=10**7)


def resolved(**given):
    ready = resolve_device(validated(Pretrain, {"device": "cpu", "workers": 0, **given}))
    plan.resolve_initial(ready, None)
    plan.resolve_sizes(ready)
    plan.resolve_budget(ready, 331)
    return ready


def test_a_busy_moment_does_not_count():
    seconds = iter([9.0, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1])
    assert cost.typical(lambda: next(seconds)) == 0.1
    slow = iter([5.0, 4.0, 90.0, 5.0])
    assert cost.typical(lambda: next(slow)) == 5.0
    assert next(slow) == 5.0  # three are enough where they are long


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        ({"batch_size": 10}, 10 * 0.1 + 0.5 + 10 * 0.02),
        ({"batch_size": 10, "workers": 2}, 10 * 0.1 + 0.5),  # they load while the others compute
        ({"batch_size": 100, "workers": 1}, 100 * 0.1 + 0.5),
        ({"batch_size": 10, "devices": 2}, 5 * 0.1 + 0.5 + 5 * 0.02),
    ],
)
def test_seconds_of_a_step(given, seconds):
    assert COST.step(resolved(**given).settings) == pytest.approx(seconds)


def test_loading_can_be_what_takes_longest():
    s = resolved(batch_size=10, workers=1).settings
    assert Cost(0.9, 0.1, 0.5, 1, 1).step(s) == pytest.approx(9)


def test_a_run_is_its_steps_and_its_evaluations():
    s = resolved(batch_size=10, steps=120, evaluate_every=50, evaluate_images=64).settings
    each = 64 * (0.02 + cost.EVALUATION * 0.1) + cost.PICTURES * 0.1
    assert COST.evaluation(s) == pytest.approx(each)
    assert COST.run(s) == pytest.approx(120 * 1.7 + 4 * each)  # at steps 0, 50, 100 and 120
    assert COST.run(s, done=60) == pytest.approx(60 * 1.7 + 2 * each)


@pytest.mark.parametrize(
    ("images", "passing", "steps", "expected"),
    [
        (50, 0.001, 3, 50),  # fast: all
        (20, 0.001, 3, 60),  # fast: all, three times
        (50, 0.4, 3, 38),  # (10 s - 4 passes) / (0.02 s + half a pass) = 38.2
        (20, 0.4, 3, 20),  # each once instead of three times
        (50, 50.0, 3, 8),  # never fewer
        (5, 50.0, 3, 5),
        (50, 0.4, 1000, 50),  # a tenth of 1,000 steps, over 11 evaluations, is enough for all
    ],
)
def test_evaluations_take_no_more_than_a_tenth_of_the_run_or_ten_seconds(
    images, passing, steps, expected, users_samples
):
    ready = resolved(batch_size=16, steps=steps)
    measured = Cost(0.02, passing, 0.0, 1, 1)
    plan.resolve_evaluation(ready, measured, images)
    assert ready.settings.evaluate_images == expected
    chosen, draws = choose_images(range(images), expected)
    assert len(chosen) * draws == min(expected, images) or (len(chosen), draws) == (images, expected // images)
    if len(chosen) * draws < usual_images(images):
        assert "the verdict's intervals are wider" in ready.reasons["evaluate_images"]


def test_a_given_number_of_images_is_kept():
    ready = resolved(batch_size=16, steps=3, evaluate_images=500)
    plan.resolve_evaluation(ready, Cost(0.02, 50.0, 0.0, 1, 1), 600)
    assert ready.settings.evaluate_images == 500


@pytest.mark.parametrize(("images", "count"), [(50, 8), (50, 49), (50, 50), (20, 64), (1, 64), (3, 1)])
def test_chosen_images_are_spread_over_all(images, count):
    chosen, draws = choose_images(range(images), count)
    assert len(set(chosen)) == len(chosen) == min(images, count)
    assert draws == max(1, count // images)
    gaps = [b - a for a, b in pairwise(chosen)]
    assert not gaps or max(gaps) - min(gaps) <= 1


class Slow:
    """Images that take a while to be read, as files on a network do."""

    def read(self, index, detail=None):
        time.sleep(0.02)
        return torch.randint(0, 256, (3, 72, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(index))


def test_what_is_measured_leaves_the_network_as_it_was():
    torch.manual_seed(0)
    multicrop = MultiCrop(2, 1, 48, 32)
    encoder = Backbone("test_vit", 48)
    method = GTSA(encoder, projector_dim=16, out_dim=16, predictor_dim=16)
    before = {name: value.clone() for name, value in method.state_dict().items()}
    views = ViewSet(Slow(), range(3), multicrop, 0)
    fabric = Fabric(accelerator="cpu", devices=1)
    actual = cost.probe(
        method, views, lambda v: augment.apply(v, fabric.device, *encoder.normalisation), fabric, 8, 10**9
    )
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())
    assert all(p.grad is None for p in method.parameters())
    assert actual.loading > 0.02 and actual.passing > 0 and actual.updating > 0
    trained = sum(p.nbytes for p in method.parameters() if p.requires_grad)
    assert actual.bytes_fixed == sum(p.nbytes for p in method.parameters()) + 3 * trained
    assert actual.bytes_image > 0


@pytest.fixture
def _evaluations_are_free(monkeypatch):
    monkeypatch.setattr(cost, "EVALUATION", 0.0)
    monkeypatch.setattr(cost, "PICTURES", 0.0)


@pytest.mark.usefixtures("_evaluations_are_free")
def test_faster_settings_are_listed_until_the_run_is_short_enough():
    s = resolved(batch_size=40, steps=10_000, evaluate_images=64).settings
    rows = cost.cheaper(s, Cost(0.0, 1.0, 0.0, 1, 1), 22e6)  # 111 hours
    assert [flags for flags, _ in rows] == [
        "--views.global-crops-size 112 --views.local-crops-size 48",
        "--views.local-crops-number 4",
        "--model vit_tiny_patch16_224",
    ]
    # patches: 4 x 2 x 14 x 14 + 3 x 8 x 6 x 6 = 2432 before; 4 x 2 x 7 x 7 + 3 x 8 x 3 x 3 = 608, with four crops 500
    hours = [10_000 * 40 / 3600 * share for share in (608 / 2432, 500 / 2432, 500 / 2432 / 4)]
    assert [takes for _, takes in rows] == [f"about {lasting(3600 * h)}" for h in hours]


@pytest.mark.usefixtures("_evaluations_are_free")
def test_fewer_steps_are_proposed_if_nothing_else_is_enough():
    s = resolved(
        model="test_vit",
        batch_size=40,
        steps=10_000,
        evaluate_images=64,
        views={"global_crops_size": 32, "local_crops_size": 32, "local_crops_number": 2},
    ).settings
    ((flags, takes),) = cost.cheaper(s, Cost(0.0, 1.0, 0.0, 1, 1), 3e5)
    assert flags == f"--steps {12 * 3600 // 40}"
    assert takes == "about 12 h 00 min"


def test_flags_that_take_less_are_flags():
    s = resolved(batch_size=40, steps=10_000, evaluate_images=64).settings
    for flags, _ in cost.cheaper(s, Cost(0.0, 100.0, 0.0, 1, 1), 22e6):
        for flag in flags.split("--")[1:]:
            name, value = flag.split()
            section, _, key = name.replace("-", "_").rpartition(".")
            validated(
                Pretrain,
                {section: {key: int(value)}} if section else {key: value if key == "model" else int(value)},
            )


# Batches that are larger than the data


@pytest.mark.parametrize(("batch", "images"), [(5000, 331), (9, 4), (700, 331)])
def test_a_batch_of_many_repeats_is_refused_with_the_largest_sensible_one(batch, images):
    ready = resolve_device(validated(Pretrain, {"batch_size": batch, "device": "cpu"}))
    with pytest.raises(plan.UserError, match=f"there are {images} images .* choose at most {images}") as caught:
        plan.resolve_budget(ready, images)
    assert caught.value.code == 2


@pytest.mark.parametrize(("batch", "images"), [(400, 331), (8, 3), ("auto", 3)])
def test_a_batch_of_few_repeats_is_explained(batch, images):
    ready = resolve_device(validated(Pretrain, {"batch_size": batch, "device": "cpu"}))
    plan.resolve_budget(ready, images)
    assert ready.reasons["batch_size"] == f"more than the {images} images: a step repeats some; {images} would not"
