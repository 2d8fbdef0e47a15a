"""Is it learning? Measured on held-out images, against the same network at step 0."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gtsa.core.errors import UserError
from gtsa.core.terminal import Count
from gtsa.core.types import Draw, Method, Replaced, Views
from gtsa.data.batches.loader import ViewSet, collate
from gtsa.evaluation import intervals
from gtsa.evaluation.evaluators.health import Interval, evenly, rank_me, spread
from gtsa.evaluation.intervals import interval

CHANCE = 0.25  # of four rotations

MARGIN = 0.02  # of cosine over step 0, and of accuracy over chance: less counts for nothing

SCORES = {  # names and meanings of metrics of Method.diagnose; the gain over step 0 counts of all that end in _score
    "region_score": (
        "region prediction", "cosine with the true region minus cosine with other images; higher is better",
    ),
    "image_score": ("view matching", "cosine with another view minus cosine with other images; higher is better"),
    "teacher_score": (
        "prediction of the teacher's patches", "cosine with these minus cosine with other images; higher is better",
    ),
    "patch_score": (
        "patch localisation in another view", "1: at the true position, 0: as far off as a random patch",
    ),
    "kernel_score": ("kernel alignment", "CKA with the true region minus CKA with other images; higher is better"),
    "pixel_score": ("reconstruction of masked patches", "1: exact, 0: no closer to the image than to others"),
}  # fmt: skip

MUTE = 0.01  # of teacher_information: less is none. Measured: 0.0003 where the loss stays at log K, 0.14 where it falls

LONG = 1_000  # steps from which a run without progress counts as stalled; before, a gain needs stronger evidence

# Similarity of patch tokens with those of step 0. Above, only the heads have learnt. Measured: 0.998 in a run whose
# export was as good as a random network, 0.80 after the demo.
UNCHANGED = 0.99

VIEWS = 64  # samples of an evaluation, at least: fewer held-out images are drawn several times each

FEW = 20  # images: with fewer, the reason for a missing verdict is also their number


def usual_images(images: int) -> int:
    """Images of an evaluation that time does not limit: each of ``images`` as often as fits into ``VIEWS``."""
    return images * max(1, VIEWS // max(1, images))


def choose_images(images: Sequence[int], count: int) -> tuple[list[int], int]:
    """``count`` of the images, evenly spaced in their order; or all of them, and how often each is drawn."""
    if count < len(images):
        return [images[index * len(images) // count] for index in range(count)], 1
    return list(images), count // len(images)


@dataclass
class HealthSnapshot:
    """One evaluation of a network: per-image scores [images], and the rank and spread of its features."""

    scores: dict[str, Tensor]
    rank: float  # effective number of dimensions of the patch tokens, at most their width
    spread: float  # of the direction of patch tokens: 1 where all directions are equal, 0 where there is one
    images: Tensor  # [images]: which ones, ascending
    replaced: Sequence[Replaced] = ()  # images that could not be read any more

    def of(self, name: str, images: Tensor) -> Tensor:
        """The scores of some of the images, in their order."""
        return self.scores[name][torch.searchsorted(self.images, images)]


class HealthMonitor:
    """Evaluates a method with always the same views of the same images.

    Args:
        views: the held-out images.
        prepare: brings views to the device, as for training.
        draws: how often the views of each image are drawn.
    """

    def __init__(self, views: ViewSet, prepare: Callable[[Views], Views], draws: int) -> None:
        self.views, self.prepare, self.draws = views, prepare, draws

    @torch.no_grad()
    def __call__(self, method: Method) -> HealthSnapshot:
        training = method.training
        method.eval()
        scores: dict[str, list[Tensor]] = {}
        images: list[Tensor] = []
        tokens: list[Tensor] = []
        replaced: dict[int, Replaced] = {}
        total = self.draws * len(self.views)
        with Count("evaluated", total) as progress:
            for batch in self._batches():
                progress(sum(map(len, images)))
                replaced |= {entry[0]: entry for entry in batch.replaced}
                for name, values in method.diagnose(batch).items():
                    scores.setdefault(name, []).append(values.double().cpu())
                images.append(batch.images)
                patches = method.encoders["teacher"](batch.global_crops.pixels.flatten(0, 1)).patches
                tokens.append(patches.flatten(0, 2).float().cpu())
        method.train(training)
        seen, row = torch.unique(torch.cat(images), return_inverse=True)
        count = torch.bincount(row).double()
        means = {
            name: torch.zeros(len(count), dtype=torch.float64).index_add_(0, row, torch.cat(values)) / count
            for name, values in scores.items()
        }
        chosen = evenly(torch.cat(tokens))
        if not torch.isfinite(chosen).all():
            raise UserError("training diverged: features are not finite; start anew with a lower --learning-rate", 5)
        return HealthSnapshot(means, rank_me(chosen), spread(chosen), seen, list(replaced.values()))

    def _batches(self) -> Iterator[Views]:
        count = len(self.views)
        for draw in range(self.draws):
            for indices in np.array_split(np.arange(count), -(-count // 16)):  # evenly: no image is alone in its batch
                yield self.prepare(collate([self.views[Draw(draw, int(index))] for index in indices]))


@dataclass
class Verdict:
    """What the metrics support: a label, and the sentences behind it."""

    label: str  # learning, too short to tell, stalled, collapsing
    reasons: list[str]
    metrics: dict[str, float]


def verdict(
    now: HealthSnapshot, start: HealthSnapshot, step: int, held_out: bool = True, similarity: float = 0.0
) -> Verdict:
    """Compares a network with itself at step 0, image by image.

    Two metrics decide: the first of the method, and rotation accuracy where it has one; one of them is enough. Such a
    metric counts as learnt when its interval lies above step 0 (accuracy: above chance, too), and its mean exceeds it
    by a margin: a network that has hardly changed differs from itself by little, but significantly. Before step
    ``LONG`` the whole interval must exceed it by the margin. A network whose features have hardly changed is not
    learning, however well its heads predict. An adaptation is meant to change little: this rule does not apply to it.

    Args:
        similarity: mean cosine similarity of the teacher's patch tokens with those of step 0.
    """
    where = "held-out images" if held_out else "TRAINING images (none were held out)"
    common = now.images[torch.isin(now.images, start.images)]
    images = len(common)
    metrics: dict[str, Any] = {"images": images}
    reasons: list[str] = []
    gains: dict[str, list[Interval]] = {}  # over step 0, and over chance; a metric is learnt when all of its gains are
    for name in now.scores:
        if name.endswith("_score"):
            gain = interval(now.of(name, common) - start.of(name, common))
            metrics |= _named(name.replace("score", "gain"), gain)
            reasons.append(_better(name, gain, f"{images} {where}"))
            gains[name] = [gain]
    if "rotation_accuracy" in now.scores:
        accuracy = now.of("rotation_accuracy", common)
        rotations = interval(accuracy)
        gains["rotation"] = [interval(accuracy - CHANCE)]
        if "rotation_accuracy" in start.scores:  # views are always the same: the start may have been lucky with them
            gains["rotation"].append(interval(accuracy - start.of("rotation_accuracy", common)))
        metrics |= _named("rotation_accuracy", rotations)
        reasons.append(_rotation(rotations, _learnt(gains["rotation"])))
    if "agreement" in now.scores:
        metrics["agreement"] = kept = float(now.of("agreement", common).mean())
        reasons.append(f"the Gram matrix of the patches agrees to {kept:.2f} with that of the start (1: unchanged)")
    mute = False
    if "teacher_information" in now.scores and images > 1:
        metrics["teacher_information"] = information = float(now.of("teacher_information", common).mean())
        mute = information < MUTE
        state = "nearly the same for all images" if mute else "different between images"
        reasons.append(
            f"teacher assignments are {state}: mutual information {100 * information:.2g} % of the largest possible"
        )
    metrics |= {"rank": now.rank, "rank_at_start": start.rank, "spread": now.spread, "spread_at_start": start.spread}
    shrunk = now.rank < start.rank / 4 or now.spread < start.spread / 4
    reasons.append(
        f"{'features have collapsed or shrunk' if shrunk else 'no sign of collapse'}: effective rank {now.rank:.1f} "
        f"(step 0: {start.rank:.1f}), spread {now.spread:.3f} (step 0: {start.spread:.3f})"
    )
    metrics["similarity_to_start"] = similarity
    change = "hardly changed" if similarity > UNCHANGED else "changed"
    reasons.append(
        f"the exported encoder has {change}: cosine similarity of patch tokens with those of step 0: {similarity:.3f}"
    )
    unchanged = similarity > UNCHANGED and "agreement" not in now.scores
    first = next(iter(now.scores))
    decisive = [gains[first.removesuffix("_accuracy")], gains.get("rotation", [])]
    if mute or (shrunk and not (_learnt(decisive[0]) and now.spread > start.spread / 10)):
        return Verdict("collapsing", reasons, metrics)
    learnt = any(map(_learnt, decisive)) and not unchanged
    if learnt and (step >= LONG or any(map(_learnt_early, decisive))):
        return Verdict("learning", reasons, metrics)
    if learnt:
        reasons.append(_too_early([first, *(["rotation_accuracy"] if decisive[1] else [])], images))
    return Verdict("too short to tell" if step < LONG else "stalled", reasons, metrics)


def _named(name: str, values: Interval) -> dict[str, float]:
    return dict(zip((name, f"{name}_low", f"{name}_high"), values, strict=True))


def _learnt(gains: Sequence[Interval]) -> bool:
    return bool(gains) and all(low > 0 and mean >= MARGIN for mean, low, _ in gains)


def _learnt_early(gains: Sequence[Interval]) -> bool:
    """Whether gains are large enough for a verdict before step ``LONG``."""
    return bool(gains) and all(low >= MARGIN for _, low, _ in gains)


def _too_early(decisive: Sequence[str], images: int) -> str:
    names = " or ".join(dict.fromkeys(map(score_name, decisive)))
    chance = " (rotation accuracy: above chance, too)" if "rotation_accuracy" in decisive else ""
    interval_of = f"before step {LONG:,} the whole 95 % interval of {names}"
    reason = f"too early for a verdict: {interval_of} must lie at least {MARGIN:g} above step 0{chance}"
    return f"{reason}; {images} images give a wide interval, hold out more with --hold-out" if images < FEW else reason


def _better(name: str, gain: Interval, images: str) -> str:
    mean, low, high = gain
    clear = "better" if _learnt([gain]) else "hardly better"
    comparison = {"better": clear, "worse": "worse", "not distinguishable": "not significantly better"}
    between = f"95 % interval {low:+.3f} to {high:+.3f}" if isfinite(low) else "no interval"
    change = comparison[intervals.verdict(low, high)]
    meaning = f" ({SCORES[name][1]})" if name in SCORES else ""
    return f"{score_name(name)}{meaning}: {change} than at step 0, {mean:+.3f} ({between}, {images})"


def score_name(name: str) -> str:
    """The name of a metric of ``Method.diagnose`` in texts, e.g. region prediction for region_score."""
    return SCORES[name][0] if name in SCORES else name.replace("_", " ")


def _rotation(accuracy: Interval, learnt: bool) -> str:
    mean, low, high = (100 * value for value in accuracy)
    between = f"95 % interval {low:.1f} to {high:.1f} %" if isfinite(low) else "one image: no interval"
    otherwise = {"better": "hardly above", "worse": "below", "not distinguishable": "not significantly above"}
    level = "above" if learnt else otherwise[intervals.verdict(accuracy[1] - CHANCE, accuracy[2] - CHANCE)]
    return f"rotation accuracy is {level} chance: {mean:.1f} % ({between}; chance is 25 %)"


def advice(label: str) -> str:
    """What to do about a verdict."""
    return {
        "learning": (
            "evaluate the export on your task; LEARNING is about the training's own task, not about the use of the "
            "features, and longer training may improve both"
        ),
        "too short to tell": (
            "train longer; a few hundred steps can show that the set-up works, but conclusions about the features need "
            f"more (the default is at least {LONG:,} steps)"
        ),
        "stalled": "more varied images, a larger batch or a higher --learning-rate may help",
        "collapsing": (
            "start anew with a lower --learning-rate, a higher momentum of the teacher, or (dino, ibot) a lower "
            "teacher_temp"
        ),
    }[label]
