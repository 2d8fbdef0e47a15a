"""Functions that torch.compile may fuse, and the one switch that turns it on.

    @compilable
    def region(student, target): ...

    with compiling(True, note):  # in the training loop
        ...                      # region is compiled at its first call

Outside of ``compiling`` a function runs as it is written: evaluations meet images of many sizes, and each would be
compiled anew. A function that cannot be compiled here runs as it is written too, and the user reads why, once. Its
backward pass is compiled together with its forward pass, so a failure of either shows before anything was computed.
"""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, ParamSpec, TypeVar, cast

from gtsa.core.errors import UserError

P = ParamSpec("P")
R = TypeVar("R")


class _Mode(NamedTuple):
    backend: str
    report: Callable[[str], object]


WORTHWHILE = 2_000  # steps of a training from which on compilation pays on a GPU

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
            mode.report(f"{function.__qualname__} is not compiled: {_reason(error)}")
            return function(*args, **kwargs)

    return call


@contextmanager
def compiling(on: bool, report: Callable[[str], object], backend: str = "inductor") -> Iterator[None]:
    """Within it, functions that are marked ``compilable`` are compiled.

    Args:
        on: False: nothing changes.
        report: called with one line where a function cannot be compiled.
        backend: of torch.compile.

    Raises:
        UserError: a compiled function failed as it ran, e.g. its kernel does not suit this GPU (6).
    """
    global _mode
    before, _mode = _mode, _Mode(backend, report) if on else None
    try:
        with _backward_at_once() if on else nullcontext():
            yield
    except Exception as error:
        if not on or not _is_of_compiler(error):
            raise
        raise UserError(f"a compiled function failed: {_reason(error)}; give --compile off", 6) from error
    finally:
        _mode = before


def resolve(choice: str, gpu: bool, steps: int) -> tuple[bool, str]:
    """Whether ``choice`` (auto, on or off) compiles a training of so many steps, and why it is so for auto.

    Compilation takes about a minute, and saves a part of every step.
    """
    if choice != "auto":
        return choice == "on", ""
    return gpu and steps >= WORTHWHILE, f"pays from {WORTHWHILE:,} steps on" if gpu else "pays on a GPU"


def forget() -> None:
    """Forgets what was compiled, before a training of other shapes: torch keeps a few graphs of a function."""
    import torch

    torch._dynamo.reset()
    _failed.clear()


def _backward_at_once() -> AbstractContextManager[object]:
    """Within it, the backward pass is compiled at the first forward call, not at the first backward call."""
    import torch._functorch.config as config

    name = "force_non_lazy_backward_lowering"  # not a public name: a version without it compiles as it always did
    return cast(Any, config).patch(**{name: True}) if hasattr(config, name) else nullcontext()


def _is_of_compiler(error: Exception) -> bool:
    """Whether an error comes from the compiler, not from the function."""
    return type(error).__module__.startswith(("torch._dynamo", "torch._inductor", "triton"))


def _reason(error: Exception) -> str:
    """What failed, in a line: of an error in a backend, that error and not the wrapper around it."""
    cause = getattr(error, "inner_exception", None) or error
    lines = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {textwrap.shorten(lines[0], 200)}" if lines else type(cause).__name__
