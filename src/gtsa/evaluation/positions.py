"""What patch tokens tell of their positions: by a linear map, and by their mean at each position."""

from __future__ import annotations

import torch
from torch import Tensor

from gtsa.evaluation.evaluator import PerImage
from gtsa.evaluation.ridge import predict


def with_positions(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Patch tokens [B, h, w, D] as [B, h * w, D], and their rows and columns [B, h * w, 2], from -1 to 1."""
    rows, columns = (torch.linspace(-1, 1, n, device=patches.device) for n in patches.shape[1:3])
    positions = torch.cartesian_prod(rows, columns)
    return patches.flatten(1, 2), positions.expand(len(patches), *positions.shape)


def position_errors(patches: Tensor, position_map: Tensor) -> PerImage:
    """Squared errors of predicted positions, and squares of the positions, summed over each image's patches."""
    tokens, truth = with_positions(patches)
    error = (predict(tokens, position_map) - truth).square().sum((1, 2))
    return {"squared error": error, "squares": truth.double().square().sum((1, 2))}  # their mean is 0


def position_r2(per_image: PerImage) -> float:
    """Share of the variance of rows and columns that is predicted."""
    return 1 - float(per_image["squared error"].double().sum() / per_image["squares"].double().sum())


class PositionMeans:
    """The mean token at each position over images, and over all positions."""

    def __init__(self) -> None:
        self._sum = torch.zeros(())
        self._images = 0

    def add(self, patches: Tensor) -> None:
        """Adds B images: patch tokens [B, h, w, D]."""
        self._sum = self._sum.to(patches.device) + patches.double().sum(0)
        self._images += len(patches)

    @property
    def at_positions(self) -> Tensor:
        """[h, w, D] float64."""
        return self._sum / self._images

    @property
    def overall(self) -> Tensor:
        """[D] float64."""
        return self.at_positions.mean((0, 1))

    @property
    def offsets(self) -> Tensor:
        """What each position adds to the mean of all tokens, [h, w, D] float32."""
        return (self.at_positions - self.overall).float()

    def errors(self, patches: Tensor) -> PerImage:
        """Squared distances from the mean at each position and from the mean of all, summed over each image."""
        tokens = patches.double()
        return {
            "from position mean": (tokens - self.at_positions).square().sum((1, 2, 3)),
            "from mean": (tokens - self.overall).square().sum((1, 2, 3)),
        }


def position_bias(per_image: PerImage) -> float:
    """Share of the variance of tokens that the mean token at each position explains. Below 0: it explains nothing.

    The means are those of other images, so that chance explains nothing.
    """
    total = per_image["from mean"].double().sum().clamp(min=1e-30)  # 0 of tokens that are all alike
    return 1 - float(per_image["from position mean"].double().sum() / total)
