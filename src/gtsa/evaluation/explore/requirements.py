"""What gtsa explore needs, checked before anything heavy is imported."""

from __future__ import annotations

from importlib.util import find_spec

from gtsa.core.errors import UserError

PORT = 8765  # the usual port of the page
SIZES = (32, 4096)  # px of the long side of an image


def check_arguments(size: int, port: int | None) -> None:
    """Raises UserError if a library is missing (6), or a number is out of its range (2)."""
    if any(find_spec(name) is None for name in ("starlette", "uvicorn")):
        raise UserError("gtsa explore needs Starlette and uvicorn: pip install 'gtsa[explore]'", 6)
    if not SIZES[0] <= size <= SIZES[1]:
        raise UserError(f"--size {size}: give a long side from {SIZES[0]} to {SIZES[1]} px")
    if port is not None and not 1 <= port <= 65535:
        raise UserError(f"--port {port}: give a number from 1 to 65535, or leave it out for a free one")
