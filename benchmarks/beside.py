"""gtsa beside LightlyTrain with equal settings: seconds to the first step, and processor time of an image's views.

    python benchmarks/beside.py --other ENVIRONMENT/bin/lightly-train --json runs/beside.json

Both are run as their users run them, as commands, in turn: DINO, two global crops and six local ones of the same
photos of 640 x 480 px, float32 on one CPU thread, one worker. The first step is done when its line is in metrics.jsonl.
The processor time of the views is that of the worker process, between a short and a long run: what starts it counts
not. Give each an environment as its users have it: Lightning imports torchmetrics where it is installed, which takes
seconds, and gtsa's users do not need it. LightlyTrain is not a part of gtsa and not installed with it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from runs import make_photos, write

BATCH, SHORT, LONG = 4, 20, 120  # images a step; steps of two runs, whose difference is the cost of views
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "LIGHTLY_TRAIN_EVENTS_DISABLED": "1", "CUDA_VISIBLE_DEVICES": ""}
SCALES = (0.14, 1.0), (0.05, 0.14)
TICK = os.sysconf("SC_CLK_TCK")


def ours(python: str, data: Path, out: Path, model: str, steps: int) -> list[str]:
    return [
        python, "-m", "gtsa", "pretrain", "--no-report", "--hold-out", "0", "--log-every", "1", "--device",
        "cpu", "--precision", "32", "--workers", "1", "--method", "dino", "--data", str(data), "--out", str(out),
        "--model", model, "--batch-size", str(BATCH), "--steps", str(steps), "--views.local-crops-number", "6",
        "--views.global-crops-size", "224", "--views.local-crops-size", "96",
        *(word for name, scale in zip(("global", "local"), SCALES, strict=True)
          for word in (f"--views.{name}-crops-scale", *map(str, scale))),
    ]  # fmt: skip


def theirs(program: str, data: Path, out: Path, model: str, steps: int) -> list[str]:
    return [
        program, "pretrain", f"out={out}", f"data={data}", f"model=timm/{model}", "method=dino", f"batch_size={BATCH}",
        "num_workers=1", "epochs=1", "accelerator=cpu", "devices=1", "precision=32-true", "model_args.img_size=224",
        f"trainer_args.max_steps={steps}", "trainer_args.log_every_n_steps=1",
        *(f"transform_args.{name}={scale}" for name, scale in (
            ("random_resize.min_scale", SCALES[0][0]), ("random_resize.max_scale", SCALES[0][1]),
            ("local_view.random_resize.min_scale", SCALES[1][0]), ("local_view.random_resize.max_scale", SCALES[1][1]),
        )),
    ]  # fmt: skip


def run(command: Sequence[str], out: Path, until: int | None = None) -> tuple[float, float]:
    """Seconds to the first step, and processor seconds of the workers.

    Args:
        until: end the run after its line of this step; None: let it end.
    """
    began, first, taken = time.monotonic(), 0.0, dict[int, float]()
    log = out.with_suffix(".log")
    with log.open("w") as file:
        process = subprocess.Popen(command, env={**os.environ, **ENVIRONMENT}, stdout=file, stderr=file)
    while process.poll() is None:
        taken |= {child: seconds_of(child) for child in children(process.pid)}
        if not first and "loss" in text_of(out / "metrics.jsonl"):
            first = time.monotonic() - began
            if until == 1:
                process.kill()
        time.sleep(0.05)
    process.wait()
    if not first:
        raise SystemExit(f"no first step: {log.read_text()[-2000:]}")
    return first, max(taken.values(), default=0.0)


def text_of(file: Path) -> str:
    return file.read_text() if file.is_file() else ""


def children(process: int) -> list[int]:
    file = Path(f"/proc/{process}/task/{process}/children")
    return [int(word) for word in text_of(file).split()] if file.exists() else []


def seconds_of(process: int) -> float:
    """User and system time; 0 for a process that has ended."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / TICK


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other", required=True, help="the program lightly-train of an environment that has it")
    parser.add_argument("--python", default=sys.executable, help="of an environment that has gtsa")
    parser.add_argument("--json", type=Path, help="file to write the result to")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", default="vit_tiny_patch16_224", help="for the first step")
    parser.add_argument("--small", default="test_vit", help="for the views: the workers are to be what is waited for")
    given = parser.parse_args()
    first: dict[str, list[float]] = {"gtsa": [], "LightlyTrain": []}
    views: dict[str, list[float]] = {"gtsa": [], "LightlyTrain": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = make_photos(folder / "photos", given.images)
        for turn in range(given.repeats):
            for program in first:
                out = folder / f"{program}-{turn}"

                def command(model: str, steps: int, to: Path, program: str = program) -> list[str]:
                    if program == "gtsa":
                        return ours(given.python, data, to, model, steps)
                    return theirs(given.other, data, to, model, steps)

                first[program].append(run(command(given.model, LONG, out), out, until=1)[0])
                used = []
                for steps in (SHORT, LONG):
                    out = folder / f"{program}-{turn}-{steps}"
                    used.append(run(command(given.small, steps, out), out)[1])
                views[program].append((used[1] - used[0]) / (LONG - SHORT) / BATCH)
                print(program, f"first step {first[program][-1]:.1f} s, views {1e3 * views[program][-1]:.2f} ms")
    typical = {name: (statistics.median(first[name]), statistics.median(views[name])) for name in first}
    steps, costs = (typical["gtsa"][i] / typical["LightlyTrain"][i] for i in (0, 1))
    print(f"gtsa / LightlyTrain: first step {steps:.2f}, processor time of complete views {costs:.2f}")
    write(
        given.json,
        {
            "images": given.images, "model": given.model, "repeats": given.repeats,
            "lightly_train": "0.18.0", "seconds_to_first_step": first, "seconds_of_an_images_views": views,
            "gtsa_over_lightly_train": {"first step": steps, "complete views": costs},
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
