"""Patch tokens of a frozen network on disk: several tasks on the same images run it once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from gtsa.evaluation.feature_cache import FeatureCache


class TokenCache:
    """Patch tokens by the pixels that the network sees: another size or a rotation is another entry.

    Tokens are rounded to half precision, those that are computed now like those that are read, so a result does not
    depend on which they were.

    Args:
        folder: of one network in one precision. It needs 2 D bytes a patch.

    Raises:
        OSError: the folder cannot be made or read.
    """

    def __init__(self, folder: Path) -> None:
        self._features = FeatureCache(folder)

    def __call__(self, compute: Callable[[Tensor], Tensor], pixels: Tensor) -> Tensor:
        """Tokens [N, h, w, D] of normalised pixels [N, 3, H, W]; ``compute`` gets those that are not known yet.

        Raises:
            OSError: they cannot be written.
        """
        shape = repr(tuple(pixels.shape[1:])).encode()
        keys = [hashlib.sha256(shape + image.tobytes()).hexdigest() for image in pixels.float().cpu().numpy()]
        new = [index for index, key in enumerate(keys) if key not in self._features]
        if new:
            tokens = compute(pixels[new]).half().cpu()
            self._features.add({keys[index]: image for index, image in zip(new, tokens, strict=True)})
        return torch.stack([self._features.read(key) for key in keys]).to(pixels.device).float()
