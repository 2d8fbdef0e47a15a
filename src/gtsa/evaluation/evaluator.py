"""The interface of an evaluation. Each file in evaluators/ implements one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from gtsa.data.labels import Kind, Labelled
from gtsa.evaluation.context import EvalContext
from gtsa.models.backbone import Encoder

PerImage = dict[str, Any]  # results by name: tensors [images, ...], or lists with one entry per image


class Evaluator(ABC):
    """One evaluation of an encoder. Its settings are its constructor's keyword arguments, of plain types.

    It works in two steps, so that folds can be joined and intervals estimated: results of every image, then metrics
    computed from the results of any set of images.
    """

    label_kinds: ClassVar[tuple[Kind, ...]] = ("classes",)  # that it accepts, the usual one first
    uses_train_set: ClassVar[bool] = True
    trains_long: ClassVar[bool] = False  # if so, all images are decoded once before it starts
    not_compiled: ClassVar[str] = "nothing is trained"  # why --compile has no effect; "": it compiles the training
    bootstrap: ClassVar[bool] = True  # whether metrics of random choices of images are quick and meaningful
    other_metrics: ClassVar[Mapping[str, str]] = {}  # those that are no shares in per cent: what each of them is

    @abstractmethod
    def __call__(self, backbone: Encoder, train: Labelled, val: Labelled, context: EvalContext) -> PerImage:
        """Results of the images of ``val``, in their order.

        Args:
            backbone: on the device, in evaluation mode; it is not changed.
            train: empty if the evaluator uses no training set.
            context: device, seed, batch size, workers.
        """

    @abstractmethod
    def metrics(self, per_image: PerImage) -> dict[str, float]:
        """Metrics, shares in per cent but for ``other_metrics``; the first one is the primary metric."""

    def per_class(self, per_image: PerImage) -> dict[str, list[float]]:
        """Metrics of each class, in the order of the classes; NaN for a class that no image shows."""
        return {}
