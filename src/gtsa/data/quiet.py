"""Libraries that read images say things on standard error without the file's name; here they keep them to themselves.

What is wrong with a file is told by what they raise.
"""

from __future__ import annotations

import ctypes
import logging
import threading
import warnings
from functools import cache
from pathlib import Path

import PIL

logging.getLogger("tifffile").addHandler(logging.NullHandler())  # else Python prints for who has set up no logging


class _Quiet:
    """A with-block without warnings, of any number of threads at a time: the first one in turns them off, the last one
    out turns them on again, for they are the process's."""

    def __init__(self) -> None:
        self.lock, self.inside = threading.Lock(), 0

    def __enter__(self) -> None:
        _hush_libtiff()
        with self.lock:
            if self.inside == 0:
                self.kept = warnings.catch_warnings()
                self.kept.__enter__()
                warnings.simplefilter("ignore")
            self.inside += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                self.kept.__exit__(None, None, None)


quiet = _Quiet()


@cache
def _hush_libtiff() -> None:
    """Takes away the functions by which the libtiff in Pillow's wheels prints; elsewhere it goes on to print."""
    package = Path(PIL.__file__).parent
    for file in [*package.parent.glob("pillow.libs/libtiff*"), *package.glob(".dylibs/libtiff*")]:
        try:
            library = ctypes.CDLL(str(file))
            library.TIFFSetErrorHandler(None)
            library.TIFFSetWarningHandler(None)
        except (OSError, AttributeError):
            continue
