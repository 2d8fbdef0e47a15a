"""The vocabulary: crops with their boxes, tokens, methods. No logic."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn


class Draw(NamedTuple):
    """A position in the endless stream of images. Its views are a pure function of (seed, epoch, image)."""

    epoch: int
    position: int  # in the order of the epoch


class Replaced(NamedTuple):
    """An image that could not be read during training, the reason, and the image used instead."""

    image: int
    reason: str
    by: int


class Colour(IntEnum):
    """Columns of a colour recipe."""

    BRIGHTNESS = 0
    CONTRAST = 1
    SATURATION = 2
    HUE = 3
    ORDER = 4  # 0 to 23: permutation of the four above; -1: none of them
    GRAYSCALE = 5  # 1: greyscale
    SIGMA = 6  # of the Gaussian blur in px; 0: none
    SOLARIZE = 7  # 1: the brighter half of the values is inverted


@dataclass(frozen=True)
class Crops:
    """``n`` square crops of ``S`` px a side for each of ``B`` images."""

    pixels: Tensor  # [B, n, 3, S, S]; uint8 as cut, normalised floats after augmentation
    boxes: Tensor  # [B, n, 4] float64: x1, y1, x2, y2 in the image, px
    rotations: Tensor  # [B, n] int64: quarter-turns counter-clockwise, 0 to 3
    colours: Tensor  # [B, n, len(Colour)] float32: colour recipe, applied by augment.apply

    def each(self, change: Callable[[Tensor], Tensor]) -> Crops:
        """The same crops with ``change`` applied to every tensor, e.g. moved to a device."""
        return Crops(change(self.pixels), change(self.boxes), change(self.rotations), change(self.colours))

    @property
    def count(self) -> int:
        return self.pixels.shape[1]

    @property
    def side(self) -> int:
        return self.pixels.shape[-1]


class Uncut(NamedTuple):
    """Images whose crops are still to be cut, on the training device."""

    pixels: Tensor  # [B, H, W, 3] uint8, smaller images padded at the right and below
    mirrored: list[Tensor]  # by size of the crops: [B, n] bool


class Views:
    """All views of a batch: global crops (seen by student and teacher) and local crops (student only).

    Not a dataclass: Fabric casts the tensors in dataclasses, and boxes must stay float64.
    """

    def __init__(
        self,
        global_crops: Crops,
        local_crops: Crops | None = None,
        images: Tensor | None = None,
        replaced: Sequence[Replaced] = (),
        uncut: Uncut | None = None,
    ) -> None:
        self.uncut = uncut  # then the crops' pixels have no channels yet: [B, n, 0, S, S]
        self.global_crops, self.local_crops = global_crops, local_crops
        self.images = torch.empty(0, dtype=torch.int64) if images is None else images  # [B]: image of each row
        self.replaced = list(replaced)

    @classmethod
    def of(
        cls,
        groups: Sequence[Crops],
        images: Tensor | None = None,
        replaced: Sequence[Replaced] = (),
        uncut: Uncut | None = None,
    ) -> Views:
        """From crops by size: global crops, then local crops if any."""
        return cls(groups[0], groups[1] if len(groups) > 1 else None, images, replaced, uncut)

    def each(self, change: Callable[[Crops], Crops]) -> Views:
        """The same views with ``change`` applied to the crops of every size."""
        return Views.of([change(crops) for crops in self.groups], self.images, self.replaced, self.uncut)

    def pin_memory(self) -> Views:
        """Called by torch's DataLoader."""
        pinned = self.each(lambda crops: crops.each(lambda tensor: tensor.pin_memory()))
        if self.uncut is not None:
            pinned.uncut = Uncut(self.uncut.pixels.pin_memory(), [part.pin_memory() for part in self.uncut.mirrored])
        return pinned

    @property
    def groups(self) -> tuple[Crops, ...]:
        """The crops by size: global crops, then local crops if any."""
        return (self.global_crops,) if self.local_crops is None else (self.global_crops, self.local_crops)


@dataclass
class Examples:
    """A batch of images with their targets, for a supervised Objective."""

    pixels: Any  # [B, 3, H, W], or a list where sizes differ
    targets: Any
    images: Tensor  # [B]: image of each row
    replaced: Sequence[Replaced] = ()


class Tokens(NamedTuple):
    """The output of a ViT for ``N`` images: a map of patch tokens, and the prefix tokens (CLS, registers)."""

    patches: Tensor  # [N, h, w, D]
    prefix: Tensor  # [N, p, D], p may be 0


class Objective(nn.Module, ABC):
    """A module that the loop can train. ``time`` runs from 0 to 1 over the whole run."""

    legend: str = ""  # what the parts of the loss are, with their best value or chance; shown once, above the progress

    @abstractmethod
    def forward(self, views: Any, time: float) -> dict[str, Tensor]:
        """Returns {"loss": scalar, and scalar parts for the log}; every part is a mean over the batch.

        ``views`` are Views for a method, Examples for a probe.
        """

    def after_step(self, time: float, next_time: float, accepted: Tensor) -> None:
        """Called after each optimiser step with its time and that of the next one.

        ``accepted`` is a 0/1 scalar on the device: 0 if the step was skipped for a non-finite number.
        """


class GivenWeights(NamedTuple):
    """Weights that a method reads, and that are no part of a checkpoint: a run that resumes must find the same."""

    fingerprint: str
    loaded: str  # how many of their tensors were loaded, for the user


class Method(Objective):
    """A self-supervised method: an Objective with a student and a teacher encoder.

    Its settings are its constructor's keyword arguments after the encoder, of plain types.
    """

    published_settings: ClassVar[Mapping[str, Any]] = {}  # settings of the paper that differ from the defaults
    base_lr: ClassVar[float] = 5e-4  # published peak learning rate for a batch of 256
    search_space: ClassVar[Mapping[str, Sequence[Any]]] = {}  # values that trials draw settings from
    min_views: ClassVar[int] = 2  # views of an image
    min_images: ClassVar[int] = 1  # images of a micro-batch on a device, e.g. 2 for batch norm
    min_images_with: ClassVar[Mapping[str, int | Mapping[str, int]]] = {}  # where a setting is above 0, or has a value
    auto_settings: ClassVar[Mapping[str, Callable[[int], Any]]] = {}  # values of auto settings, by the number of images
    idle_settings: ClassVar[Mapping[str, Mapping[str, Sequence[Any]]]] = {}  # without effect beside such values
    needs_overlap: ClassVar[bool] = False  # crops must overlap and must not be mirrored
    given_weights: ClassVar[Sequence[str]] = ()  # settings that name weights which the method reads; they are required

    @property
    def given(self) -> Mapping[str, GivenWeights]:
        """The weights that each of ``given_weights`` names."""
        return {}

    @property
    @abstractmethod
    def encoders(self) -> Mapping[str, nn.Module]:
        """{"teacher": Backbone, "student": Backbone}; twice the student if the method has no teacher."""

    @abstractmethod
    def diagnose(self, views: Views) -> dict[str, Tensor]:
        """Label-free metrics of held-out views, per image: {name: [B]}; higher is better, chance is 0.

        The verdict is on the first one. pretraining.verdict has the text for each.
        """


@dataclass
class StepResult:
    """The result of a step. ``parts`` stay on the device until they are read."""

    step: int  # number of finished steps: 1 after the first
    parts: dict[str, Tensor]
    seconds: float  # of the whole step
    waited: float  # seconds of these spent waiting for data
    replaced: list[Replaced] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)  # images of the previous step if it was skipped
    shared: Tensor | None = None  # of several processes: how many have a request to stop, and how many a replaced image
