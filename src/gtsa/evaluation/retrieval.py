"""Nearest neighbours, votes, and a memory of patches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gtsa.core.errors import UserError
from gtsa.core.seeds import Stream, generator
from gtsa.data.labels import IGNORE, Labelled
from gtsa.evaluation.dense import _alike, patches, resized_mask
from gtsa.evaluation.features import EvalContext, normalised
from gtsa.models.backbone import Encoder

ROWS, COLUMNS = 2**10, 2**16  # of the block of similarities that a search holds at once


def nearest(queries: Tensor, memory: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Cosine similarities and places [n, k] of the ``k`` most similar of the unit vectors ``memory`` [M, D].

    Exact. The block of similarities that is held at once is bounded, so time is linear in the memory's size.

    Args:
        queries: [n, D] unit vectors.
        k: at most M; the most similar come first.
    """
    found = [_nearest(chunk, memory, k) for chunk in torch.split(queries, ROWS)]
    return torch.cat([values for values, _ in found]), torch.cat([places for _, places in found])


def _nearest(queries: Tensor, memory: Tensor, k: int) -> tuple[Tensor, Tensor]:
    best = queries.new_empty(len(queries), 0)
    places = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start in range(0, len(memory), COLUMNS):
        similarity = queries @ memory[start : start + COLUMNS].T
        near = similarity.topk(min(k, similarity.shape[1]))
        best, places = torch.cat([best, near.values], 1), torch.cat([places, near.indices + start], 1)
        best, kept = best.topk(min(k, best.shape[1]))
        places = places.gather(1, kept)
    return best, places


def votes_of(similarity: Tensor, classes: Tensor, count: int, temperature: float) -> Tensor:
    """Votes [queries, count] of neighbours of these similarities and classes [queries, k], nearest first.

    They are relative to the nearest one's, which weighs 1, so that no temperature is too low for the arithmetic.
    """
    weights = ((similarity - similarity[:, :1]) / temperature).exp()
    votes = weights.new_zeros(len(weights), count)
    rows = torch.arange(len(weights), device=weights.device)
    for weight, vote in zip(weights.T, classes.T, strict=True):  # one after the other: sums in a fixed order on GPUs
        votes[rows, vote] += weight
    return votes


@dataclass(frozen=True)
class Memory:
    """Patches with known classes, to look for similar ones among."""

    tokens: Tensor  # [M, D] unit vectors
    labels: Tensor  # [M, C] share of each class in the patch's labelled pixels

    def __call__(self, queries: Tensor, k: int, temperature: float) -> Tensor:
        """Soft labels [n, C] of unit vectors [n, D]: those of the ``k`` most similar patches, each weighing
        softmax(cosine similarity / temperature).
        """
        found = []
        for chunk in torch.split(queries, ROWS):  # the labels of all neighbours of a chunk are held at once
            similarity, places = nearest(chunk, self.tokens, k)
            weights = (similarity / temperature).softmax(-1)
            found.append(torch.einsum("nk,nkc->nc", weights, self.labels[places]))
        return torch.cat(found)


def remembered(backbone: Encoder, data: Labelled, lab: EvalContext, size: int, most: int) -> Memory:
    """At most ``most`` random patches of ``data``, spread evenly over its images; such as have labelled pixels.

    Args:
        size: side of the square that images are brought to, whole patches.

    Raises:
        UserError: nobody labelled a pixel of these images (3).
    """
    grid, classes, images = size // backbone.patch_size, len(data.classes), len(data)
    share = most // images + (generator(lab.seed, Stream.PATCH_MEMORY).permutation(images) < most % images)
    used = share.nonzero()[0].tolist()
    room = int(share.clip(max=grid**2).sum())
    tokens = torch.empty(room, backbone.embed_dim, device=lab.device)
    labels = torch.empty(room, classes, device=lab.device)
    row, places = 0, iter(used)
    for scenes in _alike(data.take(used), lab, size):
        found = patches(backbone, normalised(torch.stack([s.pixels for s in scenes]), backbone, lab.device), lab)
        for scene, each in zip(scenes, found.flatten(1, 2), strict=True):
            index = next(places)
            shares = shares_of(resized_mask(scene.truth, size, size), backbone.patch_size, classes)
            known = shares.any(1).nonzero()[:, 0]
            order = generator(lab.seed, Stream.PATCH_MEMORY, index + 1).permutation(len(known))[: share[index]]
            chosen = known[torch.from_numpy(order)]
            tokens[row : row + len(chosen)] = F.normalize(each[chosen.to(lab.device)], dim=-1)
            labels[row : row + len(chosen)] = shares[chosen].to(lab.device)
            row += len(chosen)
    if not row:
        raise UserError("no pixel of the training masks is labelled: all of them are ignored; see --ignore", 3)
    return Memory(tokens[:row], labels[:row])


def shares_of(mask: Tensor, patch: int, classes: int) -> Tensor:
    """Share of each class in the labelled pixels of each patch: int64 [H, W] -> [h * w, C]; 0 where there are none."""
    h, w = mask.shape[0] // patch, mask.shape[1] // patch
    cells = mask.view(h, patch, w, patch).transpose(1, 2).reshape(h * w, patch**2)
    kinds = classes + 1  # the last one: not labelled
    place = torch.arange(len(cells))[:, None] * kinds + cells.where(cells != IGNORE, classes)
    pixels = torch.bincount(place.flatten(), minlength=len(cells) * kinds).view(-1, kinds)[:, :classes]
    return pixels / pixels.sum(1, keepdim=True).clamp(min=1)
