"""Prints the versions of this environment as requirements.lock: names and versions, no index addresses.

    make lock

Packages of the CUDA build of PyTorch exist for Linux alone and say so; pip itself is left out.
"""

import re
from importlib.metadata import distributions

LINUX = re.compile("(nvidia|cuda|triton)(-|$)")


def main() -> None:
    found = {d.metadata["Name"]: d.version for d in distributions()}
    for name in sorted(found, key=str.lower):
        if name not in ("gtsa", "pip"):
            marker = ' ; platform_system == "Linux"' if LINUX.match(name) else ""
            print(f"{name}=={found[name]}{marker}")


if __name__ == "__main__":
    main()
