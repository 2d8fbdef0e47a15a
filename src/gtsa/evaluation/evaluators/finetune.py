"""How good is the network once all of it is trained on the task? Fine-tuning for classification (DeiT, BEiT, MAE)."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import Mixup, create_transform
from timm.data.random_erasing import RandomErasing
from timm.layers import DropPath
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from gtsa.core.errors import UserError
from gtsa.core.seeds import Stream, epoch_order, generator
from gtsa.core.types import Draw, Examples, Objective
from gtsa.data.labels import Labelled
from gtsa.data.loader import StepSampler
from gtsa.evaluation.evaluator import Evaluator, PerImage
from gtsa.evaluation.features import (
    EvalContext,
    Pooling,
    fine_tunable,
    normalised,
    pooled,
    read,
    tokens_of,
    whole_patches,
)
from gtsa.models.backbone import Backbone, Encoder
from gtsa.training.optim import ScheduledAdamW
from gtsa.training.schedules import Constant, Cosine, warmup_then
from gtsa.training.trainer import teach


class Finetune(Evaluator):
    """A copy of the backbone and a linear head on its pooled tokens, trained together with layer-wise decayed rates.

    The defaults are the paper's for iNaturalist 2019; give fewer epochs and a smaller batch for small data.

    Args:
        epochs: times that every image is seen.
        batch_size: images a step.
        accumulate: micro-batches that a step is made of, to save memory. Images are mixed in pairs, so each has an even
            number of them.
        learning_rate: peak for a batch of 256; it is scaled by batch / 256.
        warmup: epochs in which the learning rate rises; then it falls along a cosine. auto: 5, at most a tenth of all.
        layer_decay: every block's learning rate is that of the block above times this.
        weight_decay: none on biases, norms, positions and CLS.
        drop_path: stochastic depth of the last block, linear from 0 at the first.
        mixup, cutmix: their beta distributions' parameter; every batch is mixed by one of them; 0: never by it.
        erasing: probability that a rectangle of an image is erased.
        magnitude: of RandAugment, from 0 to 10, with a standard deviation of 0.5; 0: no RandAugment.
        smoothing: share of a label that is spread over all classes.
        resize: short side in px that images are brought to before they are judged, bicubic.
        crop: side in px of what the network sees.
    """

    label_kinds = ("classes",)
    trains_long = True

    def __init__(
        self,
        epochs: float = 300.0,
        batch_size: int = 1024,
        accumulate: int = 1,
        learning_rate: float = 5e-4,
        warmup: float | Literal["auto"] = "auto",
        layer_decay: float = 0.65,
        weight_decay: float = 0.05,
        drop_path: float = 0.1,
        mixup: float = 0.8,
        cutmix: float = 1.0,
        erasing: float = 0.25,
        magnitude: int = 9,
        smoothing: float = 0.1,
        resize: int = 256,
        crop: int = 224,
    ) -> None:
        if min(batch_size, accumulate) < 1 or batch_size % (2 * accumulate):
            raise UserError(
                f"finetune: batch_size {batch_size} must be a multiple of {2 * accumulate}: {accumulate} micro-batches "
                "of an even number of images, since they are mixed in pairs"
            )
        rising = min(5.0, epochs / 10) if warmup == "auto" else warmup
        if epochs <= 0 or learning_rate <= 0 or not 0 <= rising < epochs:
            raise UserError("finetune: epochs and learning_rate must be above 0, and warmup shorter than epochs")
        if not (0 < layer_decay <= 1 and 0 <= drop_path < 1 and 0 <= erasing <= 1 and 0 <= smoothing < 1):
            raise UserError("finetune: layer_decay, drop_path, erasing and smoothing are shares, from 0 to 1")
        if min(mixup, cutmix, weight_decay) < 0 or not 0 <= magnitude <= 10:
            raise UserError("finetune: mixup, cutmix and weight_decay are at least 0, magnitude is from 0 to 10")
        self.epochs, self.batch_size, self.accumulate = epochs, batch_size, accumulate
        self.learning_rate, self.warmup = learning_rate, rising
        self.layer_decay, self.weight_decay, self.drop_path = layer_decay, weight_decay, drop_path
        self.mixup, self.cutmix, self.erasing, self.magnitude = mixup, cutmix, erasing, magnitude
        self.smoothing, self.resize, self.crop = smoothing, resize, crop

    def __call__(self, backbone: Encoder, train: Labelled, val: Labelled, lab: EvalContext) -> PerImage:
        crop = whole_patches(self.crop, backbone)
        network = Classifier(fine_tunable(backbone), len(train.classes), lab.tokens, self.drop_path).to(lab.device)
        self._teach(network, train, crop, lab)
        network.eval()
        scores = []
        with torch.no_grad():
            for (tokens,) in tokens_of(network.backbone, val, lab, max(self.resize, crop), crop):
                scores.append(network.head(pooled(tokens, lab.tokens)).float().cpu())
        per_image = {"scores": torch.cat(scores), "truth": torch.tensor([val.target(i) for i in range(len(val))])}
        for index, row in enumerate(per_image["scores"].softmax(-1)):
            lab.on_prediction(index, row)
        return per_image

    def metrics(self, per_image: PerImage) -> dict[str, float]:
        scores, truth = per_image["scores"], per_image["truth"][:, None]
        ks = (1, 5) if scores.shape[1] > 5 else (1,)
        hits = {k: (scores.topk(k, dim=-1).indices == truth).any(-1).double().mean() for k in ks}
        return {f"top{k}": 100 * float(share) for k, share in hits.items()}

    def _teach(self, network: Classifier, train: Labelled, crop: int, lab: EvalContext) -> None:
        batch = self.batch_size
        steps = max(1, round(self.epochs * len(train) / batch))
        rate = warmup_then(Cosine(self.learning_rate * batch / 256, 1e-6), self.warmup / self.epochs, steps)
        groups = parameter_groups(network, self.layer_decay)
        optimizer = ScheduledAdamW(groups, rate, Constant(self.weight_decay), clip=0.0)
        images = Augmented(train, crop, self.magnitude, network.backbone.normalisation[0], lab.seed)

        def batches(start: int) -> Iterator[Examples]:
            draws = StepSampler(len(train), batch, steps, start, accumulate=self.accumulate)
            for micro, (pixels, classes, places) in enumerate(loader(images, draws, lab), start * self.accumulate):
                yield Examples(pixels, (classes, micro), places)

        teach(
            network, optimizer, batches, self._prepare(network, len(train.classes), lab), steps=steps,
            batch_size=batch, accumulate=self.accumulate, fabric=lab.fabric, seed=lab.seed, folder=lab.folder,
            depends=(sorted(vars(self).items()), lab.tokens, train.fingerprint),
        )  # fmt: skip

    def _prepare(self, network: Classifier, classes: int, lab: EvalContext) -> Callable[[Examples], Examples]:
        """To the device, normalised, and then erased and mixed as (seed, number of the micro-batch) say."""
        mix = Mixup(
            self.mixup, self.cutmix, prob=float(self.mixup + self.cutmix > 0), label_smoothing=self.smoothing,
            num_classes=classes,
        )  # fmt: skip
        erase = RandomErasing(self.erasing, mode="pixel", device=lab.device)

        def prepare(batch: Examples) -> Examples:
            truth, micro = batch.targets
            pixels = normalised(batch.pixels, network.backbone, lab.device)
            with seeded(generator(lab.seed, Stream.FINETUNE_MIXUP, micro), lab.device):
                pixels, targets = mix(erase(pixels), truth.to(lab.device))
            return Examples(pixels, targets, batch.images)

        return prepare


class Classifier(Objective):
    """A copy of a backbone with a linear head, which starts at zero."""

    def __init__(self, backbone: Backbone, classes: int, tokens: Pooling, drop_path: float) -> None:
        super().__init__()
        self.tokens: Pooling = tokens
        self.backbone = deepcopy(backbone).requires_grad_(True)
        blocks = self.backbone.vit.blocks
        for block, rate in zip(blocks, np.linspace(0, drop_path, len(blocks)), strict=True):
            block.drop_path1, block.drop_path2 = DropPath(float(rate)), DropPath(float(rate))
        self.head = nn.Linear(backbone.embed_dim * (2 if tokens == "both" else 1), classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, views: Examples, time: float) -> dict[str, Tensor]:
        logits = self.head(pooled(self.backbone(views.pixels), self.tokens)).float()
        return {"loss": -(views.targets * F.log_softmax(logits, dim=-1)).sum(-1).mean()}


def parameter_groups(network: Classifier, decay: float) -> list[dict[str, Any]]:
    """What learns; the head does at the full rate, the last block below it."""
    layers = [{**group, "rate": Constant(decay * share)} for share, group in network.backbone.layers(decay)]
    return [*layers, {"params": [network.head.weight]}, {"params": [network.head.bias], "decayed": False}]


class Augmented(Dataset[tuple[Tensor, int, int]]):
    """Draw -> (uint8 [3, crop, crop], class, image): cut, mirrored, RandAugment by (seed, epoch, image)."""

    def __init__(self, data: Labelled, crop: int, magnitude: int, mean: tuple[float, ...], seed: int) -> None:
        policy = f"rand-m{magnitude}-mstd0.5-inc1" if magnitude else None
        self.data, self.seed = data, seed
        self.change = create_transform(
            crop, is_training=True, auto_augment=policy, color_jitter=None, interpolation="bicubic", mean=mean,
            normalize=False,
        )  # fmt: skip

        for op in (op for step in self.change.transforms for op in getattr(step, "ops", ())):
            if op.name == "PosterizeIncreasing":
                op.level_fn = _bits

    def __getitem__(self, draw: Draw) -> tuple[Tensor, int, int]:
        index = int(epoch_order(self.seed, draw.epoch, len(self.data))[draw.place])
        image = Image.fromarray(read(self.data, index).permute(1, 2, 0).numpy())
        with seeded(generator(self.seed, Stream.FINETUNE_CROPS, draw.epoch, index), torch.device("cpu")):
            return self.change(image), self.data.target(index), index


def _bits(level: float, _: Any) -> tuple[int]:
    """As timm's: from 4 bits a colour down, but never to none, which Pillow refuses (and used to paint black)."""
    return (max(1, 4 - int(level / 10 * 4)),)


def loader(images: Augmented, draws: StepSampler, lab: EvalContext) -> DataLoader[Any]:
    """Batches in order, the same for any number of workers."""
    return DataLoader(
        images,
        batch_sampler=draws,
        num_workers=lab.workers,
        pin_memory=lab.device.type == "cuda",
        generator=torch.Generator().manual_seed(0),  # iter() would draw from the global one
        timeout=600 if lab.workers else 0,
    )


@contextmanager
def seeded(draws: np.random.Generator, device: torch.device) -> Iterator[None]:
    """Global random states that follow from ``draws``, for timm, which knows no others; put back afterwards."""
    states = random.getstate(), np.random.get_state()
    one, two, three = (int(number) for number in draws.integers(2**32, size=3))
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        random.seed(one)
        np.random.seed(two)
        torch.manual_seed(three)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
