"""What a frozen backbone makes of images: one vector an image, or one a patch. And the lab where that is done."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from gtsa.core.errors import UserError, escaped
from gtsa.core.types import Tokens
from gtsa.data.labels import Labelled
from gtsa.data.pixels import BadImage
from gtsa.models.backbone import Backbone, Encoder

Pooling = Literal["mean", "cls", "both"]


def _nothing(index: int, prediction: Any) -> None:
    return None


@dataclass
class EvalContext:
    """Where an evaluation is done.

    Attributes:
        fabric: the engine; ``fabric.device`` is where the backbone lies.
        tokens: what one vector an image is made of: the mean of the patch tokens (GTSA trains no CLS token), the CLS
            token, or both side by side.
        seed: every draw follows from it.
        batch_size: images that go through the frozen backbone at once.
        workers: processes that read images.
        folder: where a long training keeps its checkpoints; None: it keeps none.
        on_prediction: called with (index in ``val``, prediction) for every prediction; for --predictions.
    """

    fabric: Fabric
    tokens: Pooling = "mean"
    seed: int = 0
    batch_size: int = 32
    workers: int = 0
    folder: Path | None = None
    on_prediction: Callable[[int, Any], None] = _nothing

    @property
    def device(self) -> torch.device:
        return self.fabric.device


def read(data: Labelled, index: int) -> Tensor:
    """Image number ``index``, uint8 [3, H, W]. Raises UserError (3), which names it, where it cannot be read."""
    try:
        return data.read(index)
    except BadImage as reason:
        way = "take it out of the folder" if data.kind == "none" else "take it out of the labels"
        raise UserError(
            f"{escaped(data.name(index))}: {reason}; an evaluation needs every image that it is given: mend it, or "
            f"{way}",
            3,
        ) from None


def resized(pixels: Tensor, height: int, width: int) -> Tensor:
    """uint8 [3, H, W] -> uint8 [3, height, width], bicubic with antialiasing."""
    if pixels.shape[-2:] == (height, width):
        return pixels
    return F.interpolate(pixels[None], (height, width), mode="bicubic", antialias=True)[0]


def centre(pixels: Tensor, resize: int, crop: int) -> Tensor:
    """The usual view of an image for classification: short side to ``resize``, then the central ``crop`` px square."""
    height, width = pixels.shape[-2:]
    scale = resize / min(height, width)
    pixels = resized(pixels, max(resize, round(height * scale)), max(resize, round(width * scale)))
    top, left = ((side - crop) // 2 for side in pixels.shape[-2:])
    return pixels[:, top : top + crop, left : left + crop]


def fine_tunable(backbone: Encoder) -> Backbone:
    """The same network, for a task that trains it. Raises UserError where it cannot be trained."""
    if not isinstance(backbone, Backbone):
        raise UserError("this task fine-tunes a network, and a control is none")
    return backbone


def normalised(pixels: Tensor, backbone: Encoder, device: torch.device) -> Tensor:
    """uint8 [N, 3, H, W] -> floats as the backbone was trained on, on ``device``."""
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in backbone.normalisation)
    return (pixels.to(device, non_blocking=True).float() / 255 - mean) / std


def whole_patches(side: int, backbone: Encoder) -> int:
    """``side`` px rounded to a multiple of the backbone's patch: 224 stays 224 for a patch of 14 or 16."""
    return max(1, round(side / backbone.patch_size)) * backbone.patch_size


def pooled(tokens: Tokens, how: Pooling) -> Tensor:
    """[N, D] (2 D where it is both). Raises UserError where a CLS token is asked for and there is none."""
    mean = tokens.patches.mean((1, 2))
    if how == "mean":
        return mean
    if not tokens.prefix.shape[1]:
        raise UserError(f"--tokens {how}: this backbone has no CLS token; use --tokens mean")
    return tokens.prefix[:, 0] if how == "cls" else torch.cat([mean, tokens.prefix[:, 0]], dim=-1)


class _Centres(Dataset[Tensor]):
    def __init__(self, data: Labelled, resize: int, crop: int) -> None:
        self.data, self.resize, self.crop = data, resize, crop

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Tensor:
        return centre(read(self.data, index), self.resize, self.crop).contiguous()


def batches(
    dataset: Dataset[Any], lab: EvalContext, collate: Callable[[list[Any]], Any] | None = None
) -> Iterator[Any]:
    """The items of a dataset in order, for a frozen backbone. Raises UserError (3), which names the image."""
    loader = DataLoader(
        dataset,
        lab.batch_size,
        num_workers=lab.workers,
        collate_fn=collate,
        pin_memory=lab.device.type == "cuda",
        generator=torch.Generator().manual_seed(0),  # iter() would draw from the global one
        timeout=600 if lab.workers else 0,
    )
    try:
        yield from loader
    except UserError as remedy:  # raised in a worker, it arrives with the worker's traceback in its text
        raise UserError(str(remedy).rsplit("UserError: ", 1)[-1].strip(), 3) from None


@torch.no_grad()
def tokens_of(
    backbone: Encoder,
    data: Labelled,
    lab: EvalContext,
    resize: int,
    crop: int,
    which: Sequence[int] = (),
    rotations: Sequence[int] = (0,),
) -> Iterator[list[Tokens]]:
    """Batches of tokens of the central square of every image, in order: for each of the blocks ``which``, or the last.

    All of it for each of ``rotations``: quarter-turns counter-clockwise of the square that the backbone sees.
    """
    backbone.eval()
    for pixels in batches(_Centres(data, resize, crop), lab):
        squares = normalised(pixels, backbone, lab.device)
        with lab.fabric.autocast():
            found = [
                tokens for turn in rotations for tokens in backbone.blocks(torch.rot90(squares, turn, (-2, -1)), which)
            ]
        yield [Tokens(tokens.patches.float(), tokens.prefix.float()) for tokens in found]


def image_features(
    backbone: Encoder, data: Labelled, lab: EvalContext, resize: int = 256, crop: int = 224, blocks: int = 1
) -> Tensor:
    """One vector an image, pooled as the lab says: [images, blocks, D], the last block last, on the host.

    Each of the last ``blocks`` blocks goes through the final norm (DINOv2).
    """
    crop = whole_patches(crop, backbone)
    which = range(-blocks, 0)
    found = [
        torch.stack([pooled(tokens, lab.tokens) for tokens in batch], dim=1).cpu()
        for batch in tokens_of(backbone, data, lab, max(resize, crop), crop, which)
    ]
    return torch.cat(found)
