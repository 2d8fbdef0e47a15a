"""Large files on disk and in object storage (S3, GCS, HTTP), listed by pattern and read in byte ranges."""

from __future__ import annotations

import glob
import itertools
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, cast
from urllib.parse import urlsplit

from gtsa.core.errors import UserError
from gtsa.core.extras import require

URL = re.compile(r"(?P<protocol>[a-zA-Z][a-zA-Z0-9+.-]+)://.+")
BRACES = re.compile(r"\{([^{}]*)\}")
MAGIC = re.compile(r"[*?\[]")
DRIVERS = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp"}
IDENTITY = ("ETag", "etag", "Content-MD5", "md5Hash", "Last-Modified", "LastModified", "mtime", "created")
ATTEMPTS = 4  # of a request; a pause of 0.5, 1 and 2 s between them
WINDOW = 2**20  # bytes that a scan of a remote file reads at a time


class Stored(Protocol):
    """A file that is read in ranges.

    Attributes:
        path: path or URL.
        size: bytes.
        mark: {"bytes": size} and what changes with the content: the time of a local file, the ETag of a remote one.
    """

    path: str
    size: int
    mark: dict[str, Any]

    def read(self, offset: int, length: int) -> bytes:
        """``length`` bytes from ``offset``, fewer at the end. Raises OSError, also if the file has changed."""


class LocalFile:
    """A file on disk. It is opened for each range, as other image files are: processes and threads share nothing."""

    def __init__(self, path: str) -> None:
        self.path = path
        status = os.stat(path)
        self.size, self.mark = status.st_size, _mark(status)

    def read(self, offset: int, length: int) -> bytes:
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            if _mark(os.fstat(descriptor)) != self.mark:
                raise OSError(f"{os.path.basename(self.path)} has changed since it was listed")
            parts = []
            while length and (part := os.pread(descriptor, length, offset)):
                parts.append(part)
                offset, length = offset + len(part), length - len(part)
            return parts[0] if len(parts) == 1 else b"".join(parts)
        finally:
            os.close(descriptor)


def _mark(status: os.stat_result) -> dict[str, Any]:
    return {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns}


class RemoteFile:
    """A file behind a URL. A failed request is repeated a few times."""

    def __init__(self, url: str) -> None:
        self.path = url
        info = _attempt(url, lambda files, path: files.info(path))
        if info.get("size") is None:
            raise OSError(f"{url}: the server does not tell its size")
        if info.get("partial") is False:
            raise _no_ranges(url)
        self.size = int(info["size"])
        self.mark = {"bytes": self.size, "etag": next((str(info[key]) for key in IDENTITY if info.get(key)), "")}

    def read(self, offset: int, length: int) -> bytes:
        end = min(self.size, offset + length)
        if end <= offset:
            return b""
        data: bytes = _attempt(self.path, lambda files, path: files.cat_file(path, start=offset, end=end))
        if len(data) != end - offset:
            raise OSError(f"{self.path} has changed since it was listed, or the server ignores byte ranges")
        return data

    def check_ranges(self) -> None:
        """Raises UserError (3) where the server sends the whole file for a range."""

        def end_of(files: Any, path: str) -> bytes:
            with files.open(path, block_size=1, cache_type="none") as file:  # stops at a whole file's header
                file.seek(self.size - 1)
                return bytes(file.read(1))

        if self.size > 1:
            try:
                _attempt(self.path, end_of)
            except ValueError:  # how fsspec reports it
                raise _no_ranges(self.path) from None


@contextmanager
def scanned(file: Stored) -> Iterator[Callable[[int, int], bytes]]:
    """A faster ``read`` for one thread that reads many small ranges in order."""
    if isinstance(file, RemoteFile):
        yield _Window(file).read
        return
    with open(file.path, "rb", buffering=0) as opened:
        yield lambda offset, length: os.pread(opened.fileno(), length, offset)


class _Window:
    """Reads a remote file in large pieces."""

    def __init__(self, file: Stored) -> None:
        self.file, self.start, self.data = file, 0, b""

    def read(self, offset: int, length: int) -> bytes:
        if not self.start <= offset <= offset + length <= self.start + len(self.data):
            self.start, self.data = offset, self.file.read(offset, max(length, WINDOW))
        return self.data[offset - self.start : offset - self.start + length]


def _no_ranges(url: str) -> UserError:
    return UserError(f"{url}: the server does not send parts of files (byte ranges); download the shards first", 3)


def open_stored(path: str) -> LocalFile | RemoteFile:
    """A file by path or URL. Raises OSError."""
    return RemoteFile(path) if is_url(path) else LocalFile(path)


# Names


def holds_only(folder: str, suffix: str, others: Iterable[str]) -> bool:
    """Whether a folder holds files with ``suffix``, and neither folders nor files with a suffix of ``others``."""
    count = 0
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if os.path.splitext(entry.name)[1].lower() in others or entry.is_dir():
                    return False
                count += entry.name.endswith(suffix)
    except OSError:
        return False
    return count > 0


def is_url(path: str) -> bool:
    return URL.match(path) is not None


def is_pattern(path: str) -> bool:
    """Whether a path that does not exist stands for several: it has ``*``, ``?``, ``[...]`` or ``{...}``."""
    return not os.path.lexists(path) and bool(MAGIC.search(path) or BRACES.search(path))


def check_url(url: str) -> None:
    """Raises UserError (2) where the library for a URL is missing. Nothing is imported."""
    protocol = urlsplit(url).scheme.lower()
    if protocol in DRIVERS:
        require(f"--data {protocol}://...", "cloud", "fsspec", DRIVERS[protocol])


def fixed_part(data: str) -> str:
    """The folder or URL that all files named by ``data`` lie in, which does not depend on which exist."""
    if not is_url(data) and not is_pattern(data):
        return data if os.path.isdir(data) else os.path.dirname(data)
    first = min((match.start() for one in (MAGIC, BRACES) if (match := one.search(_path(data)))), default=None)
    if first is None:
        return data.rstrip("/") if not _path(data).endswith(".tar") else data.rpartition("/")[0]
    return data[:first].rpartition("/")[0]


def relative(path: str, root: str) -> str:
    """The part of ``path`` below ``root``, without the query of a URL and whatever slashes follow its protocol."""
    path, root = ((_path(one).partition("://")[2].lstrip("/") if is_url(one) else one) for one in (path, root))
    return path.removeprefix(root).lstrip("/") or path


def expand(data: str, suffix: str) -> list[str]:
    """The files that a path, folder, pattern or URL names: those below a folder or pattern end with ``suffix``.

    Raises:
        OSError: a folder or URL cannot be listed.
    """
    if not is_url(data) and not is_pattern(data):
        names = [entry.path for entry in os.scandir(data)] if os.path.isdir(data) else [data]
        return sorted(name for name in names if name.endswith(suffix) or not os.path.isdir(data))
    found: list[str] = []
    for one in _without_braces(data):
        found += _list_url(one, suffix) if is_url(one) else _list_pattern(one, suffix)
    return sorted(dict.fromkeys(found))


def _list_pattern(path: str, suffix: str) -> list[str]:
    if not MAGIC.search(path):
        return [path]  # a number of a range: it has to exist
    return [name for name in glob.glob(path, recursive=True) if name.endswith(suffix)]


def _list_url(url: str, suffix: str) -> list[str]:
    if not MAGIC.search(_path(url)) and urlsplit(url).path.endswith(suffix):
        return [url]
    if MAGIC.search(_path(url)):
        names: list[str] = _attempt(url, lambda files, path: files.glob(path))
    else:
        names = _attempt(url, lambda files, path: files.ls(path.rstrip("/") + "/", detail=False))
    protocol = urlsplit(url).scheme
    full = [name if is_url(name) else f"{protocol}://{name}" for name in names]
    return [name for name in full if urlsplit(name).path.endswith(suffix)]


def _path(url: str) -> str:
    """A URL without its query, in which ? and * are no patterns."""
    return url.partition("?")[0] if url.lower().startswith("http") else url


def _without_braces(pattern: str) -> Iterator[str]:
    """``{000..012}`` is a range with leading zeros, ``{a,b}`` a choice."""
    parts = BRACES.split(pattern)
    choices = [_choices(part) if n % 2 else [part] for n, part in enumerate(parts)]
    return map("".join, itertools.product(*choices))


def _choices(text: str) -> list[str]:
    if (ends := re.fullmatch(r"(\d+)\.\.(\d+)", text)) is None:
        return text.split(",") if "," in text else [f"{{{text}}}"]
    width = len(ends[1]) if ends[1].startswith("0") or len(ends[1]) == len(ends[2]) else 0
    return [str(number).zfill(width) for number in range(int(ends[1]), int(ends[2]) + 1)]


def _attempt(url: str, request: Callable[[Any, str], Any]) -> Any:
    """The result of request(file system, path). Errors of the network are tried again, and become OSError."""
    for attempt in range(1, ATTEMPTS + 1):
        files, path = _file_system(url)
        try:
            return request(files, path)
        except (FileNotFoundError, PermissionError, ValueError):
            raise
        except Exception as error:  # each driver has errors of its own
            if attempt == ATTEMPTS:
                raise OSError(f"{url}: {str(error) or type(error).__name__}") from None
            time.sleep(2 ** (attempt - 2))


def _file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, one for each process: forked workers cannot share connections."""
    import fsspec

    try:
        return cast("tuple[Any, str]", fsspec.core.url_to_fs(url))
    except (ImportError, ValueError) as error:
        raise UserError(f"--data {url}: {error}") from None
