"""Silences warnings of image libraries, which name no file. Errors of a file are raised, not printed."""

from __future__ import annotations

import ctypes
import logging
import threading
import warnings
from functools import cache
from pathlib import Path

import PIL

logging.getLogger("tifffile").addHandler(logging.NullHandler())  # without a handler Python prints the records


class _Quiet:
    """A with-block without warnings, for any number of threads.

    Warnings are a setting of the process: the first thread turns them off, the last one turns them on again.
    """

    def __init__(self) -> None:
        self.lock, self.inside = threading.Lock(), 0

    def __enter__(self) -> None:
        _hush_libtiff()
        with self.lock:
            if self.inside == 0:
                self.saved = warnings.catch_warnings()
                self.saved.__enter__()
                warnings.simplefilter("ignore")
            self.inside += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                self.saved.__exit__(None, None, None)


quiet = _Quiet()


@cache
def _hush_libtiff() -> None:
    """Removes the printing handlers of the libtiff in Pillow's wheels. Another libtiff keeps printing."""
    package = Path(PIL.__file__).parent
    for file in [*package.parent.glob("pillow.libs/libtiff*"), *package.glob(".dylibs/libtiff*")]:
        try:
            library = ctypes.CDLL(str(file))
            library.TIFFSetErrorHandler(None)
            library.TIFFSetWarningHandler(None)
        except (OSError, AttributeError):
            continue
