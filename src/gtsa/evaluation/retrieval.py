"""Nearest neighbours, votes, and a memory of labelled patches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gtsa.core.errors import UserError
from gtsa.core.seeds import Stream, generator
from gtsa.data.labels import IGNORE, Labelled
from gtsa.evaluation.context import EvalContext
from gtsa.evaluation.dense import normalised_scenes, patch_tokens, resized_mask, scenes_by_size
from gtsa.models.backbone import Encoder

ROWS, COLUMNS = 2**10, 2**16  # of the block of similarities that a search holds at once


def nearest(queries: Tensor, memory: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Cosine similarities and indices [n, k] of the ``k`` most similar of the unit vectors ``memory`` [M, D].

    Exact. The block of similarities held at once is bounded, so time is linear in the memory's size.

    Args:
        queries: [n, D] unit vectors.
        k: at most M; the most similar come first.
    """
    chunks = [_nearest(chunk, memory, k) for chunk in torch.split(queries, ROWS)]
    return torch.cat([similarity for similarity, _ in chunks]), torch.cat([indices for _, indices in chunks])


def _nearest(queries: Tensor, memory: Tensor, k: int) -> tuple[Tensor, Tensor]:
    best = queries.new_empty(len(queries), 0)
    indices = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start in range(0, len(memory), COLUMNS):
        similarity = queries @ memory[start : start + COLUMNS].T
        near = similarity.topk(min(k, similarity.shape[1]))
        best, indices = torch.cat([best, near.values], 1), torch.cat([indices, near.indices + start], 1)
        best, kept = best.topk(min(k, best.shape[1]))
        indices = indices.gather(1, kept)
    return best, indices


def votes_of(similarity: Tensor, classes: Tensor, count: int, temperature: float) -> Tensor:
    """Votes [queries, count] of neighbours with these similarities and classes [queries, k], nearest first.

    A vote weighs exp(similarity / temperature), relative to that of the nearest neighbour, so that no temperature is
    too low for floating point.
    """
    weights = ((similarity - similarity[:, :1]) / temperature).exp()
    votes = weights.new_zeros(len(weights), count)
    rows = torch.arange(len(weights), device=weights.device)
    for weight, vote in zip(weights.T, classes.T, strict=True):  # one after the other: sums in a fixed order on GPUs
        votes[rows, vote] += weight
    return votes


@dataclass(frozen=True)
class Memory:
    """Patches with known classes, for retrieval."""

    tokens: Tensor  # [M, D] unit vectors
    labels: Tensor  # [M, C] share of each class in the patch's labelled pixels

    def __call__(self, queries: Tensor, k: int, temperature: float) -> Tensor:
        """Soft labels [n, C] of unit vectors [n, D]: ``vote`` of their ``k`` most similar patches."""
        chunks = torch.split(queries, ROWS)
        return torch.cat([self.vote(*nearest(chunk, self.tokens, k), temperature) for chunk in chunks])

    def vote(self, similarity: Tensor, indices: Tensor, temperature: float) -> Tensor:
        """Labels [n, C] of the patches ``indices`` [n, k], weighted by softmax(cosine similarity / temperature)."""
        soft_labels = []
        for near, chunk in zip(torch.split(similarity, ROWS), torch.split(indices, ROWS), strict=True):
            weights = (near / temperature).softmax(-1)  # the labels of all neighbours of a chunk are held at once
            soft_labels.append(torch.einsum("nk,nkc->nc", weights, self.labels[chunk]))
        return torch.cat(soft_labels)


class Patches(NamedTuple):
    """M patches of several images."""

    tokens: Tensor  # [M, D]
    pixels: Tensor  # [M, C]: how many of their pixels belong to each class; without masks C = 0
    cells: Tensor  # [M] int64: their positions in the grid, row by row


def build_memory(backbone: Encoder, data: Labelled, context: EvalContext, size: int, most: int) -> Memory:
    """A memory of ``sample_patches``, with the same arguments and errors."""
    tokens, pixels, _ = sample_patches(backbone, data, context, size, most)
    return Memory(F.normalize(tokens, dim=-1, out=tokens), shares_of(pixels))


def sample_patches(backbone: Encoder, data: Labelled, context: EvalContext, size: int, most: int) -> Patches:
    """At most ``most`` random patches, spread evenly over the images of ``data``; of masks, those with labelled pixels.

    Args:
        size: side of the square that images are resized to, whole patches.

    Raises:
        UserError: no pixel of these images is labelled (3).
    """
    grid, images, masks = size // backbone.patch_size, len(data), data.kind == "masks"
    share = most // images + (generator(context.seed, Stream.PATCH_MEMORY).permutation(images) < most % images)
    used = share.nonzero()[0].tolist()
    room = int(share.clip(max=grid**2).sum())
    tokens = torch.empty(room, backbone.embed_dim, device=context.device)
    pixels = torch.empty(room, len(data.classes) * masks, device=context.device)
    cells = torch.empty(room, dtype=torch.int64, device=context.device)
    row, indices = 0, iter(used)
    for scenes in scenes_by_size(data.take(used), context, size):
        batch_tokens = patch_tokens(backbone, normalised_scenes(scenes, backbone, context), context)
        for scene, scene_tokens in zip(scenes, batch_tokens.flatten(1, 2), strict=True):
            index = next(indices)
            counts = torch.ones(grid**2, 1)
            if masks:
                counts = class_pixels(resized_mask(scene.truth, size, size), backbone.patch_size, len(data.classes))
            known = counts.any(1).nonzero()[:, 0]
            order = generator(context.seed, Stream.PATCH_MEMORY, index + 1).permutation(len(known))[: share[index]]
            chosen = known[torch.from_numpy(order)]
            rows = slice(row, row + len(chosen))
            tokens[rows] = scene_tokens[chosen.to(context.device)]
            pixels[rows] = counts[chosen, : pixels.shape[1]].to(context.device, pixels.dtype)
            cells[rows] = chosen.to(context.device)
            row += len(chosen)
    if not row:
        raise UserError("no pixel of the training masks is labelled: all of them are ignored; see --ignore", 3)
    return Patches(tokens[:row], pixels[:row], cells[:row])


def class_shares(mask: Tensor, patch: int, classes: int) -> Tensor:
    """Share of each class in the labelled pixels of each patch: int64 [H, W] -> [h * w, C]; 0 without labelled ones."""
    return shares_of(class_pixels(mask, patch, classes))


def class_pixels(mask: Tensor, patch: int, classes: int) -> Tensor:
    """Number of pixels of each class in each patch: int64 [H, W] -> [h * w, C]."""
    h, w = mask.shape[0] // patch, mask.shape[1] // patch
    cells = mask.view(h, patch, w, patch).transpose(1, 2).reshape(h * w, patch**2)
    ids = classes + 1  # the last one: not labelled
    cell_and_class = torch.arange(len(cells))[:, None] * ids + cells.where(cells != IGNORE, classes)
    return torch.bincount(cell_and_class.flatten(), minlength=len(cells) * ids).view(-1, ids)[:, :classes]


def shares_of(pixels: Tensor) -> Tensor:
    """Numbers of pixels of each class [M, C] as shares of the labelled ones."""
    return pixels / pixels.sum(1, keepdim=True).clamp(min=1)
