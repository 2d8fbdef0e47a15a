"""Fine-tuning: the published settings, one stream for a seed whatever happens, and sets whose answer is known."""

import inspect
import random
import signal

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from evaluating import coloured, labelled, make_context, noise
from gtsa.core.errors import UserError
from gtsa.core.types import Draw, Examples
from gtsa.data.batches.loader import StepSampler
from gtsa.evaluation.evaluators.finetune import Augmented, Classifier, Finetune, parameter_groups
from gtsa.evaluation.loading import training_batches
from gtsa.models.backbone import Backbone

SMALL = {"resize": 32, "crop": 32, "batch_size": 16}
PLAIN = {"mixup": 0.0, "cutmix": 0.0, "erasing": 0.0, "magnitude": 0, "smoothing": 0.0, "drop_path": 0.0}


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return Backbone("test_vit", 32).eval()


def sets(per=10, seeds=(0, 1)):
    kinds = [i % 4 for i in range(4 * per)]
    return [labelled(coloured(kinds, seed=seed), kinds, classes="abcd") for seed in seeds]


def test_the_defaults_are_the_papers():
    defaults = {p.name: p.default for p in inspect.signature(Finetune).parameters.values()}
    assert defaults == {
        "epochs": 300, "batch_size": 1024, "accumulate": 1, "learning_rate": 5e-4, "warmup": "auto", "layer_decay": 0.65,
        "weight_decay": 0.05, "drop_path": 0.1, "mixup": 0.8, "cutmix": 1.0, "erasing": 0.25, "magnitude": 9,
        "smoothing": 0.1, "resize": 256, "crop": 224,
    }  # fmt: skip


def test_the_warmup_is_the_papers_and_shorter_in_a_short_training():
    assert (Finetune().warmup, Finetune(epochs=10.0).warmup, Finetune(epochs=10.0, warmup=2.0).warmup) == (5, 1, 2)


def test_learning_rates_fall_from_layer_to_layer(backbone):
    network = Classifier(backbone, 4, "mean", 0.1)
    names = {id(p): name for name, p in network.named_parameters()}
    depth = len(backbone.vit.blocks)
    seen = set()
    for group in parameter_groups(network, 0.65):
        for p in group["params"]:
            name = names[id(p)]
            seen.add(name)
            layer = int(name.split(".")[3]) + 1 if ".blocks." in name else depth + name.startswith("head.")
            if any(part in name for part in ("patch_embed", "pos_embed", "cls_token", "reg_token")):
                layer = 0
            assert (group["rate"](0.5) if "rate" in group else 1.0) == pytest.approx(0.65 ** (depth + 1 - layer)), name
            spared = p.ndim <= 1 or any(part in name for part in ("pos_embed", "cls_token", "reg_token"))
            assert group.get("decayed", True) != spared, name
    assert seen == {name for name, _ in network.named_parameters()}


def test_it_is_a_copy_that_learns_with_stochastic_depth(backbone):
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    network = Classifier(backbone, 4, "mean", 0.2)
    rates = [block.drop_path2.drop_prob for block in network.backbone.vit.blocks]
    assert rates == pytest.approx(np.linspace(0, 0.2, len(rates)).tolist())
    task = Finetune(epochs=2, warmup=0.5, learning_rate=1e-2, **SMALL)
    task(backbone, *sets(4), make_context())
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert not backbone.training


def test_all_images_are_classified_by_colour(backbone):
    kept = {}
    task = Finetune(epochs=25, warmup=2, learning_rate=2e-2, layer_decay=0.9, **SMALL, **PLAIN)
    train, val = sets()
    assert task.metrics(task(backbone, train, val, make_context(on_prediction=kept.__setitem__))) == {"top1": 100.0}
    assert [int(kept[i].argmax()) for i in range(len(val))] == val.targets


def test_chance_where_labels_are_shuffled(backbone):
    draw = np.random.default_rng(0)
    shuffled = [labelled(d.source.images, draw.permutation(d.targets).tolist(), classes="abcd") for d in sets(20)]
    task = Finetune(epochs=4, warmup=1, learning_rate=1e-2, **SMALL)
    share = task.metrics(task(backbone, *shuffled, make_context()))["top1"]
    assert abs(share - 25) < 100 * 3 * (0.25 * 0.75 / 80) ** 0.5  # three standard deviations


def test_top5_where_it_can_fail():
    per_image = {"scores": torch.eye(6), "truth": torch.tensor([0, 1, 2, 3, 5, 4])}
    metrics = Finetune().metrics(per_image)
    assert metrics["top1"] == pytest.approx(400 / 6)
    assert list(metrics) == ["top1", "top5"]


def test_an_augmented_image_follows_from_seed_epoch_and_image_alone():
    data = labelled(noise(6, 48), [0, 1] * 3)
    images = Augmented(data, 32, 9, (0.5, 0.5, 0.5), seed=3)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    first = images[Draw(1, 2)]
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    random.seed(99), np.random.seed(98), torch.manual_seed(97)
    again = Augmented(data, 32, 9, (0.5, 0.5, 0.5), seed=3)[Draw(1, 2)]
    assert first[0].dtype == torch.uint8 and first[0].shape == (3, 32, 32)
    assert torch.equal(first[0], again[0]) and first[1:] == again[1:]
    other_epoch = next(
        pixels for pixels, _, index in (images[Draw(2, position)] for position in range(6)) if index == first[2]
    )
    assert not torch.equal(first[0], other_epoch)
    assert sorted(images[Draw(1, position)][2] for position in range(6)) == list(range(6))


def test_the_strongest_augmentation_works():
    """At magnitude 10 timm's posterising would keep 0 bits."""
    images = Augmented(labelled(noise(60, 40), [0] * 60), 32, 10, (0.5, 0.5, 0.5), seed=0)
    kinds = {op.name for step in images.augment.transforms for op in getattr(step, "ops", ())}
    assert "PosterizeIncreasing" in kinds
    pictures = [images[Draw(epoch, position)][0] for epoch in range(3) for position in range(60)]
    assert all(picture.float().std() > 1 for picture in pictures)


def test_batches_do_not_depend_on_workers_or_on_where_they_start():
    images = Augmented(labelled(noise(10, 48), [0, 1] * 5), 32, 9, (0.5, 0.5, 0.5), seed=0)
    alone = list(training_batches(images, StepSampler(10, 4, 5), make_context(), default_collate))
    helped = list(training_batches(images, StepSampler(10, 4, 5, start=3), make_context(workers=1), default_collate))
    assert len(alone) == 5 and len(helped) == 2
    for a, b in zip(alone[3:], helped, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_erasing_and_mixing_follow_from_seed_and_step(backbone):
    network = Classifier(backbone, 4, "mean", 0.0)
    prepare = Finetune(**{**SMALL, "erasing": 1.0})._prepare(network, 4, make_context(seed=5))
    pixels, truth = torch.stack(noise(8)), torch.arange(8) % 4

    def at(step):
        return prepare(Examples(pixels.clone(), (truth, step), torch.arange(8)))

    one, random_state = at(1), np.random.get_state()[1].tolist()
    again, two = at(1), at(2)
    assert np.random.get_state()[1].tolist() == random_state
    assert torch.equal(one.pixels, again.pixels) and torch.equal(one.targets, again.targets)
    assert not torch.equal(one.pixels, two.pixels)
    torch.testing.assert_close(one.targets.sum(1), torch.ones(8))
    assert (one.targets.max(1).values < 1).all()
    plain = Finetune(**SMALL, **PLAIN)._prepare(network, 4, make_context())(
        Examples(pixels, (truth, 1), torch.arange(8))
    )
    assert torch.equal(plain.targets, torch.nn.functional.one_hot(truth, 4).float())


def test_micro_batches_make_the_same_step(backbone):
    """But for the mixing of pairs, which is done within each."""
    settings = {"epochs": 2, "warmup": 0.5, "learning_rate": 1e-2, "drop_path": 0.0} | SMALL | PLAIN
    whole, parts = (
        Finetune(**settings, accumulate=count)(backbone, *sets(4), make_context())["scores"]
        for count in (1, settings["batch_size"] // 2)
    )
    torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-4)
    assert whole.std() > 0.01


@pytest.mark.parametrize(("accumulate", "step"), [(1, 5), (5, 1)])
def test_a_training_that_was_stopped_ends_bit_for_bit_where_the_other_one_does(
    backbone, tmp_path, monkeypatch, accumulate, step
):
    train, val = sets(5)
    settings = {**SMALL, "batch_size": 10, "accumulate": accumulate}
    task = Finetune(epochs=6, warmup=1, learning_rate=1e-2, **settings)  # 12 steps
    whole = task(backbone, train, val, make_context(folder=tmp_path / "whole"))["scores"]
    assert torch.equal(whole, task(backbone, train, val, make_context())["scores"])
    forward, seen = Classifier.forward, []

    def stopping(self, views, time):
        seen.append(time)
        if len(seen) == 5:
            signal.raise_signal(signal.SIGTERM)
        return forward(self, views, time)

    monkeypatch.setattr(Classifier, "forward", stopping)
    with pytest.raises(UserError, match=f"stopped on request at step {step} of 12") as stopped:
        task(backbone, train, val, make_context(folder=tmp_path / "parts"))
    assert stopped.value.code == 75
    torch.manual_seed(1234), np.random.seed(5), random.seed(6)
    parts = task(backbone, train, val, make_context(folder=tmp_path / "parts"))["scores"]
    assert len(seen) == 12 * accumulate
    assert torch.equal(whole, parts)
    with pytest.raises(UserError, match="another folder"):
        task(backbone, train, val, make_context(folder=tmp_path / "parts", seed=1))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batch_size": 7}, "multiple of 2"),
        ({"batch_size": 12, "accumulate": 4}, "multiple of 8"),
        ({"accumulate": 0}, "multiple"),
        ({"epochs": 0.0}, "above 0"),
        ({"epochs": 3.0, "warmup": 3.0}, "warmup shorter"),
        ({"layer_decay": 0.0}, "shares"),
        ({"smoothing": 1.0}, "shares"),
        ({"magnitude": 11}, "magnitude is from 0 to 10"),
        ({"mixup": -1.0}, "at least 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        Finetune(**wrong)
