"""How good is the network after all of it is trained on the task? Fine-tuning for classification (DeiT, BEiT, MAE)."""

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
from torch.utils.data import Dataset, default_collate

from gtsa.core.errors import UserError
from gtsa.core.seeds import Stream, epoch_order, generator
from gtsa.core.types import Draw, Examples, Objective
from gtsa.data.batches.loader import StepSampler
from gtsa.data.labels import Labelled
from gtsa.evaluation.context import EvalContext, Pooling
from gtsa.evaluation.evaluator import Evaluator, PerImage
from gtsa.evaluation.features import fine_tunable, pooled, tokens_of, whole_patches
from gtsa.evaluation.loading import normalised, read, training_batches
from gtsa.models.backbone import Backbone, Encoder
from gtsa.training import supervised
from gtsa.training.optim import ScheduledAdamW, schedule_layers, split_by_decay
from gtsa.training.schedules import Constant, Cosine, warmup_then


class Finetune(Evaluator):
    """A copy of the backbone and a linear head on its pooled tokens, trained together with layer-wise learning rates.

    The defaults are the paper's for iNaturalist 2019; use fewer epochs and a smaller batch for small data.

    Args:
        epochs: passes over the training images.
        batch_size: images per step.
        accumulate: micro-batches per step, to save memory. Each has an even number of images, as they are mixed in
            pairs.
        learning_rate: peak learning rate for a batch of 256; it is scaled by batch / 256.
        warmup: epochs in which the learning rate rises; then it falls along a cosine. auto: 5, at most a tenth of all.
        layer_decay: layer-wise learning rate decay: factor from each block to the one below.
        weight_decay: weight decay; none on biases, norms, positions and CLS.
        drop_path: drop path rate (stochastic depth) of the last block; it rises linearly from 0 at the first.
        mixup: alpha of mixup's beta distribution; 0: no mixup. Every batch gets either mixup or CutMix.
        cutmix: alpha of CutMix's beta distribution; 0: no CutMix.
        erasing: probability of random erasing (a rectangle of the image becomes noise).
        magnitude: magnitude of RandAugment, from 0 to 10 (its standard deviation is 0.5); 0: no RandAugment.
        smoothing: label smoothing, the share of a label that is spread over all classes.
        resize: short side in px that evaluation images are resized to, bicubic.
        crop: side in px of the network's input.
    """

    label_kinds = ("classes",)
    trains_long = True
    not_compiled = ""

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
                "of an even number of images, as they are mixed in pairs"
            )
        warmup_epochs = min(5.0, epochs / 10) if warmup == "auto" else warmup
        if epochs <= 0 or learning_rate <= 0 or not 0 <= warmup_epochs < epochs:
            raise UserError("finetune: epochs and learning_rate must be above 0, and warmup shorter than epochs")
        if not (0 < layer_decay <= 1 and 0 <= drop_path < 1 and 0 <= erasing <= 1 and 0 <= smoothing < 1):
            raise UserError("finetune: layer_decay, drop_path, erasing and smoothing are shares, from 0 to 1")
        if min(mixup, cutmix, weight_decay) < 0 or not 0 <= magnitude <= 10:
            raise UserError("finetune: mixup, cutmix and weight_decay are at least 0, magnitude is from 0 to 10")
        self.epochs, self.batch_size, self.accumulate = epochs, batch_size, accumulate
        self.learning_rate, self.warmup = learning_rate, warmup_epochs
        self.layer_decay, self.weight_decay, self.drop_path = layer_decay, weight_decay, drop_path
        self.mixup, self.cutmix, self.erasing, self.magnitude = mixup, cutmix, erasing, magnitude
        self.smoothing, self.resize, self.crop = smoothing, resize, crop

    def __call__(self, backbone: Encoder, train: Labelled, val: Labelled, context: EvalContext) -> PerImage:
        crop = whole_patches(self.crop, backbone)
        network = Classifier(fine_tunable(backbone), len(train.classes), context.tokens, self.drop_path).to(
            context.device
        )
        self._train(network, train, crop, context)
        network.eval()
        scores = []
        with torch.no_grad():
            for (tokens,) in tokens_of(network.backbone, val, context, max(self.resize, crop), crop):
                scores.append(network.head(pooled(tokens, context.tokens)).float().cpu())
        per_image = {"scores": torch.cat(scores), "truth": torch.tensor([val.target(i) for i in range(len(val))])}
        for index, row in enumerate(per_image["scores"].softmax(-1)):
            context.on_prediction(index, row)
        return per_image

    def metrics(self, per_image: PerImage) -> dict[str, float]:
        scores, truth = per_image["scores"], per_image["truth"][:, None]
        ks = (1, 5) if scores.shape[1] > 5 else (1,)
        hits = {k: (scores.topk(k, dim=-1).indices == truth).any(-1).double().mean() for k in ks}
        return {f"top{k}": 100 * float(share) for k, share in hits.items()}

    def _train(self, network: Classifier, train: Labelled, crop: int, context: EvalContext) -> None:
        batch = self.batch_size
        steps = max(1, round(self.epochs * len(train) / batch))
        rate = warmup_then(Cosine(self.learning_rate * batch / 256, 1e-6), self.warmup / self.epochs, steps)
        groups = parameter_groups(network, self.layer_decay)
        optimizer = ScheduledAdamW(groups, rate, Constant(self.weight_decay), clip=0.0)
        images = Augmented(train, crop, self.magnitude, network.backbone.normalisation[0], context.seed)

        def batches(start: int) -> Iterator[Examples]:
            draws = StepSampler(len(train), batch, steps, start, accumulate=self.accumulate)
            micro_batches = training_batches(images, draws, context, default_collate)
            for number, (pixels, classes, indices) in enumerate(micro_batches, start * self.accumulate):
                yield Examples(pixels, (classes, number), indices)

        supervised.train(
            network, optimizer, batches, self._prepare(network, len(train.classes), context), steps=steps,
            batch_size=batch, accumulate=self.accumulate, fabric=context.fabric, seed=context.seed,
            folder=context.folder, compile=context.compile,
            depends=(sorted(vars(self).items()), context.tokens, train.fingerprint),
        )  # fmt: skip

    def _prepare(self, network: Classifier, classes: int, context: EvalContext) -> Callable[[Examples], Examples]:
        """Returns what moves a batch to the device, normalises, erases and mixes it.

        Erasing and mixing depend on (seed, number of the micro-batch) alone.
        """
        mix = Mixup(
            self.mixup, self.cutmix, prob=float(self.mixup + self.cutmix > 0), label_smoothing=self.smoothing,
            num_classes=classes,
        )  # fmt: skip
        erase = RandomErasing(self.erasing, mode="pixel", device=context.device)

        def prepare(batch: Examples) -> Examples:
            truth, number = batch.targets
            pixels = normalised(batch.pixels, network.backbone, context.device)
            with seeded(generator(context.seed, Stream.FINETUNE_MIXUP, number), context.device):
                pixels, targets = mix(erase(pixels), truth.to(context.device))
            return Examples(pixels, targets, batch.images)

        return prepare


class Classifier(Objective):
    """A copy of a backbone with a linear head that is initialised with zeros."""

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
    """The trained parameters, layer by layer. The head has the full learning rate, the last block ``decay`` of it."""
    layers = schedule_layers(network.backbone.layers(decay), lambda scale: Constant(decay * scale))
    return [*layers, *split_by_decay(network.head.named_parameters())]


class Augmented(Dataset[tuple[Tensor, int, int]]):
    """Draw -> (uint8 [3, crop, crop], class, image index): random crop, mirroring and RandAugment.

    A pure function of (seed, epoch, image).
    """

    def __init__(self, data: Labelled, crop: int, magnitude: int, mean: tuple[float, ...], seed: int) -> None:
        policy = f"rand-m{magnitude}-mstd0.5-inc1" if magnitude else None
        self.data, self.seed = data, seed
        self.augment = create_transform(
            crop, is_training=True, auto_augment=policy, color_jitter=None, interpolation="bicubic", mean=mean,
            normalize=False,
        )  # fmt: skip

        for op in (op for step in self.augment.transforms for op in getattr(step, "ops", ())):
            if op.name == "PosterizeIncreasing":
                op.level_fn = _posterize_bits

    def __getitem__(self, draw: Draw) -> tuple[Tensor, int, int]:
        index = int(epoch_order(self.seed, draw.epoch, len(self.data))[draw.position])
        image = Image.fromarray(read(self.data, index).permute(1, 2, 0).numpy())
        with seeded(generator(self.seed, Stream.FINETUNE_CROPS, draw.epoch, index), torch.device("cpu")):
            return self.augment(image), self.data.target(index), index


def _posterize_bits(level: float, _: object) -> tuple[int]:
    """As timm's: from 4 bits per channel down, but never 0, which Pillow refuses (and older versions paint black)."""
    return (max(1, 4 - int(level / 10 * 4)),)


@contextmanager
def seeded(draws: np.random.Generator, device: torch.device) -> Iterator[None]:
    """Seeds the global random states from ``draws``, as timm uses no others; restores them afterwards."""
    states = random.getstate(), np.random.get_state()
    python_seed, numpy_seed, torch_seed = (int(number) for number in draws.integers(2**32, size=3))
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        random.seed(python_seed)
        np.random.seed(numpy_seed)
        torch.manual_seed(torch_seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
