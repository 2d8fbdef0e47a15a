"""Is it learning? Figures without labels, on held-out images, against the same network at step 0.

A loss alone cannot tell: it also falls when all features become alike. So we ask whether the true region is predicted
better than regions of other images, whether patches find their place in another view, whether rotations are named, and
whether the features still fill their space (RankMe, Garrido et al. 2023).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from scipy import stats
from torch import Tensor

from gtsa.core import Draw, Method, Views
from gtsa.data import ViewSet, collate

TOKENS = 4096  # rows of the matrix whose rank is taken
CHANCE = 0.25  # of four rotations
LONG = 1_000  # steps from which a run without progress counts as stalled


@dataclass
class Figures:
    """One look at a network: per-image scores [images], and how its features fill their space."""

    scores: dict[str, Tensor]
    rank: float  # effective number of dimensions of the patch tokens, at most their width
    spread: float  # of the direction of patch tokens: 1 where all directions are equal, 0 where there is one


class Health:
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
    def __call__(self, method: Method) -> Figures:
        training = method.training
        method.eval()
        scores: dict[str, list[Tensor]] = {}
        images: list[Tensor] = []
        tokens: list[Tensor] = []
        for batch in self._batches():
            for name, values in method.diagnose(batch).items():
                scores.setdefault(name, []).append(values.double().cpu())
            images.append(batch.images)
            patches = method.encoders["teacher"](batch.global_crops.pixels.flatten(0, 1)).patches
            tokens.append(patches.flatten(0, 2).float().cpu())
        method.train(training)
        _, row = torch.unique(torch.cat(images), return_inverse=True)
        count = torch.bincount(row).double()
        means = {
            name: torch.zeros(len(count), dtype=torch.float64).index_add_(0, row, torch.cat(values)) / count
            for name, values in scores.items()
        }
        every = torch.cat(tokens)
        chosen = every[torch.linspace(0, len(every) - 1, min(TOKENS, len(every))).long()]
        return Figures(means, rank_me(chosen), spread(chosen))

    def _batches(self) -> Iterator[Views]:
        for draw in range(self.draws):
            places = range(len(self.views))
            for first in range(0, len(places), 16):
                some = [self.views[Draw(draw, place)] for place in places[first : first + 16]]
                yield self.prepare(collate(some))


def rank_me(tokens: Tensor) -> float:
    """Effective rank of [n, D]: the exponential of the entropy of its normalised singular values."""
    values = torch.linalg.svdvals(tokens.double())
    p = values / values.sum() + 1e-7
    return float(torch.exp(-(p * p.log()).sum()))


def spread(tokens: Tensor) -> float:
    """Standard deviation per channel of the unit vectors of [n, D], times the root of D."""
    unit = torch.nn.functional.normalize(tokens.double(), dim=-1)
    return float(unit.std(0, unbiased=False).mean() * unit.shape[1] ** 0.5)


def interval(values: Tensor) -> tuple[float, float, float]:
    """Mean of independent values and its 95 % interval (Student's t)."""
    n, mean = len(values), float(values.mean())
    if n < 2:
        return mean, float("-inf"), float("inf")
    half = float(stats.t.ppf(0.975, n - 1) * values.std() / n**0.5)
    return mean, mean - half, mean + half


@dataclass
class Verdict:
    """What the figures support: one word, and the sentences behind it."""

    word: str  # learning, too short to tell, stalled, collapsing
    reasons: list[str]
    figures: dict[str, float]


def verdict(now: Figures, start: Figures, step: int, held_out: bool = True) -> Verdict:
    """Compares a network with itself at step 0, image by image."""
    where = "held-out images" if held_out else "TRAINING images (none were held out)"
    images = len(now.scores["region_score"])
    figures: dict[str, Any] = {"images": images}
    gains = {
        name: interval(now.scores[name] - start.scores[name])
        for name in ("region_score", "patch_score")
        if name in now.scores
    }
    for name, (mean, low, high) in gains.items():
        stem = name.replace("score", "gain")
        figures |= {stem: mean, f"{stem}_low": low, f"{stem}_high": high}
    gain = gains["region_score"]
    region_learnt = gain[1] > 0
    better = "predicted better" if region_learnt else "not clearly predicted better"
    reasons = [
        f"true regions are {better} than other images' regions, by {gain[0]:+.3f} cosine over step 0 "
        f"(95 % interval {gain[1]:+.3f} to {gain[2]:+.3f}, {images} {where})"
    ]
    if "patch_score" in gains:
        near = tuple(100 * value for value in gains["patch_score"])
        reasons.append(
            f"patches {'find' if near[1] > 0 else 'do not clearly find'} their place in another view better, by "
            f"{near[0]:+.1f} % of the way over step 0 (95 % interval {near[1]:+.1f} to {near[2]:+.1f} %)"
        )
    rotation_learnt = False
    if "rotation_accuracy" in now.scores:
        turns = interval(now.scores["rotation_accuracy"])
        figures |= {
            "rotation_accuracy": turns[0],
            "rotation_accuracy_low": turns[1],
            "rotation_accuracy_high": turns[2],
        }
        rotation_learnt = turns[1] > CHANCE
        reasons.append(
            f"orientation is {'recognised' if rotation_learnt else 'not recognised yet'}: {100 * turns[0]:.1f} % of "
            f"rotations are named (95 % interval {100 * turns[1]:.1f} to {100 * turns[2]:.1f} %; chance is 25 %)"
        )
    figures |= {"rank": now.rank, "rank_at_start": start.rank, "spread": now.spread, "spread_at_start": start.spread}
    shrunk = now.rank < start.rank / 4 or now.spread < start.spread / 4
    reasons.append(
        f"features {'have shrunk' if shrunk else 'keep their room'}: effective rank {now.rank:.1f} (step 0: "
        f"{start.rank:.1f}), spread {now.spread:.3f} (step 0: {start.spread:.3f})"
    )
    if shrunk and not (region_learnt and now.spread > start.spread / 10):
        word = "collapsing"
    elif region_learnt or rotation_learnt:
        word = "learning"
    elif step < LONG:
        word = "too short to tell"
    else:
        word = "stalled"
    return Verdict(word, reasons, figures)


def advice(word: str) -> str:
    """What to do about a verdict."""
    return {
        "learning": "train longer for more, or evaluate the export on your task",
        "too short to tell": f"give it more steps (at least {LONG:,}) before you judge",
        "stalled": "more varied images, a larger batch or a higher --learning-rate may help",
        "collapsing": "start anew with a lower --learning-rate or a higher teacher momentum (--gtsa.momentum)",
    }[word]
