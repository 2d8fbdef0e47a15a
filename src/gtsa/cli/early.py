"""Checks before anything heavy is imported: wrong settings, and paths that do not exist."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gtsa.cli.examples import EXAMPLES
from gtsa.comparison.settings import Compare
from gtsa.core.errors import UserError, escaped
from gtsa.core.settings import validated
from gtsa.data.shards import shard_plan
from gtsa.data.sources import check_exists, may_exist
from gtsa.evaluation import embed_requirements
from gtsa.evaluation.explore import requirements
from gtsa.evaluation.settings import Evaluate
from gtsa.models.formats import ELSEWHERE, no_weights
from gtsa.pretraining.requested import requested_settings
from gtsa.pretraining.run_record import check_is_run
from gtsa.training.loggers import check_installed


def pretrain(given: Mapping[str, Any]) -> None:
    settings = requested_settings(given, show=False)
    check_installed(settings.loggers)
    data(settings.data)
    if settings.init:
        weights(settings.init)


def evaluate(given: Mapping[str, Any]) -> None:
    with _example_if_missing("evaluate", given, "task", "train", "val"):
        settings = validated(Evaluate, given)
    weights(settings.weights)
    labelled(settings.train, settings.val)


def compare(given: Mapping[str, Any]) -> None:
    with _example_if_missing("compare", given, "data", "out", "train", "val"):
        settings = validated(Compare, given)
    data(settings.data)
    if settings.only != "training":
        labelled(settings.train, settings.val)


def embed(given: Mapping[str, Any]) -> None:
    names = ("tokens", "dtype", "size", "shard_size", "batch_size", "workers", "max_bad")
    embed_requirements.check_arguments(
        Path(given["out"]), range16=given.get("range16"), **{name: given[name] for name in names}
    )
    weights(given["weights"])
    data(given["data"])


@contextmanager
def _example_if_missing(verb: str, given: Mapping[str, Any], *needed: str) -> Iterator[None]:
    """Adds a complete command to a UserError if one of ``needed`` is not given; --folds stands for --val."""
    try:
        yield
    except UserError as error:
        if any(name not in given and not (name == "val" and "folds" in given) for name in needed):
            raise UserError(f"{error}\nexample: {EXAMPLES[verb]}", error.code) from None
        raise


def explore(given: Mapping[str, Any]) -> None:
    requirements.check_arguments(given["size"], given["port"])
    for name in ("weights", "against"):
        if given[name] is not None:
            weights(given[name])
    data(given["data"])


def shard(images: str, out: str, shard_size: str, images_per_shard: int | None) -> None:
    shard_plan.limits_of(shard_size, images_per_shard)
    shard_plan.check_folder(Path(out))
    data(images)


def data(path: str) -> None:
    """Raises UserError where the data do not exist (3), or a library for them is missing (2)."""
    check_exists(path)


def weights(spec: str) -> None:
    """Raises UserError (4) where the weights do not exist."""
    if not spec.startswith(ELSEWHERE) and not os.path.exists(spec):
        raise no_weights(spec)


def run(path: str) -> None:
    """Raises UserError (2) where there is no run."""
    check_is_run(Path(path))


def labelled(*sets: Sequence[str]) -> None:
    """Raises UserError (3) where one of IMAGES [LABELS] does not exist."""
    for path in (path for paths in sets for path in paths):
        if not may_exist(path):
            raise UserError(f"{escaped(path)}: there is no such file or folder", 3)
