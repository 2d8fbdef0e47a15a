"""The run folder: one run at a time, its configuration, logs and pictures.

config.yaml, images.jsonl, scan.json, plan.json, metrics.jsonl, health.jsonl, evaluations.jsonl, events.out.tfevents.*,
train.log, loggers.json, report.html, checkpoints/, best/, pictures/, exports/timm/
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from gtsa.core import files
from gtsa.core.errors import UserError
from gtsa.core.files import IMAGES
from gtsa.core.terminal import say
from gtsa.training import checkpoint
from gtsa.training.events import NAMES, Events
from gtsa.training.loggers import RECORD, Loggers

LOGS = ("metrics.jsonl", "health.jsonl", "evaluations.jsonl")
CHECKPOINTS = ("checkpoints", "best/checkpoints")
FOLDERS = (*CHECKPOINTS, "best", "pictures", "exports/timm", "exports")  # inner folders come before outer ones
OURS = (
    "config.yaml", IMAGES, "scan.json", "plan.json", "train.log", "report.html", RECORD, *LOGS, NAMES,
    "pictures/features-*.png",
    *(f"exports/timm/{name}" for name in ("config.json", "model.safetensors", files.SUMS, "README.md")),
)  # fmt: skip
BEFORE = ("config.yaml", "scan.json", "train.log")  # what a start leaves that failed before images were listed
_LOCKS: set[int] = set()  # descriptors that hold locks


def _release_locks() -> None:
    """A worker process does not hold the lock of its run: it can outlive the run by seconds."""
    for descriptor in _LOCKS:
        os.close(descriptor)
    _LOCKS.clear()


os.register_at_fork(after_in_child=_release_locks)


def note(run: RunFolder | None, text: str) -> None:
    """Tells the user, and the run's log; nothing in processes without the run folder."""
    if run:
        run.note(text)
        say(text)


class RunFolder:
    """A folder that this process writes a run into. Until ``close`` it is locked for other processes.

    Args:
        folder: made if it does not exist.
        resume: resume the run in the folder, or start one if the folder is empty or holds a failed start.
        overwrite: ``begin`` removes what a run of ours wrote there, and nothing else.

    Raises:
        UserError: the folder is not empty, without ``resume`` and ``overwrite`` (2); it holds links that lead out of it
            (8); another run writes into it (6).
    """

    def __init__(self, folder: str | Path, resume: bool = False, overwrite: bool = False) -> None:
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"--out {folder} is a file; give a folder")
        entries = [p for p in self._entries() if p.name != ".lock" and not files.is_draft(p.name, *BEFORE, IMAGES)]
        begun = not all(p.name in BEFORE for p in entries)
        if begun and not (resume or overwrite):
            raise UserError(
                f"--out {folder} is not empty ({entries[0].name}{', ...' if len(entries) > 1 else ''}): resume its run "
                "with --resume, replace it with --overwrite, or give another folder"
            )
        if begun and not any((self.folder / name).is_file() for name in ("config.yaml", IMAGES)):
            flag = "--resume" if resume else "--overwrite"
            raise UserError(f"{flag}: {folder} holds files but no run of gtsa; give the run's own folder, or a new one")
        for name in (*FOLDERS, "train.log", *LOGS):
            self._refuse_link(name)
        made = not self.folder.exists()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock()
            self._opened = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise UserError(f"--out {folder} cannot be written: {error.strerror}; give another folder", 6) from None
        self._made = made
        self._events: Events | None = None
        self._loggers: Loggers | None = None

    def begin(self, files: Mapping[str, str]) -> None:
        """Writes the first files of a new run; there are none if a run is resumed.

        It is called once nothing can fail any more that the user can correct. Only then is a run removed that is to be
        replaced.
        """
        if files:
            self._remove()
        for name, text in files.items():
            self.write(name, text)

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints, which may not exist yet."""
        return self.path("checkpoints")

    def path(self, *names: str) -> Path:
        """A path in the folder to write to; the folders above it are made.

        Raises:
            UserError: the run folder was renamed, removed or replaced since it was opened (6), or a part of the path is
                a link (8).
        """
        self._check_folder()
        self._refuse_link(*names)
        path = self.folder.joinpath(*names)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def write(self, name: str, contents: str | bytes) -> None:
        files.store(self.path(name), contents.encode() if isinstance(contents, str) else contents)

    def start_logs(self, step: int, done: bool = False) -> None:
        """Opens the logs for steps after ``step``. Lines of later steps and drafts of an interrupted run are removed.

        The evaluation at ``step`` is repeated if the run is ``done`` or begins, so its line is removed too. Unreadable
        lines are removed and noted, but for the last: an interrupted write leaves one.
        """
        for folder in (self.folder, self.folder / "pictures", self.folder / "exports"):
            files.clear_drafts(folder, *(Path(pattern).name for pattern in OURS), "timm")
        for folder in map(self.folder.joinpath, CHECKPOINTS):
            checkpoint.clear(folder)
        for log in map(self.path, LOGS):
            if log.exists():
                last = step - 1 if (done or not step) and log.name != LOGS[0] else step
                lines = [line for line in log.read_bytes().split(b"\n") if line]
                steps = [_step(line) for line in lines]
                kept = [line + b"\n" for line, at in zip(lines, steps, strict=True) if at is not None and at <= last]
                files.store(log, b"".join(kept))
                if unreadable := steps[:-1].count(None):
                    self.note(f"{log.name}: {unreadable} lines could not be read and were left out")
        self._events = Events(self.folder, step)

    def open_loggers(self, names: Sequence[str], config: Mapping[str, Any]) -> None:
        """Starts or continues runs of W&B and MLflow that get the same numbers as the logs, until ``close_loggers``."""
        if names:
            self._check_folder()
            self._loggers = Loggers(names, self.folder, LOGS, config, lambda text: note(self, text))

    def close_loggers(self, finished: bool) -> None:
        """Ends the runs of W&B and MLflow."""
        if self._loggers:
            self._loggers.close(finished)

    def log(self, step: int, values: Mapping[str, float], file: str = "metrics.jsonl", **labels: object) -> None:
        """Writes a line of a log file, and the numbers to TensorBoard and the other loggers.

        ``labels``: further plain values of the line.
        """
        assert self._events is not None
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._append(file, json.dumps({"step": step, **labels, **finite}, allow_nan=False))
        prefix = "" if file == "metrics.jsonl" else f"{Path(file).stem}/"
        named = {f"{prefix}{name}": value for name, value in values.items()}
        self._events.add(step, named)
        if self._loggers:
            self._loggers.log(file, step, named)

    def note(self, text: str) -> None:
        """Writes a line of train.log."""
        self._append("train.log", f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}")

    def close(self) -> None:
        """Releases the lock. A folder that was made for a run which never began is removed."""
        self.close_loggers(finished=False)
        with suppress(OSError):
            if self._made and [p.name for p in self._entries()] == [".lock"]:
                (self.folder / ".lock").unlink()
                self.folder.rmdir()
        os.close(self._opened)
        _LOCKS.discard(self._descriptor)
        os.close(self._descriptor)

    @property
    def began(self) -> bool:
        """Whether the folder has a list of images."""
        return (self.folder / IMAGES).exists()

    @property
    def has_checkpoints(self) -> bool:
        return any(self.checkpoints.glob("step-*"))

    def _append(self, name: str, line: str) -> None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW  # a planted link is not followed
        path = self.path(name)
        with files.name_in_errors(path), open(os.open(path, flags, 0o644), "a") as file:
            file.write(line + "\n")

    def _entries(self) -> list[Path]:
        return sorted(self.folder.iterdir()) if self.folder.is_dir() else []

    def _lock(self) -> None:
        """Takes the kernel's lock, which ends with the process, however that ends."""
        self._descriptor = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._descriptor)
            raise UserError(
                f"another run is writing into {self.folder}; wait for it, stop it, or give another --out", 6
            ) from None
        _LOCKS.add(self._descriptor)

    def _check_folder(self) -> None:
        """Raises UserError where the folder is not the one that was opened (6)."""
        try:
            same = os.path.samestat(os.stat(self.folder), os.fstat(self._opened))
        except OSError:
            same = False
        if not same:
            raise UserError(
                f"the run folder {self.folder} was renamed, removed or replaced while the run was writing into it; "
                "restore it, or give its new name with --out, then resume with --resume",
                6,
            )

    def _refuse_link(self, *names: str) -> None:
        """Raises UserError where a path in the folder, or a folder above it, is a link (8): it would lead out."""
        path = self.folder.joinpath(*names)
        for part in (path, *path.parents):
            if part == self.folder:
                return
            if part.is_symlink():
                raise UserError(
                    f"{part} is a symbolic link to {os.readlink(part)}: nothing is written or removed there, because "
                    "it is not the run's own. Remove the link, or give another --out (which may lie on another disk)",
                    8,
                )

    def _remove(self) -> None:
        """Removes what a run wrote, by name and pattern. Other files stay and are named."""
        for pattern in OURS:
            for path in self.folder.glob(pattern):
                if path.is_file() and not path.is_symlink():
                    path.unlink()
        for folder in map(self.folder.joinpath, CHECKPOINTS):
            checkpoint.clear(folder)
            for path in filter(checkpoint.is_ours, checkpoint.listing(folder)):
                checkpoint.remove(path)
        for name in FOLDERS:
            with suppress(OSError):  # it does not exist, or holds other files
                (self.folder / name).rmdir()
        if others := self._other_files():
            more = f" and {len(others) - 10} more" if len(others) > 10 else ""
            say(f"not removed from {self.folder}, because no run wrote it: {', '.join(map(repr, others[:10]))}{more}")

    def _other_files(self) -> list[str]:
        """Entries of the run folder and its folders, beside these folders and the lock."""
        others = [p.name for p in self._entries() if p.name != ".lock" and p.name not in FOLDERS]
        for name in FOLDERS:
            if (self.folder / name).is_dir():
                inside = sorted(f"{name}/{p.name}" for p in (self.folder / name).iterdir())
                others += [entry for entry in inside if entry not in FOLDERS]
        return others


def _step(line: bytes) -> float | None:
    """The step of a line of a log; None where it cannot be read."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None
