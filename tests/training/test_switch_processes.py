"""Switches of GTSA in two processes: statistics of a batch are those of the whole batch, sharded or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import test_sharding
import torch
from test_sharding import together, train

SWITCHES: dict[str, Any] = {
    "center_targets": True, "region_loss": "prototypes", "regularizer": "sigreg", "image_weight": 0.5,
    "num_prototypes": 16,
}  # fmt: skip


def train_switched(rank: int, ranks: int, ways: list[bool]) -> list[dict[str, Any]]:
    test_sharding.SETTINGS["gtsa"] |= SWITCHES
    return [train("gtsa", rank, ranks, shard)[0] for shard in ways]


def test_two_processes_have_the_statistics_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Running means, SIGReg, and the balance and weights of prototypes. The loss is a mean over all of the batch."""
    monkeypatch.setitem(test_sharding.SETTINGS, "gtsa", dict(test_sharding.SETTINGS["gtsa"]))
    (alone,) = train_switched(0, 1, [False])
    for ddp, sharded in together(train_switched, tmp_path, 2, [False, True]):
        for actual in (ddp, sharded):
            for expected, parts in zip(alone["parts"], actual["parts"], strict=True):
                assert parts == pytest.approx(expected, rel=1e-4, abs=1e-4)
            for name in ("student_centre", "teacher_centre", "image_loss.centre"):
                key = f"{name}.value"
                assert alone["weights"][key].abs().max() > 1e-3
                torch.testing.assert_close(actual["weights"][key], alone["weights"][key], rtol=1e-4, atol=1e-5)
