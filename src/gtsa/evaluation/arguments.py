"""The keywords of ``gtsa.evaluate``, for editors and type checkers. A test holds them to the settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Literal, TypedDict

Auto = Literal["auto"]
Path = str | PathLike[str]


class EvaluateArguments(TypedDict, total=False):
    """All of ``gtsa.evaluation.settings`` but ``weights`` and ``task``; what each means is written there."""

    train: Path | Sequence[Path]
    val: Path | Sequence[Path]
    folds: int | None
    tokens: Literal["mean", "cls", "both"]
    network: Literal["teacher", "student"]
    model: str | None
    out: Path | None
    predictions: Path | None
    pictures: int
    work: Path | None
    cache: Path | None
    ignore: int | None
    reduce_zero_label: bool
    classes: Path | None
    groups: Path | None
    range16: tuple[float, float] | None
    seed: int
    batch_size: int
    workers: int | Auto
    precision: Literal["auto", "32", "bf16", "fp16"]
    compile: Literal["auto", "on", "off"]
    device: Literal["auto", "cpu", "cuda"]
    devices: Literal[1]
    nodes: Literal[1]
    clusters: Mapping[str, object]
    detection: Mapping[str, object]
    finetune: Mapping[str, object]
    health: Mapping[str, object]
    in_context: Mapping[str, object]
    instances: Mapping[str, object]
    knn: Mapping[str, object]
    linear: Mapping[str, object]
    linear_segmentation: Mapping[str, object]
    orientation: Mapping[str, object]
    position: Mapping[str, object]
    rotation: Mapping[str, object]
    segmentation: Mapping[str, object]
