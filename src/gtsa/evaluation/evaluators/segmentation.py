"""Can every pixel be classified? Segmentation by a linear head on frozen patches, or by fine-tuning a Semantic FPN."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from gtsa.core.compilation import compilable
from gtsa.core.errors import UserError
from gtsa.core.seeds import Stream, epoch_order, generator
from gtsa.core.types import Draw, Examples, Objective
from gtsa.data.batches.loader import StepSampler
from gtsa.data.images.pixels import NEUTRAL
from gtsa.data.labels import IGNORE, Labelled
from gtsa.evaluation import dense
from gtsa.evaluation.context import EvalContext
from gtsa.evaluation.evaluator import Evaluator, PerImage
from gtsa.evaluation.features import fine_tunable, whole_patches
from gtsa.evaluation.heads.semantic_fpn import SemanticFPN
from gtsa.evaluation.loading import normalised, read, resized, training_batches
from gtsa.models.backbone import Encoder
from gtsa.training import supervised
from gtsa.training.optim import ScheduledAdamW, split_by_decay
from gtsa.training.schedules import Constant, Polynomial, warmup_then

PUBLISHED: dict[str, dict[str, float]] = {
    "linear": {"size": 448, "learning_rate": 1e-3, "weight_decay": 1e-4},
    "fpn": {"size": 0, "learning_rate": 6e-5, "weight_decay": 0.01},
}
Auto = Literal["auto"]


class Segmentation(Evaluator):
    """Semantic segmentation, trained on masks.

    Args:
        head: linear: batch norm and a 1x1 convolution on the frozen patch tokens. fpn: Semantic FPN on four blocks; the
            backbone is fine-tuned with it.
        size: side of the square that images are resized to, px; 0: their own size. auto: 448 (linear), 0 (fpn).
        crop: side of training crops and of sliding windows, px. auto: size, or 512 if images keep their own.
        scales: smallest and largest factor by which training images are resized before they are cropped.
        flip: share of training crops that are mirrored left to right.
        steps: training steps.
        batch_size: crops per step.
        accumulate: micro-batches per step, to save memory.
        learning_rate: peak learning rate. auto: 1e-3 (linear), 6e-5 (fpn).
        weight_decay: weight decay; none on positions, CLS token, norms and biases. auto: 1e-4 (linear), 0.01 (fpn).
        warmup: share of the steps in which the learning rate rises; then it falls linearly to 0.
        strides: strides of the FPN's maps. true: from a quarter of a patch to two patches; flat: one patch each.
        sliding: stride in px of sliding windows; 0: whole images at once.
    """

    label_kinds = ("masks",)
    trains_long = True
    not_compiled = ""

    def __init__(
        self,
        head: Literal["linear", "fpn"] = "linear",
        size: int | Auto = "auto",
        crop: int | Auto = "auto",
        scales: tuple[float, float] = (0.5, 2.0),
        flip: float = 0.5,
        steps: int = 40_000,
        batch_size: int = 16,
        accumulate: int = 1,
        learning_rate: float | Auto = "auto",
        weight_decay: float | Auto = "auto",
        warmup: float = 0.0375,
        strides: Literal["true", "flat"] = "true",
        sliding: int = 0,
    ) -> None:
        auto = PUBLISHED[head]
        self.head, self.flat = head, strides == "flat"
        self.size = int(auto["size"]) if size == "auto" else size
        self.crop = (self.size or 512) if crop == "auto" else crop
        self.scales, self.flip, self.sliding = scales, flip, sliding
        self.steps, self.batch_size, self.accumulate, self.warmup = steps, batch_size, accumulate, warmup
        self.learning_rate = auto["learning_rate"] if learning_rate == "auto" else learning_rate
        self.weight_decay = auto["weight_decay"] if weight_decay == "auto" else weight_decay
        if (
            min(self.size, sliding) < 0
            or min(self.crop, steps, batch_size, accumulate) < 1
            or not 0 < scales[0] <= scales[1]
        ):
            raise UserError(
                "segmentation: crop, steps, batch_size and accumulate must be at least 1, size and sliding at least 0, "
                "and scales ascending and above 0"
            )
        if not 0 <= flip <= 1 or not 0 <= warmup < 1 or self.learning_rate <= 0 or self.weight_decay < 0:
            raise UserError(
                "segmentation: flip and warmup are shares, learning_rate is above 0 and weight_decay at least 0"
            )

    def __call__(self, backbone: Encoder, train: Labelled, val: Labelled, context: EvalContext) -> PerImage:
        size = self.size and whole_patches(self.size, backbone)
        crop = whole_patches(self.crop, backbone)
        with torch.random.fork_rng([]):  # torch's layers draw their first weights from the global generator
            torch.manual_seed(context.seed)
            network = self._network(backbone, len(train.classes))
        objective = PixelCrossEntropy(network)

        def network_input(pixels: Tensor) -> Tensor:
            """Normalised pixels for the FPN, their patch tokens [N, D, h, w] for the linear head."""
            return pixels if self.head == "fpn" else dense.patch_tokens(backbone, pixels, context).permute(0, 3, 1, 2)

        def prepare(batch: Examples) -> Examples:
            pixels = network_input(normalised(batch.pixels, backbone, context.device))
            return Examples(pixels, batch.targets.to(context.device), batch.images)

        def score(pixels: Tensor) -> Tensor:
            with context.fabric.autocast():
                return network(network_input(pixels))  # type: ignore[no-any-return]

        crops = TrainingCrops(train, size, crop, self.scales, self.flip, context.seed)
        settings = sorted(item for item in vars(self).items() if item[0] != "sliding")
        supervised.train(
            objective, self._optimizer(network), lambda start: self._batches(crops, context, start), prepare,
            steps=self.steps, batch_size=self.batch_size, accumulate=self.accumulate, fabric=context.fabric,
            seed=context.seed, folder=context.folder, compile=context.compile,
            depends=(settings, train.classes, train.fingerprint, backbone),
        )  # fmt: skip
        objective.eval()
        stride = self.sliding and whole_patches(self.sliding, backbone)
        return dense.classify_pixels(score, backbone, val, context, size, crop, stride)

    def metrics(self, per_image: PerImage) -> dict[str, float]:
        return dense.metrics(per_image)

    def per_class(self, per_image: PerImage) -> dict[str, list[float]]:
        return dense.per_class(per_image)

    def _network(self, backbone: Encoder, classes: int) -> nn.Module:
        if self.head == "fpn":
            return SemanticFPN(copy.deepcopy(fine_tunable(backbone)), classes, self.flat)
        return nn.Sequential(nn.BatchNorm2d(backbone.embed_dim), nn.Conv2d(backbone.embed_dim, classes, 1))

    def _optimizer(self, network: nn.Module) -> ScheduledAdamW:
        rate = warmup_then(Polynomial(self.learning_rate), self.warmup, self.steps)
        return ScheduledAdamW(parameter_groups(network), rate, Constant(self.weight_decay), clip=0)

    def _batches(self, crops: TrainingCrops, context: EvalContext, start: int) -> Iterable[Examples]:
        draws = StepSampler(len(crops), self.batch_size, self.steps, start, accumulate=self.accumulate)
        return training_batches(crops, draws, context, _collate)


class TrainingCrops(Dataset[tuple[Tensor, Tensor, int]]):
    """Draw -> (crop uint8 [3, S, S], its mask int64 [S, S], image index): resized, cropped and mirrored at random.

    Pixels outside the image have the neutral colour and are ignored. A pure function of (seed, epoch, image).
    """

    def __init__(
        self, data: Labelled, size: int, crop: int, scales: tuple[float, float], flip: float, seed: int
    ) -> None:
        self.data, self.size, self.crop, self.scales, self.flip, self.seed = data, size, crop, scales, flip, seed

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, draw: Draw) -> tuple[Tensor, Tensor, int]:
        image = int(epoch_order(self.seed, draw.epoch, len(self.data))[draw.position])
        rng = generator(self.seed, Stream.SEGMENTATION_CROPS, image, draw.epoch)
        pixels, truth = read(self.data, image), self.data.target(image)
        scale = rng.uniform(*self.scales)
        height, width = (max(1, round((self.size or side) * scale)) for side in truth.shape)
        pixels, truth = resized(pixels, height, width), dense.resized_mask(truth, height, width)
        top, left = (int(rng.integers(max(0, side - self.crop) + 1)) for side in (height, width))
        area = slice(top, top + self.crop), slice(left, left + self.crop)
        rows, columns = min(height, self.crop), min(width, self.crop)
        crop = torch.tensor(NEUTRAL, dtype=torch.uint8)[:, None, None].repeat(1, self.crop, self.crop)
        mask = torch.full((self.crop, self.crop), IGNORE)
        crop[:, :rows, :columns], mask[:rows, :columns] = pixels[:, *area], truth[area]
        return (crop.flip(-1), mask.flip(-1), image) if rng.random() < self.flip else (crop, mask, image)


def _collate(crops: list[tuple[Tensor, Tensor, int]]) -> Examples:
    pixels, masks, images = zip(*crops, strict=True)
    return Examples(torch.stack(pixels), torch.stack(masks), torch.tensor(images))


class PixelCrossEntropy(Objective):
    """Mean cross-entropy of the labelled pixels; the network's scores are upsampled to the mask."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, views: Examples, time: float) -> dict[str, Tensor]:
        return {"loss": pixel_cross_entropy(self.network(views.pixels).float(), views.targets)}


@compilable
def pixel_cross_entropy(scores: Tensor, truth: Tensor) -> Tensor:
    """Mean over the labelled pixels of truth [N, H, W], to which scores [N, C, h, w] are upsampled."""
    scores = F.interpolate(scores, truth.shape[-2:], mode="bilinear", align_corners=False)
    # one row per pixel: cross-entropy of maps has no deterministic kernel on GPUs
    rows, truth = scores.permute(0, 2, 3, 1).flatten(0, 2), truth.flatten()
    total = F.cross_entropy(rows, truth, ignore_index=IGNORE, reduction="sum")
    return total / (truth != IGNORE).sum().clamp(min=1)


def parameter_groups(network: nn.Module) -> list[dict[str, Any]]:
    """Parameters with weight decay, and those without: positions, CLS and other tokens, norms, biases."""
    return split_by_decay(network.named_parameters(), lambda name: "pos_embed" in name or "_token" in name)
