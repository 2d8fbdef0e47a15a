"""How long does a command take to begin? CPU seconds, beside those of importing numpy and of importing torch and timm.

    python benchmarks/start.py --json runs/start.json

Every command runs as its own process, in turns with the others; medians of --repeats. The quick ones are held against
``import numpy``, the heavy ones against ``import torch, timm``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

NUMPY, HEAVY = "python -c 'import numpy'", "python -c 'import torch, timm'"
QUICK = ["", "--help", "--version", "pretrian", "pretrain --epoch 3", "pretrain --help", "evaluate --help", "methods",
         "export nowhere --out out", "pretrain --data nowhere --out out", "check nowhere", "pretrain --batch-size 0",
         "--install-completion --help"]  # fmt: skip
SLOW = ["models vit_small", "evaluate random:test_vit --task health --val nowhere"]


def cpu_seconds(command: list[str], folder: str) -> float:
    """Of a process and those that it waited for."""
    before = os.times()
    subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write the result to")
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    gtsa = [sys.executable, "-m", "gtsa"]
    commands = {
        NUMPY: [sys.executable, "-c", "import numpy"],
        HEAVY: [sys.executable, "-c", "import torch, timm"],
        **{f"gtsa {words}".strip(): [*gtsa, *words.split()] for words in QUICK + SLOW},
        "python -c 'import gtsa'": [sys.executable, "-c", "import gtsa"],
    }
    times: dict[str, list[float]] = {name: [] for name in commands}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(given.repeats):
            for name, command in commands.items():
                times[name].append(cpu_seconds(command, folder))
    median = {name: statistics.median(taken) for name, taken in times.items()}
    rows = [
        {
            "command": name,
            "cpu_seconds": taken,
            "of_numpy": taken / median[NUMPY],
            "of_torch_timm": taken / median[HEAVY],
        }
        for name, taken in median.items()
    ]
    print("CPU s  of numpy  of torch, timm  command")
    for row in rows:
        name, taken, light, heavy = row.values()
        print(f"{taken:5.2f}  {light:8.2f}  {heavy:14.2f}  {name}")
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        result = {"python": platform.python_version(), "repeats": given.repeats, "rows": rows}
        given.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
