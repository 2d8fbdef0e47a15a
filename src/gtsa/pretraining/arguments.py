"""The keywords of ``gtsa.pretrain``, for editors and type checkers. A test compares them with the settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Literal, TypedDict

Auto = Literal["auto"]
Path = str | PathLike[str]


class RunArguments(TypedDict, total=False):
    """All of ``gtsa.pretraining.settings.Pretrain`` but ``data`` and ``out``; each is explained there."""

    method: str
    model: str
    patch_size: int | Auto
    init: Path | None
    freeze_encoder: float | Auto
    encoder_lr_scale: float | Auto
    layer_decay: float | Auto
    gram_weight: float | Auto
    epochs: int | Auto
    steps: int | Auto
    batch_size: int | Auto
    accumulate: int | Auto
    learning_rate: float | Auto
    final_learning_rate: float
    warmup: float
    weight_decay: float
    final_weight_decay: float
    clip_grad: float
    beta2: float
    drop_path: float
    precision: Literal["auto", "32", "bf16", "fp16"]
    compile: Literal["auto", "on", "off"]
    activation_checkpointing: bool
    device: Literal["auto", "cpu", "cuda"]
    devices: int | Auto
    nodes: int
    shard: bool
    deterministic: bool
    workers: int | Auto
    cut: Literal["host", "device"]
    cache: Path | None
    decoder: Literal["pillow", "simplejpeg"]
    seed: int
    checkpoint_every: int | Auto
    keep_checkpoints: int
    evaluate_every: int | Auto
    evaluate_images: int | Auto
    log_every: int
    loggers: str | Sequence[str]
    eval: str | Sequence[str]
    eval_train: Path | Sequence[Path]
    eval_val: Path | Sequence[Path]
    eval_folds: int | None
    eval_config: Path | None
    keep_best: str | None
    hold_out: int | Auto
    max_bad: float
    range16: tuple[float, float] | Auto
    data_root: Path | None
    include: str | Sequence[str]
    exclude: str | Sequence[str]
    follow_links: bool
    resume: bool
    overwrite: bool
    report: bool
    plan: bool
    views: Mapping[str, object]
    gtsa: Mapping[str, object]
    dino: Mapping[str, object]
    ibot: Mapping[str, object]
    lejepa: Mapping[str, object]
    mae: Mapping[str, object]
    paka: Mapping[str, object]


class PretrainArguments(RunArguments, total=False):
    """All of ``gtsa.pretraining.settings.Pretrain`` but ``data``."""

    out: Path | None
