"""Files that are there whole or not at all: drafts, checksums, and a seal for text.

A file or folder NAME is written as ``.NAME.PROCESS`` beside its place, flushed to the disk, and renamed.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path

IMAGES = "images.jsonl"  # of a run: one line for each usable image, whose numbers mean these for ever
SUMS = "gtsa.sha256"  # of a folder's files, as ``sha256sum --check`` reads it
SEAL = "# sha256 of the lines above: "
DRAFT = re.compile(r"\.(?P<name>.+)\.(?P<process>\d+)", re.DOTALL)


def store(path: Path, data: bytes) -> None:
    """Writes a file so that it is there whole or not at all."""
    draft = draft_of(path)
    try:
        write(draft, data)
        draft.replace(path)
    except BaseException:
        with suppress(OSError):
            draft.unlink()
        raise
    flush(path.parent)


def write(path: Path, data: bytes) -> str:
    """Writes a file through to the disk and returns its SHA-256; a link in its place is not followed."""
    with named(path), open(path, "wb", opener=_no_link) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(data).hexdigest()


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Gives an error of the disk the name of the file, which a write that fails does not have."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(folder: Path) -> None:
    """Makes the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def draft_of(path: Path) -> Path:
    """Where this process writes what is to be ``path``."""
    return path.with_name(f".{path.name}.{os.getpid()}")


def is_draft(name: str, *patterns: str) -> bool:
    """Whether a name is that of a draft of a name like ``patterns``."""
    found = DRAFT.fullmatch(name)
    return found is not None and any(fnmatchcase(found["name"], pattern) for pattern in patterns)


def clear_drafts(folder: Path, *patterns: str) -> None:
    """Removes drafts of names like ``patterns`` whose process is gone; links stay, and whatever cannot be removed."""
    with suppress(OSError):
        for path in list(folder.iterdir()):
            if not is_draft(path.name, *patterns) or path.is_symlink() or _alive(int(path.name.rpartition(".")[2])):
                continue
            with suppress(OSError):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


# Checksums


def sums(digests: Mapping[str, str]) -> str:
    """{file name: SHA-256} as ``sha256sum`` writes it."""
    return "".join(f"{value}  {name}\n" for name, value in sorted(digests.items()))


def changed(folder: Path) -> str:
    """The first file that is not what SUMS says, or SUMS itself; empty where all is well.

    A folder without SUMS was not written by us, or before there was one: nothing is known of it.
    """
    if not (folder / SUMS).is_file():
        return ""
    raw = (folder / SUMS).read_bytes()
    if not is_sealed(raw):
        return SUMS
    for line in raw.decode().splitlines():
        value, _, name = line.partition("  ")
        if not line.startswith("#") and (not (folder / name).is_file() or digest(folder / name) != value):
            return name
    return ""


def sum_of(path: Path) -> Path:
    """Where the checksum of a single file lies."""
    return path.with_name(f"{path.name}.sha256")


def changed_since(path: Path) -> bool:
    """Whether a single file is not what the checksum beside it says; without one nothing is known of it."""
    if not sum_of(path).is_file():
        return False
    told = sum_of(path).read_text(errors="replace").split()[:1]
    return told != [digest(path)]


def sealed(text: str) -> str:
    """Text with a last line that tells whether it was changed; a comment in YAML and for sha256sum."""
    return f"{text}{SEAL}{hashlib.sha256(text.encode()).hexdigest()}\n"


def is_sealed(raw: bytes) -> bool | None:
    """Whether text is as it was sealed; None where no seal is in it."""
    head, found, _ = raw.rpartition(SEAL.encode())
    return raw == sealed(head.decode(errors="replace")).encode() if found else None


def _no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it is another user's
        pass
    return True
