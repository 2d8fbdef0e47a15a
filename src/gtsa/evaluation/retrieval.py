"""Nearest neighbours, votes, and a memory of labelled patches."""

from __future__ import annotations

from dataclasses import dataclass

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
        """Soft labels [n, C] of unit vectors [n, D]: those of the ``k`` most similar patches, each weighted by
        softmax(cosine similarity / temperature).
        """
        soft_labels = []
        for chunk in torch.split(queries, ROWS):  # the labels of all neighbours of a chunk are held at once
            similarity, indices = nearest(chunk, self.tokens, k)
            weights = (similarity / temperature).softmax(-1)
            soft_labels.append(torch.einsum("nk,nkc->nc", weights, self.labels[indices]))
        return torch.cat(soft_labels)


def build_memory(backbone: Encoder, data: Labelled, context: EvalContext, size: int, most: int) -> Memory:
    """A memory of ``labelled_patches``, with the same arguments and errors."""
    tokens, pixels = labelled_patches(backbone, data, context, size, most)
    return Memory(F.normalize(tokens, dim=-1, out=tokens), _shares(pixels))


def labelled_patches(
    backbone: Encoder, data: Labelled, context: EvalContext, size: int, most: int
) -> tuple[Tensor, Tensor]:
    """At most ``most`` random patches with labelled pixels, spread evenly over the images of ``data``.

    Args:
        size: side of the square that images are resized to, whole patches.

    Returns:
        Their tokens [M, D], and how many of their pixels belong to each class [M, C].

    Raises:
        UserError: no pixel of these images is labelled (3).
    """
    grid, classes, images = size // backbone.patch_size, len(data.classes), len(data)
    share = most // images + (generator(context.seed, Stream.PATCH_MEMORY).permutation(images) < most % images)
    used = share.nonzero()[0].tolist()
    room = int(share.clip(max=grid**2).sum())
    tokens = torch.empty(room, backbone.embed_dim, device=context.device)
    pixels = torch.empty(room, classes, device=context.device)
    row, indices = 0, iter(used)
    for scenes in scenes_by_size(data.take(used), context, size):
        batch_tokens = patch_tokens(backbone, normalised_scenes(scenes, backbone, context), context)
        for scene, scene_tokens in zip(scenes, batch_tokens.flatten(1, 2), strict=True):
            index = next(indices)
            counts = class_pixels(resized_mask(scene.truth, size, size), backbone.patch_size, classes)
            known = counts.any(1).nonzero()[:, 0]
            order = generator(context.seed, Stream.PATCH_MEMORY, index + 1).permutation(len(known))[: share[index]]
            chosen = known[torch.from_numpy(order)]
            tokens[row : row + len(chosen)] = scene_tokens[chosen.to(context.device)]
            pixels[row : row + len(chosen)] = counts[chosen].to(context.device)
            row += len(chosen)
    if not row:
        raise UserError("no pixel of the training masks is labelled: all of them are ignored; see --ignore", 3)
    return tokens[:row], pixels[:row]


def class_shares(mask: Tensor, patch: int, classes: int) -> Tensor:
    """Share of each class in the labelled pixels of each patch: int64 [H, W] -> [h * w, C]; 0 without labelled ones."""
    return _shares(class_pixels(mask, patch, classes))


def class_pixels(mask: Tensor, patch: int, classes: int) -> Tensor:
    """Number of pixels of each class in each patch: int64 [H, W] -> [h * w, C]."""
    h, w = mask.shape[0] // patch, mask.shape[1] // patch
    cells = mask.view(h, patch, w, patch).transpose(1, 2).reshape(h * w, patch**2)
    ids = classes + 1  # the last one: not labelled
    cell_and_class = torch.arange(len(cells))[:, None] * ids + cells.where(cells != IGNORE, classes)
    return torch.bincount(cell_and_class.flatten(), minlength=len(cells) * ids).view(-1, ids)[:, :classes]


def _shares(pixels: Tensor) -> Tensor:
    return pixels / pixels.sum(1, keepdim=True).clamp(min=1)
