"""Atomic writes, checksums, and a seal for text.

A file or folder NAME is first written as a draft ``.NAME.PROCESS`` in the same folder, flushed to disk, and renamed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

IMAGES = "images.jsonl"  # of a run: one line for each usable image; image indices refer to these lines
SUMS = "gtsa.sha256"  # checksums of a folder's files, in the format of ``sha256sum --check``
SEAL = "# sha256 of the lines above: "
DRAFT = re.compile(r"\.(?P<name>.+)\.(?P<process>\d+)", re.DOTALL)


def cache_folder() -> Path:
    """The folder of gtsa in the user's cache folder; what lies there can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "gtsa"


def store(path: Path, data: bytes) -> None:
    """Writes a file atomically: afterwards it is complete, or unchanged."""
    with _replacement(path) as draft:
        write(draft, data)


@contextmanager
def drafted(path: Path) -> Iterator[Path]:
    """The draft of a file that the block writes; it becomes the file if the block ends without an error."""
    with name_in_errors(path), _replacement(path) as draft:
        yield draft
        with open(draft, "rb") as file:
            os.fsync(file.fileno())


@contextmanager
def _replacement(path: Path) -> Iterator[Path]:
    """A draft that replaces ``path`` after the block, and is removed if the block fails. The block flushes it."""
    draft = draft_of(path)
    try:
        yield draft
        draft.replace(path)
    except BaseException:
        with suppress(OSError):
            draft.unlink()
        raise
    flush(path.parent)


def write(path: Path, data: bytes) -> str:
    """Writes a file through to disk and returns its SHA-256. A link at ``path`` is not followed."""
    with name_in_errors(path), open(path, "wb", opener=_no_link) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(data).hexdigest()


@contextmanager
def name_in_errors(path: Path) -> Iterator[None]:
    """Adds the file name to an OSError. A failed write does not have it."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def check_writable(path: Path) -> None:
    """Raises OSError, whose ``strerror`` names the folder, where ``path`` cannot be written.

    Permissions do not say it all (a disk that is read-only, /proc): a file is made in the folder of ``path``, or the
    nearest above it that exists, and is gone when it is closed.
    """
    nearest = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
    if not nearest.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, f"{nearest} is a file")
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:  # it names the temporary file
        raise OSError(error.errno, f"{nearest} takes no files ({error.strerror or error})") from None


def read_json(path: Path) -> Any:
    """The content of a JSON file; None if there is no such file or it is not JSON."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(folder: Path) -> None:
    """Flushes the file names of a folder to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def draft_of(path: Path) -> Path:
    """The path of this process's draft of ``path``."""
    return path.with_name(f".{path.name}.{os.getpid()}")


def is_draft(name: str, *patterns: str) -> bool:
    """Whether ``name`` is a draft of a file that matches one of ``patterns``."""
    draft = DRAFT.fullmatch(name)
    return draft is not None and any(fnmatchcase(draft["name"], pattern) for pattern in patterns)


def clear_drafts(folder: Path, *patterns: str) -> None:
    """Removes drafts that match ``patterns`` and whose process ended. Links are kept, and what cannot be removed."""
    with suppress(OSError):
        for path in list(folder.iterdir()):
            if not is_draft(path.name, *patterns) or path.is_symlink() or _alive(int(path.name.rpartition(".")[2])):
                continue
            with suppress(OSError):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


# Checksums


def sums(digests: Mapping[str, str]) -> str:
    """{file name: SHA-256} in the format of ``sha256sum``."""
    return "".join(f"{value}  {name}\n" for name, value in sorted(digests.items()))


def find_changed_file(folder: Path) -> str:
    """The first file that differs from its checksum in SUMS, or SUMS itself; empty if none.

    A folder without SUMS is not checked: others wrote it, or an early version.
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
    """The path of a single file's checksum."""
    return path.with_name(f"{path.name}.sha256")


def is_changed(path: Path) -> bool:
    """Whether a single file differs from the checksum beside it; False without a checksum."""
    if not sum_of(path).is_file():
        return False
    expected = sum_of(path).read_text(errors="replace").split()[:1]
    return expected != [digest(path)]


def sealed(text: str) -> str:
    """Text with its checksum as a last line, which is a comment in YAML and for sha256sum."""
    return f"{text}{SEAL}{hashlib.sha256(text.encode()).hexdigest()}\n"


def is_sealed(raw: bytes) -> bool | None:
    """Whether sealed text is unchanged; None without a seal."""
    head, seal, _ = raw.rpartition(SEAL.encode())
    return raw == sealed(head.decode(errors="replace")).encode() if seal else None


def _no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's process
        pass
    return True
