"""The run folder: one run at a time, its configuration, logs and pictures.

config.yaml, images.jsonl, scan.json, metrics.jsonl, health.jsonl, evaluations.jsonl, events.out.tfevents.*, train.log,
checkpoints/, best/, pictures/, exports/timm/
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from gtsa.core import files
from gtsa.core.errors import UserError
from gtsa.core.files import IMAGES
from gtsa.core.terminal import say
from gtsa.training import checkpoint
from gtsa.training.events import NAMES, Events

LOGS = ("metrics.jsonl", "health.jsonl", "evaluations.jsonl")
CHECKPOINTS = ("checkpoints", "best/checkpoints")
FOLDERS = (*CHECKPOINTS, "best", "pictures", "exports/timm", "exports")  # what lies in another comes before it
OURS = (
    "config.yaml", IMAGES, "scan.json", "train.log", *LOGS, NAMES, "pictures/features-*.png",
    *(f"exports/timm/{name}" for name in ("config.json", "model.safetensors", files.SUMS)),
)  # fmt: skip
BEFORE = ("config.yaml", "scan.json", "train.log")  # all that a start leaves which failed before there were images
_LOCKS: set[int] = set()  # descriptors that hold locks


def _let_go() -> None:
    """A worker does not hold the lock of its run: it can outlive it by seconds."""
    for descriptor in _LOCKS:
        os.close(descriptor)
    _LOCKS.clear()


os.register_at_fork(after_in_child=_let_go)


class RunFolder:
    """A folder that this process writes a run into; other processes are kept out until ``close``.

    Args:
        folder: where; made if it is not there.
        resume: go on with the run that is there (or start one in a folder that is empty, or holds a failed start).
        overwrite: ``begin`` removes what a run of ours wrote there, and nothing else.

    Raises:
        UserError: the folder holds something and neither way on was asked for (2), or links that lead out of it (8), or
            another run writes into it (6).
    """

    def __init__(self, folder: str | Path, resume: bool = False, overwrite: bool = False) -> None:
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"--out {folder} is a file; give a folder")
        found = [p for p in self._entries() if p.name != ".lock" and not files.is_draft(p.name, *BEFORE, IMAGES)]
        begun = not all(p.name in BEFORE for p in found)
        if begun and not (resume or overwrite):
            raise UserError(
                f"--out {folder} is not empty ({found[0].name}{', ...' if len(found) > 1 else ''}): go on with the run "
                "there with --resume, replace it with --overwrite, or give another folder"
            )
        if begun and not any((self.folder / name).is_file() for name in ("config.yaml", IMAGES)):
            way = "--resume" if resume else "--overwrite"
            raise UserError(f"{way}: {folder} holds files but no run of gtsa; give the run's own folder, or a new one")
        for name in (*FOLDERS, "train.log", *LOGS):
            self._no_link(name)
        made = not self.folder.exists()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock()
            self._itself = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise UserError(f"--out {folder} cannot be written: {error.strerror}; give another folder", 6) from None
        self._made = made
        self._events: Events | None = None

    def begin(self, files: Mapping[str, str]) -> None:
        """Writes the first files of a run, once all that could refuse it has been opened; none where it goes on.

        Only now the run that was here goes, if it is to be replaced.
        """
        if files:
            self._remove()
        for name, text in files.items():
            self.write(name, text)

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints are kept; not necessarily there."""
        return self.path("checkpoints")

    def path(self, *names: str) -> Path:
        """A place in the folder to write to; the folders above it are made.

        Raises:
            UserError: the run folder was renamed, removed or replaced since it was opened (6), or a link lies on the
                way (8).
        """
        self._still_there()
        self._no_link(*names)
        place = self.folder.joinpath(*names)
        place.parent.mkdir(parents=True, exist_ok=True)
        return place

    def write(self, name: str, contents: str | bytes) -> None:
        files.store(self.path(name), contents.encode() if isinstance(contents, str) else contents)

    def start_logs(self, step: int, done: bool = False) -> None:
        """Opens the logs for steps after ``step``; what an interrupted run wrote beyond it goes, and so do its drafts.

        Of a run that was ``done`` the last look goes too, and of one that begins the first: it is taken again. A line
        that cannot be read goes, and is told of unless it is the last, where an end in mid-write leaves one.
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
                if bad := steps[:-1].count(None):
                    self.note(f"{log.name}: {bad} lines could not be read and were left out")
        self._events = Events(self.folder, step)

    def log(self, step: int, values: Mapping[str, float], file: str = "metrics.jsonl", **words: str) -> None:
        """One line of a log file, and the numbers to TensorBoard."""
        assert self._events is not None
        told = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._append(file, json.dumps({"step": step, **words, **told}, allow_nan=False))
        start = "" if file == "metrics.jsonl" else f"{Path(file).stem}/"
        self._events.add(step, {f"{start}{name}": value for name, value in values.items()})

    def note(self, text: str) -> None:
        """A line of train.log."""
        self._append("train.log", f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}")

    def close(self) -> None:
        """Gives the lock back; a folder that was made for a run which never began goes."""
        with suppress(OSError):
            if self._made and [p.name for p in self._entries()] == [".lock"]:
                (self.folder / ".lock").unlink()
                self.folder.rmdir()
        os.close(self._itself)
        _LOCKS.discard(self._descriptor)
        os.close(self._descriptor)

    @property
    def began(self) -> bool:
        return (self.folder / IMAGES).exists()

    @property
    def has_checkpoints(self) -> bool:
        return any(self.checkpoints.glob("step-*"))

    def _append(self, name: str, line: str) -> None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW  # a planted link is not followed
        place = self.path(name)
        with files.named(place), open(os.open(place, flags, 0o644), "a") as file:
            file.write(line + "\n")

    def _entries(self) -> list[Path]:
        return sorted(self.folder.iterdir()) if self.folder.is_dir() else []

    def _lock(self) -> None:
        """The lock is the kernel's: it goes with the process, however that ends."""
        self._descriptor = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._descriptor)
            raise UserError(
                f"another run is writing into {self.folder}; wait for it, stop it, or give another --out", 6
            ) from None
        _LOCKS.add(self._descriptor)

    def _still_there(self) -> None:
        try:
            same = os.path.samestat(os.stat(self.folder), os.fstat(self._itself))
        except OSError:
            same = False
        if not same:
            raise UserError(
                f"the run folder {self.folder} was renamed, removed or replaced while the run was writing into it; "
                "bring it back, or give its new name with --out, then go on with --resume",
                6,
            )

    def _no_link(self, *names: str) -> None:
        """Raises UserError where a place in the folder, or a folder above it, is a link (8): it would lead out."""
        place = self.folder.joinpath(*names)
        for step in (place, *place.parents):
            if step == self.folder:
                return
            if step.is_symlink():
                raise UserError(
                    f"{step} is a symbolic link to {os.readlink(step)}: nothing is written or removed there, because "
                    "it is not the run's own. Remove the link, or give another --out (which may lie on another disk)",
                    8,
                )

    def _remove(self) -> None:
        """Removes what a run wrote, by name and pattern; what else lies there, stays and is named."""
        for pattern in OURS:
            for path in self.folder.glob(pattern):
                if path.is_file() and not path.is_symlink():
                    path.unlink()
        for folder in map(self.folder.joinpath, CHECKPOINTS):
            checkpoint.clear(folder)
            for place in filter(checkpoint.is_ours, checkpoint.listing(folder)):
                checkpoint.remove(place)
        for name in FOLDERS:
            with suppress(OSError):  # it is not there, or holds something else
                (self.folder / name).rmdir()
        if left := self._others():
            more = f" and {len(left) - 10} more" if len(left) > 10 else ""
            say(f"left alone in {self.folder}, because no run wrote it: {', '.join(map(repr, left[:10]))}{more}")

    def _others(self) -> list[str]:
        """What lies in the folder, and in those that runs write into, beside these and the lock."""
        found = [p.name for p in self._entries() if p.name != ".lock" and p.name not in FOLDERS]
        for name in FOLDERS:
            if (self.folder / name).is_dir():
                inside = sorted(f"{name}/{p.name}" for p in (self.folder / name).iterdir())
                found += [entry for entry in inside if entry not in FOLDERS]
        return found


def _step(line: bytes) -> float | None:
    """The step that a line of a log is about; None where it cannot be read."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None
