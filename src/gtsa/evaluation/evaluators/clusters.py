"""Are there groups of patches that mean the same? Over-clustering without training (Leopart, arXiv 2204.13101)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from torch import Tensor

from gtsa.core.errors import UserError
from gtsa.core.seeds import Stream, generator
from gtsa.core.terminal import say
from gtsa.data.labels import IGNORE, Labelled
from gtsa.evaluation import dense
from gtsa.evaluation.evaluator import Evaluator, PerImage
from gtsa.evaluation.features import EvalContext, batches, normalised, whole_patches
from gtsa.models.backbone import Encoder

FEWEST, MOST = 5, 256  # tokens a cluster that are needed, and that are looked at to find it (faiss's default)


class Clusters(Evaluator):
    """Patch tokens of the judged images are clustered; each cluster is then taken for the class it overlaps most.

    Args:
        k: clusters; fewer where there are not five tokens for each.
        dimensions: standardised tokens are brought to so many principal components.
        size: side of the square that images are brought to, px.
        repeats: times that clusters are found, from different starts; the figures are the mean.
    """

    label_kinds = ("masks",)
    bootstrap = False
    uses_train_set = False

    def __init__(self, k: int = 500, dimensions: int = 50, size: int = 448, repeats: int = 5) -> None:
        if min(k, dimensions, size, repeats) < 1:
            raise UserError("clusters: k, dimensions, size and repeats must be at least 1")
        self.k, self.dimensions, self.size, self.repeats = k, dimensions, size, repeats

    def __call__(self, backbone: Encoder, train: Labelled, val: Labelled, lab: EvalContext) -> PerImage:
        size, classes = whole_patches(self.size, backbone), len(val.classes)
        total = len(val) * (size // backbone.patch_size) ** 2
        k = min(self.k, max(1, total // FEWEST))
        if k < self.k:
            say(f"clusters: {k:,} instead of {self.k:,}: there are {total:,} patches, and each needs {FEWEST}")
        maps = self._maps(backbone, val, lab, size, k)
        overlap = torch.zeros(self.repeats, k, classes, dtype=torch.int64)
        for index, cells in enumerate(maps):
            truth = val.target(index)
            known = truth != IGNORE
            for clusters, pixels in zip(cells, overlap, strict=True):
                pairs = dense.resized_mask(clusters, *truth.shape)[known] * classes + truth[known]
                pixels += torch.bincount(pairs, minlength=k * classes).view(k, classes)
        matched = overlap.argmax(-1)
        found = []
        for index, cells in enumerate(maps):
            truth = val.target(index)
            taken = [
                match[dense.resized_mask(clusters, *truth.shape)]
                for match, clusters in zip(matched, cells, strict=True)
            ]
            found.append(dense.stacked([dense.counts(each, truth, classes) for each in taken]))
            lab.on_prediction(index, dense.as_map(taken[0], classes))
        return {**dense.stacked(found), "clusters": torch.full((len(val),), k)}

    def metrics(self, per_image: PerImage) -> dict[str, float]:
        return {**dense.metrics(per_image), "clusters": float(per_image["clusters"].double().mean())}

    def per_class(self, per_image: PerImage) -> dict[str, list[float]]:
        return dense.per_class(per_image)

    def _maps(self, backbone: Encoder, val: Labelled, lab: EvalContext, size: int, k: int) -> Tensor:
        """The cluster of every patch in every repeat: [images, repeats, h, w]."""
        grid = size // backbone.patch_size
        looked_at = np.zeros(len(val) * grid**2, bool)
        looked_at[generator(lab.seed, Stream.CLUSTERS).permutation(len(looked_at))[: MOST * k]] = True
        sample, at = [], 0
        for tokens in _tokens(backbone, val, lab, size):
            sample.append(tokens[looked_at[at : at + len(tokens)]])
            at += len(tokens)
        draws = (generator(lab.seed, Stream.CLUSTERS, repeat + 1) for repeat in range(self.repeats))
        starts = [int(draw.integers(2**31)) for draw in draws]
        simple, found = _clustered(np.concatenate(sample), self.dimensions, k, starts)
        maps = []
        for tokens in _tokens(backbone, val, lab, size):
            with threadpool_limits(1):
                near = np.stack([means.predict(simple.transform(tokens)) for means in found])
            maps.append(torch.from_numpy(near).long().view(self.repeats, -1, grid, grid).transpose(0, 1))
        return torch.cat(maps)


def _clustered(tokens: np.ndarray, dimensions: int, k: int, starts: list[int]) -> tuple[Any, list[Any]]:
    """What standardises [n, D] and brings them to principal components; and k-means of these, from each start."""
    from sklearn.cluster import KMeans  # type: ignore[import-untyped]  # here: every other command would wait for it
    from sklearn.decomposition import PCA  # type: ignore[import-untyped]
    from sklearn.exceptions import ConvergenceWarning  # type: ignore[import-untyped]
    from sklearn.pipeline import make_pipeline  # type: ignore[import-untyped]
    from sklearn.preprocessing import StandardScaler  # type: ignore[import-untyped]

    simple = make_pipeline(StandardScaler(), PCA(min(dimensions, *tokens.shape), svd_solver="covariance_eigh"))
    with warnings.catch_warnings(), threadpool_limits(1):  # more threads would add up in the order in which they end
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different tokens than clusters: so be it
        components = simple.fit_transform(tokens)
        return simple, [KMeans(k, n_init=1, random_state=start).fit(components) for start in starts]


def _tokens(backbone: Encoder, data: Labelled, lab: EvalContext, size: int) -> Iterator[np.ndarray]:
    """Patch tokens [n, D] of all images in order, a batch of images at a time."""
    for scenes in batches(dense.Scenes(data, size), lab, list):
        pixels = normalised(torch.stack([scene.pixels for scene in scenes]), backbone, lab.device)
        yield dense.patches(backbone, pixels, lab).flatten(0, 2).cpu().numpy()
