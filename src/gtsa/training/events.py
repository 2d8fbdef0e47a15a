"""TensorBoard's events: one file per run, which a resumed run continues."""

from __future__ import annotations

import io
import os
import socket
import struct
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from gtsa.core.files import name_in_errors

NAMES = "events.out.tfevents.*"
VERSION = "brain.Event:2"
HEAD, TAIL = 12, 4  # bytes of a record before its data (their length, its checksum) and after them (their checksum)


class Events:
    """The newest events file in ``folder``, or a new one. Nothing is written before the first numbers.

    Args:
        step: steps done before; TensorBoard drops what an interrupted run wrote after it.
    """

    def __init__(self, folder: Path, step: int) -> None:
        existing = [path for path in sorted(folder.glob(NAMES)) if path.is_file() and not path.is_symlink()]
        self.path = existing[-1] if existing else folder / _name()
        self.first = [Event(wall_time=time.time(), file_version=VERSION)]
        if step:
            start = SessionLog(status=SessionLog.START)
            self.first.append(Event(wall_time=time.time(), step=step + 1, session_log=start))

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Writes {name: number}."""
        now = time.time()
        events = [
            Event(wall_time=now, step=step, summary=Summary(value=[Summary.Value(tag=name, simple_value=value)]))
            for name, value in values.items()
        ]
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
        with name_in_errors(self.path), open(os.open(self.path, flags, 0o644), "r+b") as file:
            if self.first:  # a truncated record would hide all that follow it
                file.truncate(_whole(file, os.fstat(file.fileno()).st_size))
            file.seek(0, os.SEEK_END)
            file.write(_records([*self.first, *events]))
        self.first = []


def _records(events: Iterable[Event]) -> bytes:
    packed = io.BytesIO()
    writer = RecordWriter(packed)
    for event in events:
        writer.write(event.SerializeToString())
    return packed.getvalue()


def _whole(file: io.BufferedRandom, size: int) -> int:
    """Number of bytes of whole records at the start of a file."""
    end = 0
    while end + HEAD <= size:
        file.seek(end)
        (length,) = struct.unpack("<Q", file.read(8))
        if end + HEAD + length + TAIL > size:
            break
        end += HEAD + length + TAIL
    return end


def _name() -> str:
    return f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.0"
