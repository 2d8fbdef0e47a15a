"""Functions that torch.compile may fuse, and the one switch that turns it on.

    @compilable
    def region(student, target): ...

    with compiling(True, note):  # in the training loop
        ...                      # region is compiled at its first call

Outside of ``compiling`` a function runs as it is written: evaluations meet images of many sizes, and each would be
compiled anew. A function that cannot be compiled here runs as it is written too, and the user reads why, once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, ParamSpec, TypeVar, cast

P = ParamSpec("P")
R = TypeVar("R")


class _Mode(NamedTuple):
    backend: str
    report: Callable[[str], object]


_mode: _Mode | None = None  # set while functions are compiled
_failed: set[str] = set()  # functions that could not be compiled in this process


def compilable(function: Callable[P, R]) -> Callable[P, R]:
    """Marks a pure function of tensors, and of modules, whose operations may be fused.

    Its shapes must be the same at each step. Numbers that change from step to step must be tensors: every other value
    is compiled in.
    """
    compiled: dict[str, Any] = {}  # by backend

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if _mode is None:
            return function(*args, **kwargs)
        import torch  # the module also serves where torch is not needed

        # Within a larger function that is being compiled it is a part of that; the compiler cannot read _failed.
        if torch.compiler.is_compiling() or function.__qualname__ in _failed:
            return function(*args, **kwargs)
        mode = _mode
        if mode.backend not in compiled:
            compiled[mode.backend] = torch.compile(function, backend=mode.backend, fullgraph=True, dynamic=False)
        try:
            return cast(R, compiled[mode.backend](*args, **kwargs))
        except Exception as error:
            if not _is_of_compiler(error):
                raise
            _failed.add(function.__qualname__)
            mode.report(f"{function.__qualname__} is not compiled: {_first_line(error)}")
            return function(*args, **kwargs)

    return call


@contextmanager
def compiling(on: bool, report: Callable[[str], object], backend: str = "inductor") -> Iterator[None]:
    """Within it, functions that are marked ``compilable`` are compiled.

    Args:
        on: False: nothing changes.
        report: called with one line where a function cannot be compiled.
        backend: of torch.compile.
    """
    global _mode
    before, _mode = _mode, _Mode(backend, report) if on else None
    try:
        yield
    finally:
        _mode = before


def _is_of_compiler(error: Exception) -> bool:
    """Whether an error comes from the compiler, not from the function."""
    return type(error).__module__.startswith(("torch._dynamo", "torch._inductor", "triton"))


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
