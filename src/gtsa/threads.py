"""How the processor's threads wait for one another. OpenMP reads this once, when torch is imported.

By default a thread that waits spins for a long time, and takes the core from whatever else could run there: beside two
busy processes a step of the demo took five times as long. Spinning for a short time costs networks of usual size
nothing, and the demo's, whose operations take microseconds, about a tenth (LOG.md, benchmarks/busy.py).
"""

from __future__ import annotations

import os
import sys

SPINS = "400"  # rounds before a waiting thread sleeps; OpenMP's own default is 300,000
USERS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def settle() -> None:
    """Sets the environment for torch, unless the user has, or torch is there already."""
    if "torch" not in sys.modules and not any(name in os.environ for name in USERS):
        os.environ["GOMP_SPINCOUNT"] = SPINS


def described() -> str:
    """How threads wait, for the plan."""
    if os.environ.get("GOMP_SPINCOUNT") == SPINS:
        return "they wait without spinning for long, which spares busy neighbours"
    found = [f"{name}={os.environ[name]}" for name in USERS if name in os.environ]
    return f"{', '.join(found)}, as set by you" if found else "torch was imported first: they wait as OpenMP has it"
