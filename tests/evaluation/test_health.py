"""Metrics and verdicts, on networks and numbers whose answer is known."""

import numpy as np
import pytest
import torch

from evaluating import Stub, cells, labelled, make_context, noise
from gtsa.evaluation.evaluators.health import FeatureHealth, rank_me, spread
from gtsa.evaluation.intervals import interval
from gtsa.pretraining.verdict import HealthSnapshot, advice, verdict


def test_rank_of_known_matrices():
    assert rank_me(torch.eye(8)) == pytest.approx(8, rel=1e-4)
    assert rank_me(torch.ones(50, 8)) == pytest.approx(1, abs=1e-3)
    two = torch.zeros(10, 6)
    two[:5, 0], two[5:, 1] = 1, 1
    assert rank_me(two) == pytest.approx(2, abs=1e-3)


def test_rank_follows_its_definition():
    x = np.random.default_rng(0).standard_normal((40, 7)) * np.arange(1, 8)
    p = np.sqrt(np.linalg.eigvalsh(x.T @ x))
    p = p / p.sum()
    assert rank_me(torch.from_numpy(x)) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-4)


def test_spread_is_one_for_all_directions_and_none_for_one():
    gaussian = torch.randn(20_000, 32, generator=torch.Generator().manual_seed(0))
    assert spread(gaussian) == pytest.approx(1, abs=0.02)
    assert spread(torch.ones(10, 32)) == pytest.approx(0, abs=1e-9)
    assert spread(gaussian * 1e-3 + 5) < 0.01


def test_interval_by_hand():
    # n = 4, mean 2.5, sd 1.2910, t(0.975, 3) = 3.1824 -> half width 2.0543
    mean, low, high = interval(torch.tensor([1.0, 2, 3, 4], dtype=torch.float64))
    assert (mean, low, high) == pytest.approx((2.5, 0.4457, 4.5543), abs=1e-3)


def test_intervals_cover():
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(2000, 8, generator=generator, dtype=torch.float64) + 3
    covered = sum(low <= 3 <= high for _, low, high in map(interval, draws)) / 2000
    assert covered == pytest.approx(0.95, abs=0.02)


def metrics(region, rotation=0.25, rank=80.0, spread=0.8, n=8, **more):
    noise = torch.linspace(-0.01, 0.01, n, dtype=torch.float64)
    return HealthSnapshot(
        {"region_score": region + noise, "rotation_accuracy": rotation + noise}
        | {name: value + 0 * noise for name, value in more.items()},
        rank,
        spread,
        torch.arange(n),
    )


@pytest.mark.parametrize(
    ("now", "step", "label"),
    [
        (metrics(0.03), 200, "learning"),
        (metrics(0.015), 200, "too short to tell"),  # above 0 with its whole interval, and worth nothing
        (metrics(0.0, rotation=0.5), 200, "learning"),
        (metrics(0.0, rotation=0.265), 5000, "stalled"),
        (metrics(0.0), 200, "too short to tell"),
        (metrics(0.0), 5000, "stalled"),
        (metrics(0.0, rank=14.0), 240, "collapsing"),  # although a loss of -0.95 seems very good
        (metrics(0.0, spread=0.05), 5000, "collapsing"),
        (metrics(-0.05), 5000, "stalled"),
    ],
)
def test_the_verdict_says_what_the_metrics_support(now, step, label):
    actual = verdict(now, HealthSnapshot({"region_score": torch.zeros(8).double()}, 98.0, 0.88, torch.arange(8)), step)
    assert actual.label == label


@pytest.mark.parametrize(
    ("gain", "words"),
    [
        (
            0.1,
            "region prediction (cosine with the true region minus cosine with other images; higher is better): better than at step 0, +0.100",
        ),
        (
            0.012,
            "region prediction (cosine with the true region minus cosine with other images; higher is better): hardly better than at step 0, +0.012",
        ),
        (
            -0.069,
            "region prediction (cosine with the true region minus cosine with other images; higher is better): worse than at step 0, -0.069 (95 % interval -0.0",
        ),
        (
            0.001,
            "region prediction (cosine with the true region minus cosine with other images; higher is better): not significantly better than at step 0",
        ),
        (
            -0.001,
            "region prediction (cosine with the true region minus cosine with other images; higher is better): not significantly better than at step 0",
        ),
    ],
)
def test_better_worse_and_not_distinguishable_are_three_cases(gain, words):
    start = HealthSnapshot({"region_score": torch.zeros(8).double()}, 98.0, 0.88, torch.arange(8))
    assert verdict(metrics(gain), start, 500).reasons[0].startswith(words)


@pytest.mark.parametrize(
    ("share", "words"),
    [
        (0.5, "above chance: 50.0 %"),
        (0.265, "hardly above chance: 26.5 %"),
        (0.25, "not significantly above chance: 25.0 %"),
        (0.2, "below chance: 20.0 %"),
    ],
)
def test_so_are_rotations_against_chance(share, words):
    assert f"rotation accuracy is {words}" in verdict(metrics(0.0, rotation=share), metrics(0.0), 500).reasons[1]


def test_a_verdict_is_about_held_out_images_or_says_so():
    start = metrics(0.0)
    assert "held-out images" in verdict(metrics(0.1), start, 10).reasons[0]
    assert "TRAINING images" in verdict(metrics(0.1), start, 10, held_out=False).reasons[0]


def test_one_image_supports_nothing():
    """Nor is a teacher information of 0 a sign of collapse: it is 0 for any single image."""
    now = metrics(0.5, rotation=0.9, n=1, teacher_information=0.0)
    assert verdict(now, metrics(0.0, n=1), 100).label == "too short to tell"


def evaluate_health(see, count=4, **options):
    task = FeatureHealth(resize=32, crop=32)
    per_image = task(Stub(see), None, labelled(noise(count), kind="none"), make_context(**options))
    return task.metrics(per_image), per_image["patches"]


def test_any_weights_are_evaluated_on_their_patch_tokens():
    images = torch.stack(noise(4)).float() / 255
    every = cells((images - 0.5) / 0.25).flatten(0, 2).double().numpy()
    p = np.linalg.svd(every, compute_uv=False)
    p = p / p.sum()
    metrics, _ = evaluate_health(cells)
    assert metrics["rank"] == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-3)
    assert metrics["width"] == 192
    assert evaluate_health(lambda images: torch.ones(len(images), 4, 4, 5))[0] == {
        "rank": pytest.approx(1, abs=1e-3), "spread": pytest.approx(0, abs=1e-6), "width": 5.0,
    }  # fmt: skip


def test_the_evaluated_patches_depend_on_seed_and_image(monkeypatch):
    monkeypatch.setattr("gtsa.evaluation.evaluators.health.TOKENS", 12)
    (metrics, patches), (_, again), (_, other) = (
        evaluate_health(cells),
        evaluate_health(cells),
        evaluate_health(cells, seed=1),
    )
    assert [len(some) for some in patches] == [3, 3, 3, 3]
    assert all(torch.equal(a, b) for a, b in zip(patches, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(patches, other, strict=True))
    assert metrics["rank"] <= 12


def test_a_start_that_was_lucky_is_no_learning():
    """The views are always the same: rotations that the untrained network predicts by luck count at no evaluation."""
    start = metrics(0.0, rotation=0.31)
    assert verdict(metrics(0.0, rotation=0.31), start, 200).label == "too short to tell"
    assert verdict(metrics(0.0, rotation=0.4), start, 200).label == "learning"


def spread_out(values):
    return HealthSnapshot({"region_score": torch.tensor(values).double()}, 80.0, 0.8, torch.arange(len(values)))


@pytest.mark.parametrize(
    ("gains", "step", "label", "early"),
    [
        # mean +0.037, interval +0.004 to +0.071, as measured with 6 images after 3 steps
        ([0.010, 0.010, 0.025, 0.030, 0.047, 0.100], 3, "too short to tell", "6 images give a wide interval"),
        ([0.010, 0.010, 0.025, 0.030, 0.047, 0.100], 999, "too short to tell", "6 images give a wide interval"),
        ([0.010, 0.010, 0.025, 0.030, 0.047, 0.100], 1000, "learning", ""),
        # mean +0.109, interval +0.050 to +0.167, as of the demo
        ([0.01, 0.05, 0.08, 0.10, 0.11, 0.13, 0.17, 0.222], 650, "learning", ""),
        # as wide for the spread of the images, with enough of them
        ([0.022, 0.028] * 16, 3, "learning", ""),
        (
            [-0.02, 0.07] * 16,
            3,
            "too short to tell",
            "interval of region prediction must lie at least 0.02 above step 0",
        ),
        ([-0.02, 0.07] * 16, 1000, "learning", ""),
    ],
)
def test_a_short_run_needs_stronger_evidence(gains, step, label, early):
    found = verdict(spread_out(gains), spread_out([0.0] * len(gains)), step)
    assert found.label == label
    assert found.reasons[0].startswith(
        "region prediction (cosine with the true region minus cosine with other images; higher is better): better"
    )
    reasons = [reason for reason in found.reasons if reason.startswith("too early for a verdict")]
    assert len(reasons) == bool(early) and all(early in reason for reason in reasons)
    assert ("--hold-out" in " ".join(reasons)) == ("images give" in early)


def test_the_rule_of_a_short_run_names_the_metrics_that_decide():
    """The first of the method, and rotation accuracy; another score may rise as it likes."""
    noise = torch.linspace(-0.05, 0.05, 8, dtype=torch.float64)
    chance = torch.full((8,), 0.25, dtype=torch.float64)

    def snapshot(region, patch):
        scores = {"region_score": region + noise, "patch_score": patch + 0 * noise, "rotation_accuracy": chance}
        return HealthSnapshot(scores, 80.0, 0.8, torch.arange(8))

    flat = HealthSnapshot(dict.fromkeys(snapshot(0.0, 0.0).scores, 0 * chance), 80.0, 0.8, torch.arange(8))
    assert verdict(snapshot(0.0, 0.9), flat, 200).label == "too short to tell"
    reason = verdict(snapshot(0.035, 0.9), flat, 200).reasons[-1]
    assert reason.startswith(
        "too early for a verdict: before step 1,000 the whole 95 % interval of region prediction or rotation accuracy "
        "must lie at least 0.02 above step 0 (rotation accuracy: above chance, too)"
    )


def test_learning_is_said_to_be_no_proof_of_use():
    assert "LEARNING is about the training's own task, not about the use of the features" in advice("learning")
    assert "a few hundred steps can show that the set-up works" in advice("too short to tell")


def test_so_do_rotations_of_a_short_run():
    accuracies = torch.tensor([0.28, 0.28, 0.3, 0.3, 0.4, 0.5]).double()  # mean 0.343, interval 0.25 to 0.43
    start, now = (
        HealthSnapshot({"region_score": 0 * a, "rotation_accuracy": a}, 80.0, 0.8, torch.arange(6))
        for a in (0 * accuracies + 0.2, accuracies)
    )
    assert [verdict(now, start, step).label for step in (3, 1000)] == ["too short to tell", "learning"]


@pytest.mark.parametrize(("similarity", "step", "label"), [(0.98, 200, "learning"), (0.998, 200, "too short to tell"), (0.998, 5000, "stalled")])  # fmt: skip
def test_heads_that_learn_alone_are_no_learning(similarity, step, label):
    """What is exported is the encoder."""
    actual = verdict(metrics(0.2), metrics(0.0), step, similarity=similarity)
    assert actual.label == label and actual.metrics["similarity_to_start"] == similarity
    change = "hardly changed" if similarity > 0.99 else "changed"
    words = (
        f"the exported encoder has {change}: cosine similarity of patch tokens with those of step 0: {similarity:.3f}"
    )
    assert words in actual.reasons
    adapted = verdict(metrics(0.2, agreement=0.99), metrics(0.0), step, similarity=similarity)
    assert adapted.label == "learning"  # an adaptation is meant to change little


@pytest.mark.parametrize(
    ("information", "label", "reason"),
    [
        (0.3, "learning", "teacher assignments are different between images: mutual information 30 %"),
        (0.0003, "collapsing", "teacher assignments are nearly the same for all images: mutual information 0.03 %"),
    ],
)
def test_a_teacher_with_the_same_output_for_all_images_is_no_learning(information, label, reason):
    """Views of an image are still matched, as by the collapsed DINO of the small experiment."""
    actual = verdict(metrics(0.13, teacher_information=information), metrics(0.0), 1000)
    assert actual.label == label
    assert any(reason in line for line in actual.reasons)
    assert actual.metrics["teacher_information"] == pytest.approx(information)


def test_images_that_can_no_longer_be_read_are_left_out_on_both_sides():
    start, now = metrics(0.0), metrics(0.5)
    start.scores["region_score"][3] = 9.0  # would spoil the gain if images were taken for one another
    kept = torch.tensor([0, 1, 2, 4, 5, 6, 7])
    now = HealthSnapshot({k: v[kept] for k, v in now.scores.items()}, now.rank, now.spread, kept)
    actual = verdict(now, start, 500)
    assert actual.metrics["images"] == 7
    assert actual.metrics["region_gain"] == pytest.approx(0.5)


def test_one_image_has_no_interval():
    actual = verdict(metrics(0.5, n=1), metrics(0.0, n=1), 100)
    assert "no interval" in actual.reasons[0]
    assert "inf" not in " ".join(actual.reasons)


def test_an_image_shows_the_same_patches_in_any_company_and_others_show_others(monkeypatch):
    monkeypatch.setattr("gtsa.evaluation.evaluators.health.TOKENS", 12)
    position = torch.arange(16.0).view(1, 4, 4, 1)
    task, data = FeatureHealth(resize=32, crop=32), labelled(noise(4), kind="none")
    backbone = Stub(lambda images: position.expand(len(images), 4, 4, 1))
    shown = [
        task(backbone, None, data.take(order), make_context())["patches"] for order in ([0, 1, 2, 3], [3, 1, 0, 2])
    ]
    assert all(torch.equal(shown[0][image], shown[1][i]) for i, image in enumerate([3, 1, 0, 2]))
    assert len({tuple(some.flatten().tolist()) for some in shown[0]}) > 1


def test_the_metric_of_a_new_method_has_a_verdict():
    """Without a sentence of its own: a method is one file."""
    noise = torch.linspace(-0.01, 0.01, 8, dtype=torch.float64)
    start, now = (HealthSnapshot({"puzzle_score": value + noise}, 80.0, 0.8, torch.arange(8)) for value in (0.0, 0.1))
    actual = verdict(now, start, 200)
    assert actual.label == "learning"
    assert actual.reasons[0].startswith("puzzle score: better than at step 0, +0.100")
    assert actual.metrics["puzzle_gain"] == pytest.approx(0.1)
