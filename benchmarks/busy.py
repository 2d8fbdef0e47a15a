"""How much slower is a step of the demo beside busy neighbours, as gtsa sets OpenMP's threads and as OpenMP would?

    python benchmarks/busy.py --json runs/busy.json

Each measurement is a run of its own (`gtsa pretrain` on the sample, median of its steps after the first ten), alone and
beside one, two and four processes that only count; it is ended after a minute of steps, for beside others OpenMP's own
setting can take more than ten seconds a step. The settings take turns. ``of_alone`` is the time over that of
OpenMP's own setting alone; a fair share beside two busy processes on two cores is 2.
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
import time
from pathlib import Path

SETTINGS = {  # of the environment; what the user has set is left alone
    "gtsa": {},
    "OpenMP": {"GOMP_SPINCOUNT": "300000"},  # its own default, said so that gtsa leaves it alone
    "one thread": {"OMP_NUM_THREADS": "1"},
}
FIRST = 10  # steps that are not counted; of fewer than twice as many a half
ALONE = 3  # times as many runs alone
LONGEST, FEWEST = 60, 4  # seconds of a run after which it is ended, once it has so many steps


def step_seconds(setting: dict[str, str], busy: int, steps: int) -> float:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    neighbours = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
    try:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "run"
            command = [sys.executable, "-m", "gtsa", "pretrain", "--out", str(out), "--steps", str(steps)]
            often = ["--log-every", "1", "--evaluate-every", str(2 * steps), "--checkpoint-every", str(2 * steps)]
            run = subprocess.Popen([*command, *often], env=clean | setting, stdout=subprocess.DEVNULL)
            log, taken, ends = out / "metrics.jsonl", [], time.monotonic() + LONGEST
            while run.poll() is None and len(taken) < steps and (len(taken) < FEWEST or time.monotonic() < ends):
                time.sleep(1)
                taken = [json.loads(line)["seconds"] for line in log.read_text().splitlines()] if log.exists() else []
            run.kill()
            if run.wait() > 0:
                raise SystemExit("a run has failed")
            return statistics.median(taken[min(FIRST, len(taken) // 2) :])
    finally:
        for neighbour in neighbours:
            neighbour.kill()
            neighbour.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write the result to")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1, 2, 4], help="neighbours; the first is 0")
    given = parser.parse_args()
    taken: dict[tuple[str, int], list[float]] = {}
    for busy in given.busy:
        for _ in range(given.repeats if busy else ALONE * given.repeats):  # a few per cent are to be seen there
            for name, setting in SETTINGS.items():
                taken.setdefault((name, busy), []).append(step_seconds(setting, busy, given.steps))
    median = {key: statistics.median(times) for key, times in taken.items()}
    rows = [
        {"setting": name, "busy": busy, "step_seconds": seconds, "of_alone": seconds / median["OpenMP", 0]}
        for (name, busy), seconds in median.items()
    ]
    for row in rows:
        print("{setting:10}  {busy} busy  {step_seconds:.3f} s a step  {of_alone:.2f} of OpenMP's alone".format(**row))
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        told = {"machine": platform.machine(), "cores": len(os.sched_getaffinity(0)), "repeats": given.repeats}
        given.json.write_text(json.dumps({**told, "steps": given.steps, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
