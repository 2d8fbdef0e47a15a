"""Optional libraries: what needs them says how to install them."""

from __future__ import annotations

import importlib.util

from gtsa.core.errors import UserError


def require(what: str, extra: str, *modules: str) -> None:
    """Raises UserError (2) where a module of an extra is not installed. Nothing is imported.

    Args:
        what: what needs it, as the user gave it, e.g. ``--to onnx``.
        extra: the name in ``pip install 'gtsa[extra]'``.
    """
    if missing := [name for name in modules if importlib.util.find_spec(name) is None]:
        raise UserError(f"{what} needs {' and '.join(missing)}; install with: pip install 'gtsa[{extra}]'")
