"""Features of a frozen backbone: one vector per image, or one per patch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from gtsa.core.errors import UserError
from gtsa.core.types import Tokens
from gtsa.data.labels import Labelled
from gtsa.evaluation.context import EvalContext, Pooling
from gtsa.evaluation.loading import batches, central_crop, normalised, read
from gtsa.models.backbone import Backbone, Encoder


def fine_tunable(backbone: Encoder) -> Backbone:
    """The same network, for a task that trains it. Raises UserError if it cannot be trained."""
    if not isinstance(backbone, Backbone):
        raise UserError("this task fine-tunes a network, and a control has none")
    return backbone


def whole_patches(side: int, backbone: Encoder) -> int:
    """``side`` px rounded to a multiple of the patch size: 224 stays 224 for a patch of 14 or 16 px."""
    return max(1, round(side / backbone.patch_size)) * backbone.patch_size


def pooled(tokens: Tokens, pooling: Pooling) -> Tensor:
    """[N, D], or [N, 2 D] for ``both``. Raises UserError if the CLS token is requested and there is none."""
    mean = tokens.patches.mean((1, 2))
    if pooling == "mean":
        return mean
    if not tokens.prefix.shape[1]:
        raise UserError(f"--tokens {pooling}: this backbone has no CLS token; use --tokens mean")
    return tokens.prefix[:, 0] if pooling == "cls" else torch.cat([mean, tokens.prefix[:, 0]], dim=-1)


class _CentralCrops(Dataset[Tensor]):
    def __init__(self, data: Labelled, resize: int, crop: int) -> None:
        self.data, self.resize, self.crop = data, resize, crop

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Tensor:
        return central_crop(read(self.data, index), self.resize, self.crop).contiguous()


@torch.no_grad()
def tokens_of(
    backbone: Encoder,
    data: Labelled,
    context: EvalContext,
    resize: int,
    crop: int,
    which: Sequence[int] = (),
    rotations: Sequence[int] = (0,),
) -> Iterator[list[Tokens]]:
    """Batches of tokens of every image's central square, in order.

    Args:
        which: blocks to take tokens from; none: the last one.
        rotations: quarter-turns counter-clockwise of the square; the list has the blocks' tokens for each of them.
    """
    backbone.eval()
    for pixels in batches(_CentralCrops(data, resize, crop), context, default_collate):
        squares = normalised(pixels, backbone, context.device)
        with context.fabric.autocast():
            outputs = [
                tokens
                for rotation in rotations
                for tokens in backbone.blocks(torch.rot90(squares, rotation, (-2, -1)), which)
            ]
        yield [Tokens(tokens.patches.float(), tokens.prefix.float()) for tokens in outputs]


def image_features(
    backbone: Encoder, data: Labelled, context: EvalContext, resize: int = 256, crop: int = 224, blocks: int = 1
) -> Tensor:
    """One pooled vector per image and block: [images, blocks, D], the last block last, on the host.

    Each of the last ``blocks`` blocks goes through the final norm (DINOv2).
    """
    crop = whole_patches(crop, backbone)
    which = range(-blocks, 0)
    features = [
        torch.stack([pooled(tokens, context.tokens) for tokens in batch], dim=1).cpu()
        for batch in tokens_of(backbone, data, context, max(resize, crop), crop, which)
    ]
    return torch.cat(features)
