"""Any torch Dataset whose items are images, for use from Python."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from gtsa.core.errors import UserError
from gtsa.data.images.pixels import BadImage, as_rgb
from gtsa.data.sources import ALL, Detail, Progress, Selection


class Items:
    """A map-style dataset of PIL images, uint8 arrays [H, W, 3] or tensors [3, H, W], or of tuples with one first.

    An item of another type, or one that raises an error, is left out with the reason.
    """

    def __init__(
        self,
        dataset: Any,
        selection: Selection = ALL,
        files: Sequence[str] | None = None,
        progress: Progress | None = None,
    ) -> None:
        if selection.include or selection.exclude:
            raise UserError("include and exclude select files by name: leave items out of the dataset itself")
        if not hasattr(dataset, "__len__"):
            raise UserError(f"{type(dataset).__name__} has no length: give a map-style dataset", 3)
        self.dataset, self.range16 = dataset, selection.range16
        self.items = [int(name.removeprefix("item ")) for name in files] if files is not None else range(len(dataset))
        self.ignored: dict[str, int] = {}
        self.unreadable: list[tuple[str, str]] = []
        self.outside: list[tuple[str, str]] = []

    @staticmethod
    def claims(data: object) -> bool:
        return isinstance(data, Dataset) or (
            hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, str | bytes)
        )

    def __len__(self) -> int:
        return len(self.items)

    def name(self, index: int) -> str:
        return f"item {self.items[index]}"

    def size(self, index: int) -> int:
        return 0

    def path(self, index: int) -> None:
        return None

    def file(self, index: int) -> None:
        return None

    def read(self, index: int, detail: Detail | None = None) -> Tensor:
        try:
            item = self.dataset[self.items[index]]
        except Exception as error:
            raise BadImage(f"the dataset raised {type(error).__name__}: {error}") from None
        if isinstance(item, tuple | list) and item:
            item = item[0]
        if isinstance(item, Image.Image):
            try:
                return torch.from_numpy(as_rgb(item, self.range16).copy()).permute(2, 0, 1)
            except BadImage:
                raise
            except Exception as error:  # a file that the dataset opened but did not decode
                raise BadImage(f"damaged: {error}") from None
        if isinstance(item, np.ndarray) and item.dtype == np.uint8 and item.ndim == 3 and item.shape[-1] == 3:
            return torch.from_numpy(item.copy()).permute(2, 0, 1)  # it may be read-only or have negative strides
        if isinstance(item, Tensor) and item.dtype == torch.uint8 and item.ndim == 3 and item.shape[0] == 3:
            return item
        shape = tuple(getattr(item, "shape", ()))
        raise BadImage(
            f"a {type(item).__name__} {shape or ''}: give PIL images, uint8 [H, W, 3] arrays or [3, H, W] tensors"
        )
