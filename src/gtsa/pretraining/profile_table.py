"""The table of gtsa profile: phases of a step, the bound that applies, and what to change, from what was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from gtsa.core.terminal import gib, say, table

LOADER_BOUND = 0.1  # share of a step that loading takes, from which on the loader is what to change
WORTH = 1.05  # ratio from which on a measured change is worth its flag
MATRIX_BOUND = 0.6  # share of the matrix rate above which nothing but less work is faster

Result = Mapping[str, Any]


def show(result: Result) -> None:
    """Prints the table, the bound, and the advice."""
    rows = [(row["phase"], f"{row['ms']:,.1f} ms", f"{100 * row['share']:.0f} %") for row in result["phases"]]
    rows.append(
        ("step, in phases", f"{result['split_step_ms']:,.1f} ms", "mean; the device is waited for at each phase")
    )
    rows.append(("step", f"{result['step_ms']:,.1f} ms", f"median; {result['images_per_second']:.3g} images/s"))
    table("a training step", rows)
    if result["workers"]:
        each = ", ".join(f"{name} {ms:.1f} ms" for name, ms in result["loading_ms_per_image"].items())
        say(f"an image in one worker: {each}")
    for line in bounds(result):
        say(line)
    say("what to change:")
    for line in advice(result):
        say(f"  - {line}")


def bounds(result: Result) -> list[str]:
    """Sentences: loader or step, share of the matrix rate, share of memory."""
    share, memory = result["loading_share"], result["memory"]
    if share >= LOADER_BOUND:
        lines = [f"bound: the loader; a step spends {100 * share:.0f} % of its time on images"]
    else:
        lines = [f"bound: the step; images take {100 * share:.0f} % of it"]
    rate, reached = result["matrix_tflops"], result["share_of_matrix_rate"]
    lines.append(
        f"matrix rate: {100 * reached:.0f} % of the {rate:.3g} TFLOP/s that a product of matrices reaches here in "
        f"{result['precision']}"
    )
    lines.append(f"memory: {gib(memory['peak'])} of {gib(memory['total'])} ({100 * memory['share']:.0f} %)")
    return lines


def advice(result: Result) -> list[str]:
    """What to change, the measured gains first."""
    lines = [
        f"{trial['flags']}: measured {trial['ratio']:.2f} times as fast{_remark(trial)}"
        for trial in sorted(result["trials"], key=lambda trial: -trial["ratio"])
        if trial["ratio"] >= WORTH
    ]
    lines += _about_loading(result)
    if result["device"] == "cuda" and result["compile"] == "off":
        lines.append("--compile on fuses operations; not measured here, as it takes about a minute: add it and compare")
    slower = [trial["flags"] for trial in result["trials"] if trial["ratio"] < WORTH]
    if slower:
        lines.append(f"no gain was measured with {', '.join(slower)}")
    if not lines or (len(lines) == 1 and slower):
        reached = result["share_of_matrix_rate"] >= MATRIX_BOUND
        rest = "the machine's matrix rate is nearly reached" if reached else "no setting that was measured is faster"
        lines.insert(0, f"nothing: {rest}; a smaller --model or smaller crops are less work")
    return lines


def _remark(trial: Mapping[str, Any]) -> str:
    return f" ({trial['remark']})" if trial["remark"] else ""


def workers_needed(result: Result) -> int:
    """Workers that would read images as fast as the rest of the step takes; 0: as many as there are now, or fewer."""
    if result["loading_share"] < LOADER_BOUND:
        return 0
    rest = result["step_ms"] * (1 - result["loading_share"])
    images = sum(result["loading_ms_per_image"].values()) * result["batch_size"]
    needed = math.ceil(1.1 * images / rest)
    return needed if needed > result["workers"] else 0


def _about_loading(result: Result) -> list[str]:
    """Smaller images, where no number of workers is enough."""
    needed, cores = workers_needed(result), result["cores"]
    if needed < cores:
        return []
    decode = result["loading_ms_per_image"]["decode"]
    return [
        f"store the images smaller: {needed} workers would be needed to keep up, there are {cores} cores; decoding "
        f"takes {decode:.1f} ms an image"
    ]
