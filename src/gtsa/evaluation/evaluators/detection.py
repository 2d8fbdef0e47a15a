"""Are objects detected and segmented? Mask R-CNN on the ViT, trained and evaluated as on COCO."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from gtsa.core.errors import UserError
from gtsa.core.seeds import Stream, epoch_order, generator
from gtsa.core.types import Draw, Examples, Objective
from gtsa.data.batches.loader import StepSampler
from gtsa.data.labels import Boxes, Labelled
from gtsa.evaluation.average_precision import Annotation, average_precision, pasted, to_run_lengths, to_xywh
from gtsa.evaluation.context import DetectedObject, EvalContext
from gtsa.evaluation.detection_crops import apply_view, draw_view, fit_size
from gtsa.evaluation.evaluator import Evaluator, PerImage
from gtsa.evaluation.features import fine_tunable
from gtsa.evaluation.heads.mask_rcnn import LONGEST, Detector, Target
from gtsa.evaluation.loading import batches, normalised, read, resized, training_batches
from gtsa.models.backbone import Encoder
from gtsa.training import supervised
from gtsa.training.optim import ScheduledAdamW, split_by_decay
from gtsa.training.schedules import Constant, Steps, warmup_then


class Detection(Evaluator):
    """Average precision of boxes, and of masks if every object has one.

    Mask R-CNN (else Faster R-CNN) on the simple feature pyramid, with the settings of the paper at COCO's size: half of
    the images resized to 480 to 800 px, half resized to 400 to 600, cropped to 384 to 600 and resized again (DETR).

    Args:
        scale: short side in px of evaluation images, and the largest one in training; the other sizes are proportional
            to it. The long side is at most 1333/800 of it.
        epochs: passes over the training images.
        steps: optimiser steps, instead of epochs. 0: the untrained head.
        batch_size: images per step.
        accumulate: micro-batches per step, to save memory.
        learning_rate: peak learning rate; a tenth of it from 8/12 of the steps on, a hundredth from 11/12 on.
        head_rate: factor on the learning rate of pyramid and head: more than 1 for short trainings.
        weight_decay: weight decay; none on norms, biases, positions and CLS.
        drop_path: drop path rate (stochastic depth) of the last block.
        warmup: steps in which the learning rate rises, at most a tenth of all.
        freeze: train pyramid and head alone, on a frozen backbone.
        width: channels of pyramid and head.
    """

    label_kinds = ("boxes",)
    trains_long = True
    bootstrap = False
    not_compiled = "its images have many sizes, and each would be compiled anew"

    def __init__(
        self,
        scale: int = 800,
        epochs: int = 12,
        steps: int | None = None,
        batch_size: int = 8,
        accumulate: int = 1,
        learning_rate: float = 5e-5,
        head_rate: float = 1.0,
        weight_decay: float = 0.05,
        drop_path: float = 0.05,
        warmup: int = 500,
        freeze: bool = False,
        width: int = 256,
    ) -> None:
        if scale < 32 or min(epochs, batch_size, accumulate, width) < 1 or (steps or 0) < 0:
            raise UserError(
                "detection: scale must be at least 32 px, epochs, batch_size, accumulate and width at least 1, and "
                "steps at least 0"
            )
        if min(learning_rate, head_rate) <= 0:
            raise UserError("detection: learning_rate and head_rate must be above 0")
        self.scale, self.epochs, self.steps, self.batch_size = scale, epochs, steps, batch_size
        self.accumulate, self.learning_rate, self.head_rate = accumulate, learning_rate, head_rate
        self.weight_decay, self.drop_path = weight_decay, drop_path
        self.warmup, self.freeze, self.width = warmup, freeze, width

    def __call__(self, backbone: Encoder, train: Labelled, val: Labelled, context: EvalContext) -> PerImage:
        masks = train.has_masks and val.has_masks
        with torch.random.fork_rng(devices=[]):  # torch's layers draw their first weights from the global generator
            torch.manual_seed(context.seed)
            detector = Detector(
                fine_tunable(backbone), len(train.classes), masks, self.width, self.drop_path, self.freeze
            )
        detector = detector.to(context.device)
        self._train(detector, train, context)
        return detect(detector.eval(), val, context, self.scale)

    def metrics(self, per_image: PerImage) -> dict[str, float]:
        return {
            f"{name} {metric}": value
            for kind, name in (("bbox", "box"), ("segm", "mask"))
            for metric, value in average_precision(per_image["truth"], per_image["found"], kind).items()
        }

    def _train(self, detector: Detector, data: Labelled, context: EvalContext) -> None:
        steps = -(-self.epochs * len(data) // self.batch_size) if self.steps is None else self.steps
        warmup = round(min(self.warmup, steps / 10)) / max(steps, 1)
        drops = tuple((share - warmup) / (1 - warmup) - 1e-9 for share in (8 / 12, 11 / 12))  # shares of all steps
        rate = warmup_then(Steps(self.learning_rate, drops), warmup, steps)
        optimizer = ScheduledAdamW(parameter_groups(detector, self.head_rate), rate, Constant(self.weight_decay))
        views = TrainingViews(data, self.scale, context.seed)

        def stream(start: int) -> Iterable[Examples]:
            draws = StepSampler(len(data), self.batch_size, steps, start, accumulate=self.accumulate)
            return training_batches(views, draws, context, _collate)

        def prepare(examples: Examples) -> DetectionBatch:
            images = [normalised(image, detector.backbone, context.device) for image in examples.pixels]
            targets = [{name: t.to(context.device) for name, t in target.items()} for target in examples.targets]
            return DetectionBatch(images, targets)

        supervised.train(
            DetectionLoss(detector), optimizer, stream, prepare, steps=steps, batch_size=self.batch_size,
            accumulate=self.accumulate, fabric=context.fabric, seed=context.seed, folder=context.folder,
            depends=(sorted(vars(self).items()), data.fingerprint),
        )  # fmt: skip


class DetectionBatch:
    """A batch on the device. A plain class: the engine would cast lists and dataclasses to bf16, boxes too."""

    def __init__(self, images: list[Tensor], targets: list[Target]) -> None:
        self.images, self.targets = images, targets


class DetectionLoss(Objective):
    """The sum of the detector's losses."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, views: DetectionBatch, time: float) -> dict[str, Tensor]:
        losses, _ = self.detector(views.images, views.targets)
        parts = {name.removeprefix("loss_"): value for name, value in losses.items()}
        return {"loss": torch.stack(list(parts.values())).sum(), **parts}


def parameter_groups(detector: Detector, head_rate: float = 1.0) -> list[dict[str, Any]]:
    """Parameters of the backbone, then of pyramid and head; of each those with weight decay, then those without:
    norms, biases, positions and CLS.
    """
    exempt = {f"backbone.vit.{name}" for name in detector.backbone.vit.no_weight_decay()}
    named = list(detector.named_parameters())
    return [
        {**group, "rate": Constant(rate)}
        for in_backbone, rate in ((True, 1.0), (False, head_rate))
        for group in split_by_decay(
            [(name, p) for name, p in named if name.startswith("backbone.") == in_backbone], exempt.__contains__
        )
    ]


# Training data


class TrainingViews(Dataset[tuple[int, Tensor, Target]]):
    """Draw -> (image index, pixels, target): a random view, a pure function of (seed, epoch, image)."""

    def __init__(self, data: Labelled, scale: int, seed: int) -> None:
        self.data, self.scale, self.seed = data, scale, seed

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, draw: Draw) -> tuple[int, Tensor, Target]:
        index = int(epoch_order(self.seed, draw.epoch, len(self.data))[draw.position])
        pixels, rng = read(self.data, index), generator(self.seed, Stream.DETECTION_CROPS, index, draw.epoch)
        view = draw_view(pixels.shape[-2], pixels.shape[-1], self.scale, rng)
        return index, *apply_view(pixels, self.data.target(index), view)


def _collate(views: list[tuple[int, Tensor, Target]]) -> Examples:
    indices, pixels, targets = zip(*views, strict=True)
    return Examples(list(pixels), list(targets), torch.tensor(indices))


# Evaluation


class _WholeImages(Dataset[tuple[Tensor, tuple[int, int]]]):
    """Images at the size of evaluation, and their own height and width."""

    def __init__(self, data: Labelled, scale: int) -> None:
        self.data, self.scale = data, scale

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, tuple[int, int]]:
        pixels = read(self.data, index)
        height, width = pixels.shape[-2:]
        return resized(pixels, *fit_size(height, width, self.scale, round(LONGEST * self.scale))), (height, width)


@torch.no_grad()
def detect(detector: Detector, data: Labelled, context: EvalContext, scale: int) -> PerImage:
    """Annotations ("truth") and detections ("found") of every image, as COCO dictionaries.

    The detector gets one image at a time: patches would see the padding of a batch.
    """
    per_image: PerImage = {"truth": [], "found": []}
    for batch in batches(_WholeImages(data, scale), context, list):
        for pixels, size in batch:
            with context.fabric.autocast():
                _, (output,) = detector([normalised(pixels, detector.backbone, context.device)])
            index = len(per_image["found"])
            detections = coco_detections(output, data, index, (pixels.shape[-2], pixels.shape[-1]), size)
            context.on_prediction(index, detections)
            per_image["found"].append(detections)
            per_image["truth"].append(coco_annotations(data, index, detector.masks))
    return per_image


def coco_detections(
    output: Target, data: Labelled, index: int, input_size: tuple[int, int], size: tuple[int, int]
) -> list[DetectedObject]:
    """The detector's output for image ``index``, as COCO result dictionaries in px of the file."""
    zoom = torch.tensor([size[1] / input_size[1], size[0] / input_size[0]], device=output["boxes"].device).repeat(2)
    boxes = (output["boxes"] * zoom).cpu()
    detections: list[DetectedObject] = [
        {
            "image_id": data.image_ids[data.indices[index]],
            "category_id": data.category_ids[label - 1],
            "bbox": to_xywh(box),
            "score": score,
        }
        for label, box, score in zip(output["labels"].tolist(), boxes, output["scores"].tolist(), strict=True)
    ]
    if "masks" in output:
        for detection, box, mask in zip(detections, boxes, output["masks"].cpu(), strict=True):
            detection["segmentation"] = to_run_lengths(pasted(mask[0], box, size))
    return detections


def coco_annotations(data: Labelled, index: int, masks: bool) -> list[Annotation]:
    """The objects of image ``index``, as COCO annotations; with masks if these are evaluated."""
    objects: Boxes = data.target(index)
    annotations: list[Annotation] = [
        {"category_id": data.category_ids[c], "bbox": to_xywh(box), "area": area, "iscrowd": int(crowd)}
        for c, box, area, crowd in zip(
            objects.classes.tolist(), objects.boxes, objects.areas.tolist(), objects.crowd.tolist(), strict=True
        )
    ]
    if masks and objects.masks is not None:
        for annotation, mask in zip(annotations, objects.masks, strict=True):
            annotation["segmentation"] = to_run_lengths(mask)
    return annotations
