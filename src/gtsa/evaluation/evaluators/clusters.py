"""Do the features form groups of patches with one meaning? Over-clustering without training (Leopart, 2204.13101)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import ClassVar, Protocol

import numpy as np
import torch
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from torch import Tensor

from gtsa.core.errors import UserError
from gtsa.core.seeds import Stream, generator
from gtsa.core.terminal import say
from gtsa.data.labels import IGNORE, Labelled
from gtsa.evaluation import dense
from gtsa.evaluation.context import EvalContext
from gtsa.evaluation.evaluator import Evaluator, PerImage
from gtsa.evaluation.features import whole_patches
from gtsa.evaluation.loading import batches
from gtsa.models.backbone import Encoder

FEWEST, MOST = 5, 256  # tokens per cluster: needed, and used to fit k-means (faiss's default)


class Projection(Protocol):
    """scikit-learn's pipeline of standardisation and PCA."""

    def transform(self, tokens: np.ndarray, /) -> np.ndarray: ...


class Clustering(Protocol):
    """scikit-learn's k-means."""

    def predict(self, tokens: np.ndarray, /) -> np.ndarray: ...


class Clusters(Evaluator):
    """Patch tokens of the evaluation images are clustered; each cluster takes the class that it overlaps most.

    Args:
        k: number of clusters; fewer if there are not five tokens for each.
        dimensions: number of principal components that standardised tokens are projected on.
        size: side of the square that images are resized to, px.
        repeats: number of clusterings with different initialisations; the metrics are their mean.
    """

    label_kinds = ("masks",)
    bootstrap = False
    other_metrics: ClassVar[Mapping[str, str]] = {"clusters": "number of clusters"}
    uses_train_set = False

    def __init__(self, k: int = 500, dimensions: int = 50, size: int = 448, repeats: int = 5) -> None:
        if min(k, dimensions, size, repeats) < 1:
            raise UserError("clusters: k, dimensions, size and repeats must be at least 1")
        self.k, self.dimensions, self.size, self.repeats = k, dimensions, size, repeats

    def __call__(self, backbone: Encoder, train: Labelled, val: Labelled, context: EvalContext) -> PerImage:
        size, classes = whole_patches(self.size, backbone), len(val.classes)
        total = len(val) * (size // backbone.patch_size) ** 2
        k = min(self.k, max(1, total // FEWEST))
        if k < self.k:
            say(f"clusters: {k:,} instead of {self.k:,}: there are {total:,} patches, and each cluster needs {FEWEST}")
        maps = self._cluster_maps(backbone, val, context, size, k)
        class_of = self._overlap(maps, val, k).argmax(-1)  # [repeats, k]
        counts = []
        for index, image_maps in enumerate(maps):
            truth = val.target(index)
            predictions = [
                classes_of_clusters[dense.resized_mask(clusters, *truth.shape)]
                for classes_of_clusters, clusters in zip(class_of, image_maps, strict=True)
            ]
            counts.append(dense.stack_repeats([dense.count_pixels(each, truth, classes) for each in predictions]))
            context.on_prediction(index, dense.as_map(predictions[0], classes))
        return {**dense.stack_counts(counts, val), "clusters": torch.full((len(val),), k)}

    def metrics(self, per_image: PerImage) -> dict[str, float]:
        return {**dense.metrics(per_image), "clusters": float(per_image["clusters"].double().mean())}

    def per_class(self, per_image: PerImage) -> dict[str, list[float]]:
        return dense.per_class(per_image)

    def _overlap(self, maps: Tensor, val: Labelled, k: int) -> Tensor:
        """Labelled pixels of each class in each cluster: [repeats, k, classes]."""
        classes = len(val.classes)
        overlap = torch.zeros(self.repeats, k, classes, dtype=torch.int64)
        for index, image_maps in enumerate(maps):
            truth = val.target(index)
            known = truth != IGNORE
            for clusters, pixels in zip(image_maps, overlap, strict=True):
                pairs = dense.resized_mask(clusters, *truth.shape)[known] * classes + truth[known]
                pixels += torch.bincount(pairs, minlength=k * classes).view(k, classes)
        return overlap

    def _cluster_maps(self, backbone: Encoder, val: Labelled, context: EvalContext, size: int, k: int) -> Tensor:
        """The cluster of every patch in every repeat: [images, repeats, h, w]."""
        grid = size // backbone.patch_size
        fitted_on = np.zeros(len(val) * grid**2, bool)
        fitted_on[generator(context.seed, Stream.CLUSTERS).permutation(len(fitted_on))[: MOST * k]] = True
        sample, start = [], 0
        for tokens in _tokens(backbone, val, context, size):
            sample.append(tokens[fitted_on[start : start + len(tokens)]])
            start += len(tokens)
        draws = (generator(context.seed, Stream.CLUSTERS, repeat + 1) for repeat in range(self.repeats))
        seeds = [int(draw.integers(2**31)) for draw in draws]
        projection, clusterings = _fit_clusters(np.concatenate(sample), self.dimensions, k, seeds)
        maps = []
        for tokens in _tokens(backbone, val, context, size):
            with threadpool_limits(1):
                ids = np.stack([clustering.predict(projection.transform(tokens)) for clustering in clusterings])
            maps.append(torch.from_numpy(ids).long().view(self.repeats, -1, grid, grid).transpose(0, 1))
        return torch.cat(maps)


def _fit_clusters(tokens: np.ndarray, dimensions: int, k: int, seeds: list[int]) -> tuple[Projection, list[Clustering]]:
    """Standardisation and PCA of tokens [n, D], and k-means of the components for each seed."""
    from sklearn.cluster import KMeans  # type: ignore[import-untyped]  # here: every other command would wait for it
    from sklearn.decomposition import PCA  # type: ignore[import-untyped]
    from sklearn.exceptions import ConvergenceWarning  # type: ignore[import-untyped]
    from sklearn.pipeline import make_pipeline  # type: ignore[import-untyped]
    from sklearn.preprocessing import StandardScaler  # type: ignore[import-untyped]

    projection = make_pipeline(StandardScaler(), PCA(min(dimensions, *tokens.shape), svd_solver="covariance_eigh"))
    with warnings.catch_warnings(), threadpool_limits(1):  # with more threads the order of sums would vary
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct tokens than clusters: not an error here
        components = projection.fit_transform(tokens)
        return projection, [KMeans(k, n_init=1, random_state=seed).fit(components) for seed in seeds]


def _tokens(backbone: Encoder, data: Labelled, context: EvalContext, size: int) -> Iterator[np.ndarray]:
    """Patch tokens [n, D] of all images in order, one batch of images at a time."""
    for scenes in batches(dense.Scenes[Tensor](data, size), context, list):
        pixels = dense.normalised_scenes(scenes, backbone, context)
        yield dense.patch_tokens(backbone, pixels, context).flatten(0, 2).cpu().numpy()
