"""What can be refused before anything heavy is imported: wrong settings, and paths where nothing is."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from gtsa.comparison.settings import Compare
from gtsa.core.errors import UserError, escaped
from gtsa.core.settings import validated
from gtsa.data.sources import absent
from gtsa.evaluation.settings import Evaluate
from gtsa.models.formats import ELSEWHERE, no_weights
from gtsa.pretraining.requested import requested_settings


def pretrain(given: Mapping[str, Any]) -> None:
    settings = requested_settings(given, tell=False)
    data(settings.data)
    if settings.init:
        weights(settings.init)


def evaluate(given: Mapping[str, Any]) -> None:
    settings = validated(Evaluate, given)
    weights(settings.weights)
    labelled(settings.train, settings.val)


def compare(given: Mapping[str, Any]) -> None:
    settings = validated(Compare, given)
    data(settings.data)
    labelled(settings.train, settings.val)


def data(place: str) -> None:
    """Raises UserError (3) where there is nothing."""
    if not os.path.exists(place):
        raise absent(place)


def weights(spec: str) -> None:
    """Raises UserError (4) where there is nothing."""
    if not spec.startswith(ELSEWHERE) and not os.path.exists(spec):
        raise no_weights(spec)


def labelled(*sets: Sequence[str]) -> None:
    """Raises UserError (3) where there is nothing under one of IMAGES [LABELS]."""
    for place in (place for places in sets for place in places):
        if not os.path.exists(place):
            raise UserError(f"{escaped(place)}: there is no such file or folder", 3)
