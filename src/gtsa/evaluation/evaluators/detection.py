"""Are things found, and outlined? Mask R-CNN over the ViT, trained and judged as COCO does."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from gtsa.core.errors import UserError
from gtsa.core.seeds import Stream, epoch_order, generator
from gtsa.core.types import Draw, Examples, Objective
from gtsa.data.labels import Boxes, Labelled
from gtsa.data.loader import StepSampler
from gtsa.evaluation.average_precision import average_precision, corner, encoded, pasted
from gtsa.evaluation.detection_crops import draw, fitted, seen
from gtsa.evaluation.evaluator import Evaluator, PerImage
from gtsa.evaluation.features import EvalContext, batches, fine_tunable, normalised, read, resized
from gtsa.evaluation.heads.mask_rcnn import LONGEST, Detector, Target
from gtsa.models.backbone import Encoder
from gtsa.training.optim import ScheduledAdamW
from gtsa.training.schedules import Constant, Steps, warmup_then
from gtsa.training.trainer import teach


class Detection(Evaluator):
    """Average precision of boxes, and of masks where every thing has one.

    Mask R-CNN (else Faster R-CNN) on the simple feature pyramid, with the settings of the paper at COCO's size: half of
    the images resized to 480 to 800 px, half resized to 400 to 600, cropped to 384 to 600 and resized again (DETR).

    Args:
        scale: short side in px that images are judged at and trained up to; the other sizes go with it. The long side
            is at most 1333/800 of it.
        epochs: times that every image is seen.
        steps: optimiser steps; takes the place of epochs. 0: the untrained head.
        batch_size: images a step.
        accumulate: micro-batches that a step is made of, to save memory.
        learning_rate: peak; a tenth from 8 of 12 on, a hundredth from 11 of 12 on.
        head_rate: times the learning rate, for pyramid and head: more than 1 for short trainings.
        weight_decay: none on norms, biases, positions and CLS.
        drop_path: stochastic depth of the last block.
        warmup: steps in which the learning rate rises, at most a tenth of all.
        freeze: the backbone does not learn, only pyramid and head do.
        width: channels of pyramid and head.
    """

    label_kinds = ("boxes",)
    trains_long = True
    bootstrap = False

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
                "steps not below 0"
            )
        if min(learning_rate, head_rate) <= 0:
            raise UserError("detection: learning_rate and head_rate must be above 0")
        self.scale, self.epochs, self.steps, self.batch_size = scale, epochs, steps, batch_size
        self.accumulate, self.learning_rate, self.head_rate = accumulate, learning_rate, head_rate
        self.weight_decay, self.drop_path = weight_decay, drop_path
        self.warmup, self.freeze, self.width = warmup, freeze, width

    def __call__(self, backbone: Encoder, train: Labelled, val: Labelled, lab: EvalContext) -> PerImage:
        masks = train.has_masks and val.has_masks
        with torch.random.fork_rng(devices=[]):  # the layers' own initialisation knows the global state alone
            torch.manual_seed(lab.seed)
            detector = Detector(
                fine_tunable(backbone), len(train.classes), masks, self.width, self.drop_path, self.freeze
            )
        detector = detector.to(lab.device)
        self._train(detector, train, lab)
        return judged(detector.eval(), val, lab, self.scale)

    def metrics(self, per_image: PerImage) -> dict[str, float]:
        return {
            f"{name} {figure}": value
            for kind, name in (("bbox", "box"), ("segm", "mask"))
            for figure, value in average_precision(per_image["truth"], per_image["found"], kind).items()
        }

    def _train(self, detector: Detector, data: Labelled, lab: EvalContext) -> None:
        steps = -(-self.epochs * len(data) // self.batch_size) if self.steps is None else self.steps
        warm = round(min(self.warmup, steps / 10)) / max(steps, 1)
        at = tuple((share - warm) / (1 - warm) - 1e-9 for share in (8 / 12, 11 / 12))  # of all steps, not of those left
        rate = warmup_then(Steps(self.learning_rate, at), warm, steps)
        optimizer = ScheduledAdamW(groups(detector, self.head_rate), rate, Constant(self.weight_decay))
        scenes = Scenes(data, self.scale, lab.seed)

        def stream(start: int) -> Iterable[Examples]:
            return DataLoader(
                scenes,
                batch_sampler=StepSampler(len(data), self.batch_size, steps, start, accumulate=self.accumulate),
                num_workers=lab.workers,
                collate_fn=_together,
                generator=torch.Generator().manual_seed(0),
                timeout=600 if lab.workers else 0,
            )

        def prepare(examples: Examples) -> Lesson:
            images = [normalised(image, detector.backbone, lab.device) for image in examples.pixels]
            targets = [{name: t.to(lab.device) for name, t in target.items()} for target in examples.targets]
            return Lesson(images, targets)

        teach(
            Task(detector), optimizer, stream, prepare, steps=steps, batch_size=self.batch_size, fabric=lab.fabric,
            accumulate=self.accumulate, seed=lab.seed, folder=lab.folder,
            depends=(sorted(vars(self).items()), data.fingerprint),
        )  # fmt: skip


class Lesson:
    """A batch on the device. A plain class: the engine would cast what a list or dataclass holds to bf16, boxes too."""

    def __init__(self, images: list[Tensor], targets: list[Target]) -> None:
        self.images, self.targets = images, targets


class Task(Objective):
    """The sum of the detector's losses."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, views: Lesson, time: float) -> dict[str, Tensor]:
        losses, _ = self.detector(views.images, views.targets)
        parts = {name.removeprefix("loss_"): value for name, value in losses.items()}
        return {"loss": torch.stack(list(parts.values())).sum(), **parts}


def groups(detector: Detector, head_rate: float = 1.0) -> list[dict[str, Any]]:
    """What learns: backbone, then pyramid and head; of each the weights, which are decayed, and then norms, biases,
    positions and CLS, which are not.
    """
    spared = {f"backbone.vit.{name}" for name in detector.backbone.vit.no_weight_decay()}
    found: dict[tuple[bool, bool], list[Any]] = {
        (head, decayed): [] for head in (False, True) for decayed in (True, False)
    }
    for name, parameter in detector.named_parameters():
        if parameter.requires_grad:
            decayed = parameter.ndim > 1 and name not in spared
            found[not name.startswith("backbone."), decayed].append(parameter)
    return [
        {"params": parameters, "decayed": decayed, "rate": Constant(head_rate if head else 1.0)}
        for (head, decayed), parameters in found.items()
    ]


# What it is trained on


class Scenes(Dataset[tuple[int, Tensor, Target]]):
    """Images and targets to learn from: each is a pure function of (seed, epoch, image)."""

    def __init__(self, data: Labelled, scale: int, seed: int) -> None:
        self.data, self.scale, self.seed = data, scale, seed

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, place: Draw) -> tuple[int, Tensor, Target]:
        index = int(epoch_order(self.seed, place.epoch, len(self.data))[place.place])
        pixels, rng = read(self.data, index), generator(self.seed, Stream.VIEWS, index, place.epoch)
        view = draw(pixels.shape[-2], pixels.shape[-1], self.scale, rng)
        return index, *seen(pixels, self.data.target(index), view)


def _together(scenes: list[tuple[int, Tensor, Target]]) -> Examples:
    indices, pixels, targets = zip(*scenes, strict=True)
    return Examples(list(pixels), list(targets), torch.tensor(indices))


# How it is judged


class _Whole(Dataset[tuple[Tensor, tuple[int, int]]]):
    """Images at the size that they are judged at, and their own height and width."""

    def __init__(self, data: Labelled, scale: int) -> None:
        self.data, self.scale = data, scale

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, tuple[int, int]]:
        pixels = read(self.data, index)
        height, width = pixels.shape[-2:]
        return resized(pixels, *fitted(height, width, self.scale, round(LONGEST * self.scale))), (height, width)


@torch.no_grad()
def judged(detector: Detector, data: Labelled, lab: EvalContext, scale: int) -> PerImage:
    """What is there and what is found in every image, as COCO dictionaries.

    Images go by one at a time: what pads a batch to one size would be seen by the others' patches.
    """
    per_image: PerImage = {"truth": [], "found": []}
    for batch in batches(_Whole(data, scale), lab, list):
        for pixels, size in batch:
            with lab.fabric.autocast():
                _, (result,) = detector([normalised(pixels, detector.backbone, lab.device)])
            index = len(per_image["found"])
            found = results(result, data, index, tuple(pixels.shape[-2:]), size)
            lab.on_prediction(index, found)
            per_image["found"].append(found)
            per_image["truth"].append(truth(data, index, detector.masks))
    return per_image


def results(
    result: Target, data: Labelled, index: int, judged_at: tuple[int, int], size: tuple[int, int]
) -> list[dict[str, Any]]:
    """What the detector found, as COCO result dictionaries in px of the file."""
    zoom = torch.tensor([size[1] / judged_at[1], size[0] / judged_at[0]], device=result["boxes"].device).repeat(2)
    boxes = (result["boxes"] * zoom).cpu()
    found: list[dict[str, Any]] = [
        {
            "image_id": data.image_ids[data.places[index]],
            "category_id": data.category_ids[label - 1],
            "bbox": corner(box),
            "score": score,
        }
        for label, box, score in zip(result["labels"].tolist(), boxes, result["scores"].tolist(), strict=True)
    ]
    if "masks" in result:
        for entry, box, mask in zip(found, boxes, result["masks"].cpu(), strict=True):
            entry["segmentation"] = encoded(pasted(mask[0], box, size))
    return found


def truth(data: Labelled, index: int, masks: bool) -> list[dict[str, Any]]:
    """What there is, as COCO annotations; with masks where they are judged."""
    things: Boxes = data.target(index)
    there: list[dict[str, Any]] = [
        {"category_id": data.category_ids[c], "bbox": corner(box), "area": area, "iscrowd": int(crowd)}
        for c, box, area, crowd in zip(
            things.classes.tolist(), things.boxes, things.areas.tolist(), things.crowd.tolist(), strict=True
        )
    ]
    if masks and things.masks is not None:
        for entry, mask in zip(there, things.masks, strict=True):
            entry["segmentation"] = encoded(mask)
    return there
