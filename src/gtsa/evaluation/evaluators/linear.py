"""How well does a linear classifier do on frozen features? Many are trained at once, one is chosen (DINOv2)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gtsa.core.compilation import compilable
from gtsa.core.errors import UserError
from gtsa.core.seeds import Stream, epoch_order, generator
from gtsa.core.terminal import say
from gtsa.core.types import Examples, Objective
from gtsa.data.batches.loader import StepSampler
from gtsa.data.labels import Labelled
from gtsa.evaluation.context import EvalContext
from gtsa.evaluation.evaluator import Evaluator, PerImage
from gtsa.evaluation.features import image_features
from gtsa.models.backbone import Encoder
from gtsa.training import supervised
from gtsa.training.optim import ScheduledAdamW
from gtsa.training.schedules import Constant, Cosine

RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
MOMENTUM = 0.9
FLAT = 1e8  # AdamW's epsilon: its second moment vanishes beside it, which leaves gradient descent with momentum
FEWEST, MOST, EPOCHS = 1_000, 12_500, 100


class Linear(Evaluator):
    """A linear classifier for every pair of a learning rate and a number of blocks, all trained at the same time.

    The pair is chosen on a tenth of the training images, on which no classifier is trained. As in DINOv2, training is
    gradient descent with momentum 0.9, without weight decay, with a cosine schedule to 0. AdamW with an epsilon of 1e8
    is equal to that, except in the first steps, where its bias correction replaces the build-up of the momentum.

    Args:
        learning_rates: learning rates to try, for a batch of 256; they are scaled by batch / 256.
        blocks: numbers of last blocks to try; the features of these blocks are concatenated.
        steps: training steps. auto: 100 epochs, at least 1,000 and at most 12,500 steps.
        batch_size: images per step.
        resize: short side in px that images are resized to, bicubic.
        crop: side of the central square that the backbone sees, px.
    """

    label_kinds = ("classes", "multilabel")
    not_compiled = ""

    def __init__(
        self,
        learning_rates: tuple[float, ...] = RATES,
        blocks: tuple[int, ...] = (1, 4),
        steps: int | Literal["auto"] = "auto",
        batch_size: int = 128,
        resize: int = 256,
        crop: int = 224,
    ) -> None:
        counts = (*blocks, batch_size, 1 if steps == "auto" else steps)
        if min(learning_rates, default=0) <= 0 or not blocks or min(counts) < 1:
            raise UserError("linear: learning_rates must be above 0; blocks, steps and batch_size at least 1")
        self.learning_rates, self.blocks, self.steps, self.batch_size = learning_rates, blocks, steps, batch_size
        self.resize, self.crop = resize, crop

    def __call__(self, backbone: Encoder, train: Labelled, val: Labelled, context: EvalContext) -> PerImage:
        if len(train) < 2:
            raise UserError("linear: one training image is too few: another one must choose the learning rate")
        features, val_features = (
            image_features(backbone, data, context, self.resize, self.crop, max(self.blocks)) for data in (train, val)
        )
        targets, truth = (_targets(data) for data in (train, val))
        held_out = tenth(targets, context.seed)
        heads = Heads(self.pairs, features.shape[-1], len(train.classes), train.kind == "multilabel", context.seed)
        self._train(heads, features, targets, torch.nonzero(~held_out)[:, 0], context)
        best = int(heads.quality(features[held_out], targets[held_out]).argmax())
        rate, blocks = self.pairs[best]
        count = int(held_out.sum())
        say(
            f"linear: learning rate {rate:g} on {blocks} block{'s' * (blocks > 1)}, "
            f"chosen on {count} image{'s' * (count > 1)}"
        )
        scores = heads.scores(val_features, best)
        for index, row in enumerate(heads.probabilities(scores)):
            context.on_prediction(index, row)
        return {"scores": scores, "truth": truth}

    def metrics(self, per_image: PerImage) -> dict[str, float]:
        scores, truth = per_image["scores"], per_image["truth"]
        if truth.ndim == 2:
            return {"mAP": 100 * mean_average_precision(scores, truth)}
        metrics = {"top1": 100 * top(scores, truth, 1)}
        if scores.shape[1] > 5:
            metrics["top5"] = 100 * top(scores, truth, 5)
        return metrics

    @property
    def pairs(self) -> list[tuple[float, int]]:
        return [(rate, blocks) for rate in self.learning_rates for blocks in self.blocks]

    def _train(self, heads: Heads, features: Tensor, targets: Tensor, rows: Tensor, context: EvalContext) -> None:
        """Trains the heads on the images ``rows``."""
        batch = self.batch_size
        steps = min(MOST, max(FEWEST, EPOCHS * len(rows) // batch)) if self.steps == "auto" else self.steps
        scale = batch / 256 * FLAT / (1 - MOMENTUM)
        groups = [
            {"params": [weight, bias], "rate": Constant(rate * scale), "eps": FLAT}
            for (rate, _), weight, bias in zip(self.pairs, heads.weights, heads.biases, strict=True)
        ]
        optimizer = ScheduledAdamW(groups, Cosine(1.0, 0.0), Constant(0.0), clip=0.0, betas=(MOMENTUM, 0.999))

        def batches(start: int) -> Iterator[Examples]:
            for draws in StepSampler(len(rows), batch, steps, start):
                images = rows[[epoch_order(context.seed, draw.epoch, len(rows))[draw.position] for draw in draws]]
                yield Examples(features[images], targets[images], images)

        def prepare(batch: Examples) -> Examples:
            return Examples(batch.pixels.to(context.device), batch.targets.to(context.device), batch.images)

        supervised.train(
            heads, optimizer, batches, prepare, steps=steps, batch_size=batch, fabric=context.fabric, seed=context.seed,
            folder=context.folder, compile=context.compile, depends=(self.pairs, features, targets, rows),
        )  # fmt: skip
        heads.eval()


class Heads(Objective):
    """A linear head for each pair of (learning rate, number of last blocks), trained on the sum of their losses.

    Args:
        width: of one block's features.
        multilabel: an image may have several classes.
    """

    def __init__(self, pairs: list[tuple[float, int]], width: int, classes: int, multilabel: bool, seed: int) -> None:
        super().__init__()
        self.pairs, self.multilabel = pairs, multilabel
        draw = torch.Generator().manual_seed(seed)
        self.weights = nn.ParameterList(0.01 * torch.randn(classes, width * n, generator=draw) for _, n in pairs)
        self.biases = nn.ParameterList(torch.zeros(classes) for _ in pairs)

    def forward(self, views: Examples, time: float) -> dict[str, Tensor]:
        losses = self.losses_of(views.pixels, views.targets)
        return {"loss": losses.sum(), "best": losses.detach().min()}

    @compilable
    def losses_of(self, features: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy of each pair, [pairs]."""
        return self.losses(self.logits(features), targets)

    def logits(self, features: Tensor) -> Tensor:
        """Features [B, blocks, D] -> [pairs, B, classes], in one product for each number of blocks."""
        logits: dict[int, Tensor] = {}
        for blocks in {blocks for _, blocks in self.pairs}:
            which = [i for i, pair in enumerate(self.pairs) if pair[1] == blocks]
            weight = torch.cat([self.weights[i] for i in which])
            bias = torch.cat([self.biases[i] for i in which])
            with torch.autocast(features.device.type, enabled=False):
                out = F.linear(features[:, -blocks:].flatten(1).float(), weight, bias)
            for i, part in zip(which, out.chunk(len(which), dim=-1), strict=True):
                logits[i] = part
        return torch.stack([logits[i] for i in range(len(self.pairs))])

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy of each pair, [pairs]."""
        if self.multilabel:
            truth = targets.float().expand_as(logits)
            return F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean((1, 2))
        entropy = F.cross_entropy(logits.flatten(0, 1), targets.repeat(len(logits)), reduction="none")
        return entropy.view(len(logits), -1).mean(1)

    @torch.no_grad()
    def quality(self, features: Tensor, targets: Tensor) -> Tensor:
        """The criterion of the choice, [pairs]: top-1 accuracy or mAP; of equal ones the lower loss is better."""
        scores = torch.stack([self.scores(features, pair) for pair in range(len(self.pairs))])
        metric = mean_average_precision if self.multilabel else top
        values = torch.tensor([metric(row, targets) for row in scores], dtype=torch.float64).nan_to_num()
        order = self.losses(scores, targets).argsort(descending=True, stable=True).argsort()
        return values + order * 1e-9

    @torch.no_grad()
    def scores(self, features: Tensor, pair: int) -> Tensor:
        """Logits [images, classes] of one pair, on the host."""
        device = self.weights[0].device
        return torch.cat([self.logits(part.to(device))[pair].cpu() for part in torch.split(features, 4096)])

    def probabilities(self, scores: Tensor) -> Tensor:
        """Logits as probabilities."""
        return scores.sigmoid() if self.multilabel else scores.softmax(-1)


def _targets(data: Labelled) -> Tensor:
    """int64 [images] for one class an image, bool [images, classes] for several."""
    targets = [data.target(i) for i in range(len(data))]
    return torch.stack(targets) if data.kind == "multilabel" else torch.tensor(targets)


def tenth(targets: Tensor, seed: int) -> Tensor:
    """bool [images]: a tenth of the images (at least one), with about the same share of every class.

    Of an image with several classes the rarest one counts.
    """
    if targets.ndim == 2:
        rarity = targets.sum(0)
        classes = torch.where(targets, rarity, len(targets) + 1).numpy().argmin(1)
    else:
        classes = targets.numpy()
    draw = generator(seed, Stream.LINEAR_HELD_OUT)
    order = np.lexsort((draw.random(len(classes)), classes))  # by class, at random within it
    count = max(1, round(len(order) / 10))
    first = draw.random()
    chosen = order[((np.arange(count) + first) * len(order) / count).astype(int)]
    mask = torch.zeros(len(order), dtype=torch.bool)
    mask[torch.from_numpy(chosen)] = True
    return mask


def top(scores: Tensor, truth: Tensor, k: int = 1) -> float:
    """Share of the rows of scores [n, C] whose true class is among the ``k`` best."""
    return float((scores.topk(k, dim=-1).indices == truth[:, None]).any(-1).double().mean())


def mean_average_precision(scores: Tensor, truth: Tensor) -> float:
    """Mean over classes of average precision: the sum of precision x gain in recall over the distinct scores.

    Args:
        scores, truth: [n, C]; classes without a positive are left out; NaN if all are.
    """
    precisions = []
    for score, true in zip(scores.T, truth.T.bool(), strict=True):
        if true.any():
            score, order = score.sort(descending=True)
            hits = true[order].double().cumsum(0)
            last = torch.cat([score[1:] != score[:-1], torch.tensor([True])])  # of equal scores
            hits, ranks = hits[last], (torch.nonzero(last)[:, 0] + 1).double()
            precisions.append(float((hits / ranks * hits.diff(prepend=hits.new_zeros(1))).sum() / hits[-1]))
    return float(np.mean(precisions)) if precisions else float("nan")
