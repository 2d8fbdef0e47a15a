"""The content of a run folder in any state: finished, in progress, stopped, killed, or of an early version."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from gtsa.core.errors import UserError, escaped
from gtsa.core.files import IMAGES
from gtsa.core.settings import validated
from gtsa.core.settings_file import read_yaml
from gtsa.pretraining.settings import Pretrain
from gtsa.training import checkpoint

PLAN = "plan.json"  # the rows of the plan, with their reasons, as the run began
Entry = Mapping[str, Any]  # a line of a log


@dataclass
class RunRecord:
    """The files of a run folder, read.

    Attributes:
        plan: rows of the plan: name, value, reason; none in runs of early versions.
        metrics, health, evaluations: lines of the logs, by ascending step.
        scan: the report on every file; empty where it is missing.
        unreadable: {image: reason} that became unreadable during training, by index in ``images``.
        images: names of the run's images.
        notes: lines of train.log.
        missing: sentences on what the folder lacks.
    """

    folder: Path
    settings: Pretrain
    plan: list[tuple[str, str, str]] = field(default_factory=list)
    metrics: list[Entry] = field(default_factory=list)
    health: list[Entry] = field(default_factory=list)
    evaluations: list[Entry] = field(default_factory=list)
    scan: Mapping[str, Any] = field(default_factory=dict)
    images: list[str] = field(default_factory=list)
    unreadable: dict[int, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    in_progress: bool = False

    @property
    def step(self) -> int:
        """The last step that a log has."""
        return max((int(log[-1]["step"]) for log in (self.metrics, self.health, self.evaluations) if log), default=0)

    @property
    def state(self) -> Literal["finished", "in progress", "stopped", "interrupted"]:
        """What became of the run. ``interrupted``: it ended without a word, e.g. because its process was killed."""
        last = self.notes[-1].partition(" ")[2].partition(" ")[2] if self.notes else ""
        if any(" done: " in note for note in self.notes) and self.health and self.step >= self.settings.steps:
            return "finished"
        if self.in_progress:
            return "in progress"
        return "stopped" if last.startswith("ended") else "interrupted"

    @property
    def end(self) -> str:
        """The run's own words on why it ended early; empty where there are none."""
        return self.notes[-1].partition("ended")[2].removeprefix(":").strip() if self.state == "stopped" else ""

    def noted(self, name: str) -> str:
        """The text of the last note ``name: text`` of the run's log."""
        texts = [note.partition(f" {name}: ")[2] for note in self.notes]
        return next((text for text in reversed(texts) if text), "")


def check_is_run(folder: Path) -> None:
    """Raises UserError where ``folder`` is not a run (2)."""
    where = escaped(str(folder))
    if not folder.exists():
        raise UserError(f"{where}: there is no such folder; give the --out of a gtsa pretrain")
    if (folder / "cells").is_dir() and (folder / "report.html").is_file():
        raise UserError(f"{where} is a comparison; its page is {where}/report.html")
    if not any((folder / name).is_file() for name in ("config.yaml", IMAGES)) and not (folder / "checkpoints").is_dir():
        raise UserError(f"{where} holds no run of gtsa; give the --out of a gtsa pretrain")


def read_run(folder: Path, in_progress: bool | None = None) -> RunRecord:
    """Reads a run folder; ``missing`` of the result says what is missing or damaged.

    Args:
        in_progress: whether a process writes into the folder; None: by its lock.

    Raises:
        UserError: it is not a run (2), or nothing says its settings (4).
    """
    check_is_run(folder)
    values = checkpoint.newest_state(folder / "checkpoints")
    record = RunRecord(folder, _read_settings(folder, values.get("settings")))
    record.in_progress = _is_locked(folder) if in_progress is None else in_progress
    record.plan = [(row["name"], row["value"], row["reason"]) for row in _read_json(record, PLAN, [])]
    for name in ("metrics", "health", "evaluations"):
        setattr(record, name, _read_log(record, f"{name}.jsonl"))
    record.scan = _read_json(record, "scan.json", {})
    record.images = [str(entry.get("name", "")) for entry in _read_lines(record, IMAGES)]
    record.unreadable = {int(image): str(reason) for image, reason in values.get("unreadable", {}).items()}
    log = folder / "train.log"
    record.notes = log.read_text(errors="replace").splitlines() if log.is_file() else []
    return record


def _read_settings(folder: Path, kept: Mapping[str, Any] | None) -> Pretrain:
    """From config.yaml, or from the newest checkpoint (``kept``)."""
    try:
        return validated(Pretrain, read_yaml(folder / "config.yaml", schema=1))
    except UserError as error:
        if kept is None:
            reason = f"{folder}/config.yaml cannot be read ({error}), and no checkpoint has the settings"
            raise UserError(f"{reason}; restore config.yaml", 4) from None
        return validated(Pretrain, kept)


def _read_log(record: RunRecord, name: str) -> list[Entry]:
    """The lines of a log that have a step, in their order."""
    entries = [entry for entry in _read_lines(record, name) if isinstance(entry.get("step"), int | float)]
    return sorted(entries, key=lambda entry: float(entry["step"]))


def _read_lines(record: RunRecord, name: str) -> list[Entry]:
    path = record.folder / name
    if not path.is_file():
        return []
    entries: list[Entry] = []
    damaged = 0
    for line in path.read_bytes().splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if isinstance(entry, dict):
            entries.append(entry)
        else:
            damaged += 1
    if damaged and not (damaged == 1 and record.in_progress):  # a line may be half written
        lines = "1 line" if damaged == 1 else f"{damaged} lines"
        record.missing.append(f"{name}: {lines} cannot be read.")
    return entries


def _read_json(record: RunRecord, name: str, default: Any) -> Any:
    """The values in a JSON file of the kind of ``default``, which stands for a missing or damaged file."""
    path = record.folder / name
    try:
        values = json.loads(path.read_bytes())
        if isinstance(values, type(default)):
            return values
        problem = "has other content than expected"
    except FileNotFoundError:
        problem = "is missing" + (": the run began with a version of gtsa that did not keep it" if name == PLAN else "")
    except (OSError, ValueError) as error:
        problem = f"cannot be read ({error})"
    record.missing.append(f"{name} {problem}.")
    return default


def plan_text(rows: Sequence[tuple[str, object, str]]) -> str:
    """The content of PLAN."""
    return json.dumps([{"name": n, "value": str(v), "reason": r} for n, v, r in rows], indent=1) + "\n"


def _is_locked(folder: Path) -> bool:
    """Whether a process holds the lock of the run. The lock is shared for an instant; a start at that instant fails."""
    try:
        with open(folder / ".lock", "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
