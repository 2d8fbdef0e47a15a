"""The curves of a report: losses, accuracy, health, evaluations, learning rate, throughput."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from gtsa.core import html
from gtsa.core.chart import Line, Point, line_chart
from gtsa.core.html import Markup
from gtsa.core.terminal import lasting
from gtsa.pretraining.run_record import Entry, RunRecord
from gtsa.pretraining.verdict import CHANCE, SCORES, score_name
from gtsa.training.schedules import Cosine, warmup_then

TIMES = ("step", "seconds", "waited", "gradient")  # of metrics.jsonl; all others are parts of the loss and accuracies
HEALTH = {  # metrics of health.jsonl: title, what the numbers mean, and values that the axis includes
    "rank": ("Effective rank", "Of the patch tokens. A fall to a quarter of step 0 is a sign of collapse.", [0]),
    "spread": (
        "Spread", "Of the directions of the patch tokens: 1 where all are equally frequent, 0 for one.", [0, 1],
    ),
    "agreement": ("Agreement with the start", "Of the Gram matrix of the patches; 1: unchanged.", [0, 1]),
    "teacher_information": ("Mutual information of teacher assignments", "Share of the largest possible.", [0]),
}  # fmt: skip


def _line(name: str, log: Sequence[Entry], key: str, scale: float = 1.0) -> Line:
    """A metric of a log, with its interval where it has one."""

    def value(entry: Entry, suffix: str = "") -> float | None:
        number = entry.get(f"{key}{suffix}")
        return scale * number if isinstance(number, int | float) and math.isfinite(number) else None

    return Line(name, [Point(e["step"], value(e), value(e, "_low"), value(e, "_high")) for e in log])


def curves(record: RunRecord) -> Iterator[Markup]:
    names = list(dict.fromkeys(name for entry in record.metrics for name in entry))
    parts = [n for n in names if n not in (*TIMES, "loss") and not n.endswith("accuracy")]
    yield line_chart("Loss", [_line("loss", record.metrics, "loss")])
    if len(parts) > 1:
        yield line_chart("Parts of the loss", [_line(n.replace("_", " "), record.metrics, n) for n in parts])
    yield _accuracy(record)
    yield from _health(record)
    yield from _evaluations(record)
    rate, norm = _learning_rate(record), _line("gradient norm", record.metrics, "gradient")
    yield line_chart("Learning rate", [rate], note="As scheduled, at its peak over all parameters.", include=[0])
    yield line_chart("Gradient norm", [norm], note="Before clipping.", include=[0])


def _accuracy(record: RunRecord) -> Markup:
    lines = [
        _line("training", record.metrics, "rotation_accuracy", 100),
        _line("held-out images" if record.settings.hold_out else "evaluation", record.health, "rotation_accuracy", 100),
    ]
    note = "Dotted: chance. Band: 95 % interval over images."
    return line_chart("Rotation accuracy", lines, " %", note=note, level=100 * CHANCE)


def _health(record: RunRecord) -> Iterator[Markup]:
    log = record.health
    names = list(dict.fromkeys(name for entry in log for name in entry))
    for name in (n for n in names if n.endswith("_gain")):
        score = f"{name.removesuffix('_gain')}_score"
        title = f"{score_name(score).capitalize()}, gain over step 0"
        meaning = f"{SCORES[score][1].capitalize()}. " if score in SCORES else ""
        started = [{"step": 0, name: 0.0}, *log]
        yield line_chart(title, [_line("gain", started, name)], note=f"{meaning}Band: 95 % interval.", level=0.0)
    for name, (title, note, include) in HEALTH.items():
        start = [{"step": 0, name: entry[f"{name}_at_start"]} for entry in log[:1] if f"{name}_at_start" in entry]
        yield line_chart(title, [_line(title.lower(), [*start, *log], name)], note=note, include=include)


def _evaluations(record: RunRecord) -> Iterator[Markup]:
    """One chart for each task of --eval."""
    names = list(dict.fromkeys(n for entry in record.evaluations for n in entry if n != "step"))
    for task in dict.fromkeys(name.partition(": ")[0] for name in names):
        lines = [_line(n.partition(": ")[2], record.evaluations, n) for n in names if n.partition(": ")[0] == task]
        yield line_chart(f"Evaluation: {task.replace('_', ' ')}", lines)


def _learning_rate(record: RunRecord) -> Line:
    s = record.settings
    schedule = warmup_then(Cosine(s.learning_rate, s.final_learning_rate), s.warmup, s.steps)
    steps = sorted({round(s.steps * share / 200) for share in range(200)} - {s.steps})
    return Line("learning rate", [Point(step, schedule(step / s.steps)) for step in steps])


def durations(metrics: Sequence[Entry]) -> Iterator[tuple[Entry, float]]:
    """Every line of the log, and the seconds of the steps that it is about."""
    before = 0.0
    for entry in metrics:
        seconds = entry.get("seconds")
        yield entry, (entry["step"] - before) * (seconds if isinstance(seconds, int | float) else 0.0)
        before = entry["step"]


def throughput(record: RunRecord) -> Markup:
    measured = [(entry, seconds) for entry, seconds in durations(record.metrics) if seconds > 0]
    if not measured:
        return html.EMPTY
    batch = record.settings.batch_size
    total = sum(seconds for _, seconds in measured)
    waited = sum(seconds * (entry.get("waited") or 0.0) for entry, seconds in measured)
    images = batch * sum(seconds / entry["seconds"] for entry, seconds in measured)
    speed = Line("images per second", [Point(e["step"], batch / e["seconds"]) for e, _ in measured])
    waiting = _line("waiting", record.metrics, "waited", 100)
    return html.section(
        "Throughput",
        html.facts(
            [
                ("images per second", f"{images / total:,.1f}"),
                ("waiting for data", f"{100 * waited / total:.0f} % of the time"),
                ("in all", f"{images:,.0f} images in {lasting(total)}"),
            ]
        ),
        html.grid(
            [
                line_chart(
                    "Images per second", [speed], note="Steps alone, without evaluations and checkpoints.", include=[0]
                ),
                line_chart("Waiting for data", [waiting], " %", note="Share of the time.", include=[0]),
            ],
            "charts",
        ),
    )
