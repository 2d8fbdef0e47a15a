"""The keywords of ``gtsa.compare``, for editors and type checkers. A test holds them to the settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Literal, TypedDict

Auto = Literal["auto"]
Path = str | PathLike[str]


class CompareArguments(TypedDict, total=False):
    """All of ``gtsa.comparison.settings`` but ``methods``; what each means is written there."""

    ablate: str | Sequence[str]
    controls: str | Sequence[str]
    weights: str | Sequence[str]
    rows: Mapping[str, Mapping[str, object]]
    data: Path | None
    out: Path | None
    model: str
    steps: int
    batch_size: int
    pretrain: Mapping[str, object]
    task: str | Sequence[str]
    train: Path | Sequence[Path]
    val: Path | Sequence[Path]
    folds: int | None
    tokens: tuple[Literal["mean", "cls", "both"], ...]
    evaluate: Mapping[str, object]
    tasks: Mapping[str, Mapping[str, object]]
    primary: str
    seeds: int
    trials: int
    trial_steps: int | None
    learning_rates: tuple[float, float]
    equal_flops: bool
    evaluate_every: int
    cache_tokens: bool
    pictures: int
    precision: Literal["auto", "32", "bf16", "fp16"]
    device: Literal["auto", "cpu", "cuda"]
    workers: int | Auto
    jobs: int
    only: Literal["training", "evaluation"] | None
    cells: str | Sequence[str]
    status: bool
    plan: bool
