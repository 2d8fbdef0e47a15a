"""What benchmarks of whole runs share: photos to train on, a run of gtsa pretrain, and the seconds of its steps."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import gtsa

FIRST = 2  # steps that are not counted


def make_photos(folder: Path, count: int, width: int = 640, height: int = 480) -> Path:
    """Writes JPEGs of smooth noise, as detailed as photos are: some 60 KB each at 640 x 480 px."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for number in range(count):
        coarse = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
        noise = rng.integers(-12, 13, smooth.shape)
        image = Image.fromarray((smooth.astype(np.int16) + noise).clip(0, 255).astype(np.uint8))
        image.save(folder / f"{number:06d}.jpg", quality=90)
    return folder


def link_photos(photos: Path, folder: Path, count: int) -> Path:
    """A folder of ``count`` files that are links to the same photos: a list of that length on a small disk."""
    folder.mkdir(parents=True, exist_ok=True)
    files = sorted(photos.iterdir())
    for number in range(count):
        os.link(files[number % len(files)], folder / f"{number:08d}.jpg")
    return folder


def step_seconds(data: Path, settings: Mapping[str, object], environment: Mapping[str, str] | None = None) -> float:
    """Median seconds of the steps of a run of gtsa pretrain, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        given = {"out": out, "data": data, "log-every": 1, "hold-out": 0, "evaluate-images": 1, **settings}
        given |= {"checkpoint-every": 10**6, "evaluate-every": 10**6}
        flags = [word for name, value in given.items() for word in (f"--{name}", *str(value).split())]
        command = [sys.executable, "-m", "gtsa", "pretrain", "--no-report", *flags]
        done = subprocess.run(command, env={**os.environ, **(environment or {})}, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"a run has failed: {done.stderr or done.stdout}")
        lines = (out / "metrics.jsonl").read_text().splitlines()
    seconds = [json.loads(line)["seconds"] for line in lines]
    return statistics.median(seconds[min(FIRST, len(seconds) - 1) :])


def device_of() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def write(file: Path | None, result: Mapping[str, object]) -> None:
    """The result of a benchmark with its command, device and versions, as JSON."""
    if file is None:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    head = {
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *_without_file(sys.argv[1:])]),
        "device": device_of(),
        "machine": platform.machine(),
        "load_average_before": round(LOAD, 1),
        "versions": {"gtsa": gtsa.__version__, "python": platform.python_version(), "torch": torch.__version__},
    }
    file.write_text(json.dumps({**head, **result}, indent=1) + "\n")


def _without_file(arguments: Sequence[str]) -> list[str]:
    words = list(arguments)
    if "--json" in words:
        at = words.index("--json")
        del words[at : at + 2]
    return words


LOAD = os.getloadavg()[0]  # before the benchmark
