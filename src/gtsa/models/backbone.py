"""Vision transformers from timm. They are used through patch grid and number of prefix tokens, never by class."""

from __future__ import annotations

import difflib
import functools
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast

import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torch.func import functional_call

from gtsa.core.errors import UserError
from gtsa.core.types import Tokens
from gtsa.data.images.pixels import Range
from gtsa.models import vit as packed
from gtsa.models.transform import FULL_RANGE, Picture, as_image, eval_transform, input_size

GRIDS = 16  # grids whose matrix of resampled positions is cached
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean, standard deviation of pixels in [0, 1]


class Encoder(nn.Module, ABC):
    """The interface of a network for evaluations: normalised images [N, C, H, W] -> Tokens."""

    normalisation: tuple[tuple[float, ...], tuple[float, ...]]  # mean and deviation a channel, of pixels in [0, 1]
    range16: Range = FULL_RANGE  # of the images in training

    @property
    @abstractmethod
    def embed_dim(self) -> int: ...

    @property
    @abstractmethod
    def patch_size(self) -> int:
        """Side of a patch, px."""

    @property
    @abstractmethod
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches: CLS and registers."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 of all weights, 16 digits. It does not depend on the file format."""

    @abstractmethod
    def forward(self, images: Tensor) -> Tokens: ...

    @abstractmethod
    def blocks(self, images: Tensor, which: Sequence[int] = (), norm: bool = True) -> list[Tokens]:
        """Tokens after some of the blocks."""


class Backbone(Encoder):
    """A timm ViT of any width, depth and patch size: images [N, C, H, W] -> Tokens.

    Args:
        model: timm name of a plain vision transformer, e.g. ``vit_small_patch16_224``. The weights are untrained.
        image_size: side in px of the position embeddings' grid; for other sizes they are resampled.
        drop_path: stochastic depth of the last block, linear from 0 at the first.
        normalisation: mean and standard deviation per channel, of pixels in [0, 1], that images are normalised with.
        arguments: further arguments of timm's constructor, e.g. ``{"depth": 6}``.

    Raises:
        UserError: the name is unknown, the model is no plain ViT, or the size is no multiple of the patch.
    """

    def __init__(
        self,
        model: str,
        image_size: int = 224,
        drop_path: float = 0.0,
        normalisation: tuple[tuple[float, ...], tuple[float, ...]] = IMAGENET,
        arguments: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.arguments = {"img_size": image_size, **(arguments or {})}
        self.normalisation = normalisation
        self.pooling: Literal["mean", "cls"] = "mean"  # how tokens become one vector an image, as trained
        self.vit = _create(model, drop_path_rate=drop_path, **self.arguments)
        self.plain = packed.is_plain(self.vit)  # sharding changes the classes of blocks later
        self.recompute = False  # keep only the input of each block for the backward pass (activation checkpointing)
        self._resamplers: dict[tuple[int, int, torch.device, torch.dtype], Tensor] = {}

    @property
    def embed_dim(self) -> int:
        return cast(int, self.vit.num_features)

    @property
    def patch_size(self) -> int:
        return cast(int, self.vit.patch_embed.patch_size[0])

    @property
    def num_prefix_tokens(self) -> int:
        return cast(int, self.vit.num_prefix_tokens)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all weights, 16 digits. It does not depend on the file format."""
        digest = hashlib.sha256()
        for key, value in sorted(self.vit.state_dict().items()):
            digest.update(key.encode() + value.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def forward(self, images: Tensor) -> Tokens:
        return self.side_by_side([images])[0]

    def side_by_side(
        self, groups: Sequence[Tensor], hidden: Sequence[Tensor | None] = (), token: Tensor | None = None
    ) -> list[Tokens]:
        """Tokens of images of several sizes, in one pass: norms and matrix products take the rows of all sizes.

        Args:
            groups: images [N, C, H, W] of each size.
            hidden: for each size, bool [N, h, w] of patches that ``token`` [D] replaces before positions are added.
        """
        hidden = hidden or [None] * len(groups)
        grids = [self._grid(images) for images in groups]
        if self.plain:
            embedded = [self._embed(*each, token) for each in zip(groups, hidden, strict=True)]
            outputs = packed.forward(self.vit, embedded, self.recompute)
        else:
            self.vit.set_grad_checkpointing(self.recompute)
            outputs = [self._whole(*each, token) for each in zip(groups, hidden, strict=True)]
        return [self._tokens(x, grid) for x, grid in zip(outputs, grids, strict=True)]

    def pooled(self, tokens: Tokens) -> Tensor:
        """One vector an image [N, D], as trained: the mean of the patch tokens, or the CLS token."""
        return tokens.prefix[:, 0] if self.pooling == "cls" else tokens.patches.mean((1, 2))

    def transform(self, image: Picture, size: int | tuple[int, int] | None = None) -> Tensor:
        """The input of one image: normalised floats [3, H, W], as timm's evaluation transform gives them.

        Args:
            image: a path, a PIL image, or a uint8 tensor [3, height, width].
            size: side, or height and width, px: multiples of the patch; None: that of the position embeddings' grid.

        Raises:
            UserError: the image cannot be read (3), or is nothing of these; the size is none of these (2).
        """
        size = self.arguments["img_size"] if size is None else size
        sides = input_size((size,) if isinstance(size, int) else size, self.patch_size)
        return eval_transform(sides, self.normalisation)(as_image(image, self.range16))

    def visible(self, images: Tensor, chosen: Tensor) -> Tensor:
        """The last block's tokens of some patches alone; the network does not see the others: [N, prefix + k, D].

        Args:
            chosen: [N, k] indices of patches, row by row; each keeps its position embedding.

        Raises:
            UserError: the model cannot leave patches out.
        """
        if not self.plain:
            raise UserError(f"{self.model} cannot leave patches out; choose a plain ViT, e.g. vit_small_patch16_224")
        tokens = self._embed(images)
        prefix, patches = tokens[:, : self.num_prefix_tokens], tokens[:, self.num_prefix_tokens :]
        patches = patches.gather(1, chosen[..., None].expand(-1, -1, tokens.shape[-1]))
        return packed.forward(self.vit, [torch.cat([prefix, patches], dim=1)], self.recompute)[0]

    def layers(self, decay: float) -> list[tuple[float, dict[str, Any]]]:
        """Parameter groups by layer, each with its scale of the learning rate (1 for the last block).

        The scale of a block is that of the next block times ``decay``. timm puts the final norm with the last block,
        and positions and CLS with the patch embedding. Weight decay (``decayed``) spares these, norms and biases.
        """
        groups = param_groups_layer_decay(self.vit, 1.0, self.vit.no_weight_decay(), layer_decay=decay)
        return [(g["lr_scale"], {"params": g["params"], "decayed": g["weight_decay"] > 0}) for g in groups]

    def blocks(self, images: Tensor, which: Sequence[int] = (), norm: bool = True) -> list[Tokens]:
        """Tokens after some of the blocks, numbered from 0 (-1: the last).

        Args:
            images: [N, C, H, W]; both sides are multiples of the patch.
            which: blocks; none: the network's own output, i.e. the last block's after the final norm.
            norm: apply the final norm to every block's tokens.
        """
        if not which:
            return [self(images)]
        grid = self._grid(images)
        chosen = [index % len(self.vit.blocks) for index in which]
        with self._positions_for(grid) as positions:
            replaced = {f"vit.{name}": value for name, value in positions.items()}
            distinct = sorted(set(chosen))
            tokens = functional_call(packed.Intermediates(self.vit, distinct, norm), replaced, (images,))
        return [self._tokens(tokens[distinct.index(index)], grid) for index in chosen]

    def shard_units(self) -> tuple[list[nn.Module], str]:
        """What --shard gathers one at a time: the blocks, and the method of theirs that runs them ("": forward)."""
        return (packed.shard_units(self.vit), packed.SHARDED) if self.plain else (list(self.vit.blocks), "")

    def _grid(self, images: Tensor) -> tuple[int, int]:
        return images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size

    def _tokens(self, tokens: Tensor, grid: tuple[int, int]) -> Tokens:
        """From tokens [N, prefix + h * w, D]."""
        prefix = self.num_prefix_tokens
        return Tokens(tokens[:, prefix:].reshape(len(tokens), *grid, -1), tokens[:, :prefix])

    def _embed(self, images: Tensor, hidden: Tensor | None = None, token: Tensor | None = None) -> Tensor:
        """The input of the first block [N, prefix + h * w, D]."""
        patches = packed.embed(self.vit, images)
        if hidden is not None and token is not None:
            patches = torch.where(hidden.flatten(1)[..., None], token.to(patches.dtype), patches)
        resampled = self._resample_positions(self.vit.patch_embed.grid_size, self._grid(images))
        return packed.with_positions(self.vit, patches, resampled.get("pos_embed", self.vit.pos_embed))

    def _whole(self, images: Tensor, hidden: Tensor | None = None, token: Tensor | None = None) -> Tensor:
        """timm's own forward pass, prefix first: [N, prefix + h * w, D]."""

        def replace(_: object, __: object, embedded: Tensor) -> Tensor | None:
            if hidden is None or token is None:
                return None
            where = hidden.reshape(*embedded.shape[:-1], 1)  # [N, h, w, 1] or [N, h * w, 1]
            return torch.where(where, token.to(embedded.dtype), embedded)

        handle = self.vit.patch_embed.register_forward_hook(replace)
        try:
            with self._positions_for(self._grid(images)) as positions:
                return functional_call(self.vit, positions, (images,))  # type: ignore[no-any-return]
        finally:
            handle.remove()

    @contextmanager
    def _positions_for(self, grid: tuple[int, int]) -> Iterator[dict[str, Tensor]]:
        """Position embeddings for ``grid``, by the name of the parameter that they replace."""
        embed = self.vit.patch_embed
        own_grid, embed.grid_size = embed.grid_size, grid  # positions fit the grid: timm must not resample them again
        try:
            yield self._resample_positions(own_grid, grid)
        finally:
            embed.grid_size = own_grid

    def _resample_positions(self, old: tuple[int, int], new: tuple[int, int]) -> dict[str, Tensor]:
        """Position embeddings for another grid: timm's own resampling as one fixed matrix.

        timm's interpolation has no deterministic backward pass on GPUs; a matrix product has.
        """
        embedding = self.vit.pos_embed
        if embedding is None or old == new:
            return {}
        key = (*new, embedding.device, embedding.dtype)
        if key not in self._resamplers:
            if len(self._resamplers) >= GRIDS:  # images of many sizes: drop the oldest
                del self._resamplers[next(iter(self._resamplers))]
            n = embedding.shape[1]
            unit = torch.eye(n, device=embedding.device)[None]
            prefix = n - old[0] * old[1]
            matrix = resample_abs_pos_embed(unit, list(new), list(old), num_prefix_tokens=prefix)
            self._resamplers[key] = matrix[0].to(embedding.dtype)
        return {"pos_embed": (self._resamplers[key] @ embedding[0])[None]}


def _create(model: str, **arguments: Any) -> Any:
    """A timm ViT without a head. Its forward gives all tokens after the final norm: [N, prefix + h * w, D]."""
    if not timm.is_model(model):
        near = ", ".join(difflib.get_close_matches(model.split(".")[0], names("*"), 3))
        hint = f"near it: {near}" if near else "e.g. vit_tiny_patch16_224, vit_small_patch16_224"
        raise UserError(f"timm {timm.__version__} has no model {model!r}; {hint}")
    try:
        vit = timm.create_model(model, num_classes=0, global_pool="", dynamic_img_size=True, **arguments)
    except (TypeError, AssertionError, RuntimeError):
        raise UserError(
            f"{model} cannot be used: it is no plain vision transformer{f' with {arguments}' if arguments else ''}; "
            "choose one of timm's VisionTransformer or Eva models, e.g. vit_small_patch16_224"
        ) from None
    embed: Any = getattr(vit, "patch_embed", None)
    if not hasattr(vit, "num_prefix_tokens") or not hasattr(embed, "grid_size"):
        raise UserError(f"{model} is no plain vision transformer; choose e.g. vit_small_patch16_224")
    (size, _), (patch, _), (grid, _) = embed.img_size, embed.patch_size, embed.grid_size
    if grid != size // patch:  # convolutions before the patches
        raise UserError(f"{model} is no plain vision transformer; choose e.g. vit_small_patch16_224")
    if size % patch:
        raise UserError(f"image size {size} px is no multiple of the {patch} px patch of {model}; use {grid * patch}")
    return vit


@functools.cache
def patch_of(model: str) -> int:
    """Side of a model's patch in px; its weights are not made."""
    with torch.device("meta"):
        return int(_create(model).patch_embed.patch_size[0])


def patch_argument(model: str, patch: int) -> dict[str, Any]:
    """The arguments of timm's constructor for patches of ``patch`` px: none where the model has them anyway."""
    return {} if patch == patch_of(model) else {"patch_size": patch}


def names(pattern: str) -> list[str]:
    """timm's models of the VisionTransformer and Eva families whose names match ``pattern``."""
    families = ("vision_transformer", "eva")
    return [name for family in families for name in timm.list_models(pattern, module=family)]
