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
from gtsa.core.types import Draw, Method, Replaced, Views
from gtsa.data.loader import ViewSet, collate
from gtsa.evaluation import intervals
from gtsa.evaluation.evaluators.health import Interval, evenly, rank_me, spread
from gtsa.evaluation.intervals import interval

CHANCE = 0.25  # of four rotations

MARGIN = 0.02  # of cosine over step 0, and of accuracy over chance: less counts for nothing

SCORES = {  # figures of Method.diagnose whose gain over step 0 counts, and what it says
    "region_score": "true regions are predicted {} than other images' regions (cosine)",
    "image_score": "views of an image are distinguished {} from other images' views (cosine)",
    "patch_score": "patches find their place in another view {} (share of the way)",
    "pixel_score": "hidden patches are painted {} than with another image's colours (share of the error)",
}

MUTE = 0.01  # of teacher_information: less is none. Seen: 0.0003 where the loss stays at log K, 0.14 where it falls

LONG = 1_000  # steps from which a run without progress counts as stalled


@dataclass
class HealthSnapshot:
    """One look at a network: per-image scores [images], and how its features fill their space."""

    scores: dict[str, Tensor]
    rank: float  # effective number of dimensions of the patch tokens, at most their width
    spread: float  # of the direction of patch tokens: 1 where all directions are equal, 0 where there is one
    images: Tensor  # [images]: which ones, ascending
    replaced: Sequence[Replaced] = ()  # images that could not be read any more

    def of(self, name: str, images: Tensor) -> Tensor:
        """The scores of some of the images, in their order."""
        return self.scores[name][torch.searchsorted(self.images, images)]


class HealthMonitor:
    """Looks at a method with always the same views of the same images.

    Args:
        views: the held-out images.
        prepare: brings views to the device, as for training.
        draws: views of each image; None: so many that there are at least 64 in all.
    """

    def __init__(self, views: ViewSet, prepare: Callable[[Views], Views], draws: int | None = None) -> None:
        self.views, self.prepare = views, prepare
        self.draws = draws or max(1, 64 // max(1, len(views)))

    @torch.no_grad()
    def __call__(self, method: Method) -> HealthSnapshot:
        training = method.training
        method.eval()
        scores: dict[str, list[Tensor]] = {}
        images: list[Tensor] = []
        tokens: list[Tensor] = []
        replaced: dict[int, Replaced] = {}
        for batch in self._batches():
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
            for places in np.array_split(np.arange(count), -(-count // 16)):  # evenly: none is left without others
                yield self.prepare(collate([self.views[Draw(draw, int(place))] for place in places]))


@dataclass
class Verdict:
    """What the figures support: one word, and the sentences behind it."""

    word: str  # learning, too short to tell, stalled, collapsing
    reasons: list[str]
    metrics: dict[str, float]


def verdict(now: HealthSnapshot, start: HealthSnapshot, step: int, held_out: bool = True) -> Verdict:
    """Compares a network with itself at step 0, image by image.

    What counts as learnt lies above chance, or above step 0, with its whole interval, and by a margin: a network that
    has hardly moved differs from itself by little, but surely.
    """
    where = "held-out images" if held_out else "TRAINING images (none were held out)"
    common = now.images[torch.isin(now.images, start.images)]
    images = len(common)
    metrics: dict[str, Any] = {"images": images}
    reasons: list[str] = []
    learnt: dict[str, bool] = {}
    for name in now.scores:
        if name in SCORES:
            gain = interval(now.of(name, common) - start.of(name, common))
            metrics |= _named(name.replace("score", "gain"), gain)
            reasons.append(_better(name, gain, f"{images} {where}"))
            learnt[name] = _clear(gain, 0, MARGIN)
    if "rotation_accuracy" in now.scores:
        accuracy = now.of("rotation_accuracy", common)
        rotations = interval(accuracy)
        learnt["rotation"] = _clear(rotations, CHANCE, MARGIN)
        if "rotation_accuracy" in start.scores:  # views are always the same: the start may have been lucky with them
            learnt["rotation"] &= _clear(interval(accuracy - start.of("rotation_accuracy", common)), 0, MARGIN)
        metrics |= _named("rotation_accuracy", rotations)
        reasons.append(_rotation(rotations, learnt["rotation"]))
    if "agreement" in now.scores:
        metrics["agreement"] = kept = float(now.of("agreement", common).mean())
        reasons.append(f"likenesses between patches agree to {kept:.2f} with those of the start (1: as they were)")
    mute = False
    if "teacher_information" in now.scores and images > 1:
        metrics["teacher_information"] = told = float(now.of("teacher_information", common).mean())
        mute = told < MUTE
        does = "says nearly the same of all images" if mute else "tells images apart"
        reasons.append(f"the teacher {does}: {100 * told:.2g} % of what it could tell of each")
    metrics |= {"rank": now.rank, "rank_at_start": start.rank, "spread": now.spread, "spread_at_start": start.spread}
    shrunk = now.rank < start.rank / 4 or now.spread < start.spread / 4
    reasons.append(
        f"features {'have shrunk' if shrunk else 'keep their room'}: effective rank {now.rank:.1f} (step 0: "
        f"{start.rank:.1f}), spread {now.spread:.3f} (step 0: {start.spread:.3f})"
    )
    main = learnt[next(iter(now.scores))]
    if mute or (shrunk and not (main and now.spread > start.spread / 10)):
        word = "collapsing"
    elif main or learnt.get("rotation"):
        word = "learning"
    elif step < LONG:
        word = "too short to tell"
    else:
        word = "stalled"
    return Verdict(word, reasons, metrics)


def _named(name: str, values: Interval) -> dict[str, float]:
    return dict(zip((name, f"{name}_low", f"{name}_high"), values, strict=True))


def _clear(values: Interval, floor: float, margin: float) -> bool:
    return values[1] > floor and values[0] >= floor + margin


def _better(name: str, gain: Interval, images: str) -> str:
    mean, low, high = gain
    clear = "better" if _clear(gain, 0, MARGIN) else "hardly better"
    words = {"better": clear, "worse": "worse", "not distinguishable": "not distinguishably better"}
    how = words[intervals.verdict(low, high)]
    between = f"95 % interval {low:+.3f} to {high:+.3f}" if isfinite(low) else "no interval"
    return f"{SCORES[name].format(how)}, by {mean:+.3f} over step 0 ({between}, {images})"


def _rotation(accuracy: Interval, learnt: bool) -> str:
    mean, low, high = (100 * value for value in accuracy)
    between = f"95 % interval {low:.1f} to {high:.1f} %" if isfinite(low) else "one image: no interval"
    how = {"better": "hardly recognised", "worse": "not recognised", "not distinguishable": "not recognised yet"}
    word = "recognised" if learnt else how[intervals.verdict(accuracy[1] - CHANCE, accuracy[2] - CHANCE)]
    return f"orientation is {word}: {mean:.1f} % of rotations are named ({between}; chance is 25 %)"


def advice(word: str) -> str:
    """What to do about a verdict."""
    return {
        "learning": "train longer for more, or evaluate the export on your task",
        "too short to tell": f"give it more steps (at least {LONG:,}) before you judge",
        "stalled": "more varied images, a larger batch or a higher --learning-rate may help",
        "collapsing": (
            "start anew with a lower --learning-rate, a higher momentum of the teacher, or (dino, ibot) a lower "
            "teacher_temp"
        ),
    }[word]
