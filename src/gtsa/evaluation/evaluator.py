"""What an evaluation is. Each file in evaluators/ is one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from gtsa.data.labels import Kind, Labelled
from gtsa.evaluation.features import EvalContext
from gtsa.models.backbone import Encoder

PerImage = dict[str, Any]  # results by name: tensors [images, ...], or lists with an entry for each image


class Evaluator(ABC):
    """One question about an encoder. Its settings are its constructor's keyword arguments, of plain types.

    It answers in two steps, so that folds can be joined and intervals be estimated: results of every image, and
    metrics that follow from the results of any set of images.
    """

    label_kinds: ClassVar[tuple[Kind, ...]] = ("classes",)  # that it can take, the usual one first
    uses_train_set: ClassVar[bool] = True
    trains_long: ClassVar[bool] = False  # then all images are decoded once before it starts
    bootstrap: ClassVar[bool] = True  # whether metrics of random choices of images are quick and meaningful

    @abstractmethod
    def __call__(self, backbone: Encoder, train: Labelled, val: Labelled, lab: EvalContext) -> PerImage:
        """Results of the images of ``val``, in their order.

        Args:
            backbone: on the device, in evaluation mode; it is left as it is.
            train: empty where the evaluator uses no training set.
            lab: device, seed, batch size, workers.
        """

    @abstractmethod
    def metrics(self, per_image: PerImage) -> dict[str, float]:
        """Metrics, in per cent where they are shares; the first one is the one to compare by."""

    def per_class(self, per_image: PerImage) -> dict[str, list[float]]:
        """Metrics of each class, in the order of the classes; NaN where no image says anything of it."""
        return {}
