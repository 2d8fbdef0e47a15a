"""The run folder: one run at a time, its configuration, logs and pictures.

config.yaml, images.jsonl, scan.json, metrics.jsonl, health.jsonl, evaluations.jsonl, events.out.tfevents.*, train.log,
checkpoints/, best/, pictures/, exports/timm/
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from gtsa.checkpoint import store
from gtsa.core import Remedy

IMAGES = "images.jsonl"  # one line for each usable image: its numbers mean these for ever
LOGS = ("metrics.jsonl", "health.jsonl", "evaluations.jsonl")
OURS = (
    "config.yaml", IMAGES, "scan.json", "train.log", *LOGS, "events.out.tfevents.*",
    "checkpoints/step-*", "checkpoints/.draft-*", "checkpoints/.old-*",
    "best/checkpoints/step-*", "best/checkpoints/.draft-*", "best/checkpoints/.old-*",
    "pictures/features-*.png", "exports/timm",
)  # fmt: skip
BEFORE = ("config.yaml", "scan.json", "train.log")  # all that a start leaves which failed before there were images


class Run:
    """A folder that this process writes a run into; other processes are kept out until ``close``.

    Args:
        folder: where; made if it is not there.
        resume: go on with the run that is there (or start one in a folder that is empty, or holds a failed start).
        overwrite: ``begin`` removes what a run of ours wrote there, and nothing else.

    Raises:
        Remedy: the folder holds something and neither way on was asked for, or another run writes into it.
    """

    def __init__(self, folder: str | Path, resume: bool = False, overwrite: bool = False) -> None:
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise Remedy(f"--out {folder} is a file; give a folder")
        found = [p for p in self._entries() if p.name != ".lock"]
        begun = not all(p.name in BEFORE for p in found)
        if begun and not (resume or overwrite):
            raise Remedy(
                f"--out {folder} is not empty ({found[0].name}{', ...' if len(found) > 1 else ''}): go on with the run "
                "there with --resume, replace it with --overwrite, or give another folder"
            )
        if begun and not any((self.folder / name).is_file() for name in ("config.yaml", IMAGES)):
            way = "--resume" if resume else "--overwrite"
            raise Remedy(f"{way}: {folder} holds files but no run of gtsa; give the run's own folder, or a new one")
        made = not self.folder.exists()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock()
        except OSError as error:
            raise Remedy(f"--out {folder} cannot be written: {error.strerror}; give another folder", 6) from None
        self._made = made
        self._writer: SummaryWriter | None = None

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
        return self.folder / "checkpoints"

    def path(self, *names: str) -> Path:
        """A place in the folder; the folders above it are made."""
        place = self.folder.joinpath(*names)
        place.parent.mkdir(parents=True, exist_ok=True)
        return place

    def write(self, name: str, text: str) -> None:
        store(self.path(name), text.encode())

    def start_logs(self, step: int, done: bool = False) -> None:
        """Opens the logs for steps after ``step``; what an interrupted run wrote beyond it goes.

        Of a run that was ``done`` the last look goes too, and of one that begins the first: it is taken again.
        """
        for log in map(self.path, LOGS):
            if log.exists():
                last = step - 1 if (done or not step) and log.name != LOGS[0] else step
                kept = [line for line in log.read_text().splitlines() if _step(line) <= last]
                store(log, "".join(f"{line}\n" for line in kept).encode())
        self._writer = SummaryWriter(str(self.folder), purge_step=step + 1 if step else None)

    def log(self, step: int, values: Mapping[str, float], file: str = "metrics.jsonl", **words: str) -> None:
        """One line of a log file, and the numbers to TensorBoard."""
        assert self._writer is not None
        told = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._append(file, json.dumps({"step": step, **words, **told}, allow_nan=False))
        for name, value in values.items():
            self._writer.add_scalar(name if file == "metrics.jsonl" else f"{Path(file).stem}/{name}", value, step)

    def note(self, text: str) -> None:
        """A line of train.log."""
        self._append("train.log", f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}")

    def close(self) -> None:
        """Gives the lock back; a folder that was made for a run which never began goes."""
        if self._writer is not None:
            self._writer.close()
        if self._made and [p.name for p in self._entries()] == [".lock"]:
            (self.folder / ".lock").unlink()
            self.folder.rmdir()
        os.close(self._descriptor)

    @property
    def began(self) -> bool:
        return (self.folder / IMAGES).exists()

    def _append(self, name: str, line: str) -> None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW  # a planted link is not followed
        with open(os.open(self.path(name), flags, 0o644), "a") as file:
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
            raise Remedy(
                f"another run is writing into {self.folder}; wait for it, stop it, or give another --out", 6
            ) from None

    def _remove(self) -> None:
        """Removes what a run wrote, by name and pattern; what else lies there, or in its folders, stays."""
        for pattern in OURS:
            for path in self.folder.glob(pattern):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                elif not path.is_symlink():
                    path.unlink()
        for folder in ("checkpoints", "best/checkpoints", "best", "pictures", "exports"):
            with suppress(OSError):  # it is not there, or holds something else
                (self.folder / folder).rmdir()


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a line that was cut short
