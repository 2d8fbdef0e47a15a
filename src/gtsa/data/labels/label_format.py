"""The interface of a label format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from gtsa.data.labels.labelled import Kind, Labelled


@dataclass(frozen=True)
class LabelOptions:
    """What the user states about labels.

    Attributes:
        ignore: mask value of pixels without a class.
        reduce_zero_label: mask value 0 stands for no class; classes begin with 1.
        classes: file with the class names in order, one a line.
    """

    ignore: int | None = None
    reduce_zero_label: bool = False
    classes: str | None = None


class LabelFormat(ABC):
    """A format of labels. It has no state: both methods are static.

    Attributes:
        needs: for each kind of labels that the format can hold, what the user has to give, in a few words.
    """

    needs: ClassVar[dict[Kind, str]]

    @staticmethod
    @abstractmethod
    def claims(images: str, labels: str | None, kind: Kind) -> bool:
        """Whether ``labels`` are in this format, and it has labels of this kind."""

    @staticmethod
    @abstractmethod
    def read(images: str, labels: str, kind: Kind, options: LabelOptions) -> Labelled:
        """Reads and checks all labels; ``labels`` is empty where the images' own folder holds them.

        Raises:
            UserError: the labels are wrong (3); one message reports every fault.
        """
