"""The page of a comparison: conclusions in plain words, then tables, curves, feature maps and failures."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

import numpy as np

from gtsa.comparison.conclusions import describe_disagreements, describe_protocol, describe_verdicts
from gtsa.comparison.jobs import STAGES, Job
from gtsa.comparison.results import CurveEntry, Result, folder_of
from gtsa.comparison.settings import Compare
from gtsa.comparison.summary import Difference, Interval, RowSummary, Summary, TrialSummary
from gtsa.comparison.tuning import Choice
from gtsa.core.html import STYLE, line_chart
from gtsa.core.settings import flat
from gtsa.evaluation import intervals

Results = Sequence[tuple[Job, Result]]


def make_page(summary: Summary, results: Results, settings: Compare) -> str:
    """The whole page as HTML, without any external file."""
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>gtsa compare</title>",
        f"<style>{STYLE}</style><h1>Which method is best on these images?</h1>",
        *(f"<p>{line}</p>" for line in describe_verdicts(summary["reference"], summary["rows"])),
        *(f"<p>{escape(line)}</p>" for line in describe_disagreements(summary["choices"])),
        _make_metrics_table(summary["rows"]),
        _make_differences_table(summary["differences"]),
        _make_costs_table(summary["rows"]),
        _draw_curves(results, settings),
        _show_feature_maps(results, settings),
        _make_trials_table(summary["trials"], summary["choices"]),
        _list_failures(summary["rows"]),
        "<h2>Protocol</h2>",
        *(f"<p>{line}</p>" for line in describe_protocol(settings)),
        f"<details><summary>All settings</summary><pre>{escape(settings.model_dump_json(indent=1))}</pre></details>",
    ]
    return "\n".join(parts) + "</html>\n"


# Tables


def _make_metrics_table(rows: Sequence[RowSummary]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    text = ["<h2>Metrics</h2><p class=quiet>Means over seeds with 95 % intervals over seeds and images."]
    if any("less_untrained" in row for row in rows):
        text.append(
            " Not distinguishable from untrained: the 95 % interval of the difference from the untrained network "
            "contains 0; such a metric shows no effect of training. Significantly below untrained: the whole interval "
            "is below 0."
        )
    text.append("</p><table>")
    text.append("<tr><th>row<th>seeds" + "".join(f"<th>{escape(name)}" for name in names))
    for row in rows:
        text.append(f"<tr><td>{_make_row_cell(row['row'], row['stage'])}<td>{len(row['seeds'])}")
        differences = row.get("less_untrained", {})
        text += [_make_cell(row["metrics"].get(name), mark=_make_mark(differences.get(name))) for name in names]
    return "".join(text) + "</table>"


def _make_row_cell(row: str, stage: str) -> str:
    return escape(row) + ("" if stage == "images" else f" <small>{STAGES[stage]}</small>")


def _make_cell(value: Interval | None, sign: str = "", mark: str = "") -> str:
    """A table cell with mean and interval; bold if it is a significant difference (``sign`` is +)."""
    if value is None:
        return "<td class=quiet>-</td>"
    mean = format(value["mean"], f"{sign}.2f")
    if value["low"] is not None and value["high"] is not None:
        if sign and intervals.verdict(value["low"], value["high"]) != "not distinguishable":
            mean = f"<b>{mean}</b>"
        mean += f"<br><small>{value['low']:{sign}.2f} to {value['high']:{sign}.2f}</small>"
    return f"<td>{mean}{mark}</td>"


def _make_mark(difference: Interval | None) -> str:
    """The mark of a metric that is not above that of the untrained network."""
    if difference is None or difference["low"] is None or difference["high"] is None:
        return ""
    match intervals.verdict(difference["low"], difference["high"]):
        case "better":
            return ""
        case "worse":
            return "<br><small class=lost>significantly below untrained</small>"
        case "not distinguishable":
            return "<br><small class=lost>not distinguishable from untrained</small>"


def _make_differences_table(differences: Sequence[Difference]) -> str:
    by_rows = {((d["row"], d["stage"]), (d["less_row"], d["less_stage"])): d for d in differences}
    rows = list(dict.fromkeys(row for row, _ in by_rows))
    if not rows:
        return ""
    text = [
        "<h2>Differences</h2><p class=quiet>Primary metric: the row minus the column, with the same seeds and images. "
        "Bold: significantly different (95 % interval excludes 0).</p>"
    ]
    text.append("<table><tr><th>" + "".join(f"<th>{_make_row_cell(*row)}" for row in rows))
    for row in rows:
        cells = "".join(_make_cell(by_rows.get((row, column)), "+") for column in rows)
        text.append(f"<tr><td>{_make_row_cell(*row)}{cells}")
    return "".join(text) + "</table>"


def _make_costs_table(rows: Sequence[RowSummary]) -> str:
    trained = [row for row in rows if row["costs"]]
    if not trained:
        return ""
    text = ["<h2>Costs</h2><table><tr><th>row<th>steps<th>images seen<th>operations per image<th>in total<th>minutes"]
    text.append("<th>peak memory, GiB<th>device<th>verdicts: runs")
    for row in trained:
        costs = row["costs"]
        verdicts = ", ".join(f"{escape(name)}: {count}" for name, count in costs["verdicts"].items()) or "-"
        text.append(
            f"<tr><td>{_make_row_cell(row['row'], row['stage'])}<td>{costs['steps']:,}<td>{costs['images_seen']:,}"
            f"<td>{_format_flops(costs['gflops_per_image'] * 1e9)}<td>{_format_flops(costs['petaflops'] * 1e15)}"
            f"<td>{costs['minutes']:.1f}<td>{costs['peak_gib']:.1f}<td>{escape(costs['device'])}<td>{verdicts}"
        )
    return "".join(text) + "</table>"


def _format_flops(count: float) -> str:
    power = min(int(math.log10(float(f"{count:.3g}")) // 3), 7)
    return f"{count / 1000**power:.3g} {('', 'k', 'M', 'G', 'T', 'P', 'E', 'Z')[power]}FLOPs"


def _make_trials_table(trials: Sequence[TrialSummary], choices: Sequence[Choice]) -> str:
    if not trials:
        return ""
    text = [
        "<h2>Trials</h2><p class=quiet>The same number for every method. The trial with the best primary metric is "
        "chosen among those that did not collapse. Bold: the chosen trial.</p>"
    ]
    text.append("<table><tr><th>method<th>trial<th>settings<th>metrics<th>chosen by<th>verdict of the run")
    by_row = {choice["row"]: choice for choice in choices}
    for trial in trials:
        metrics = ", ".join(f"{escape(name)} {value:.2f}" for name, value in trial["metrics"].items())
        text.append(f"<tr><td>{escape(trial['row'])}<td>{trial['number']}")
        text.append(f"<td>{escape(_format_settings(trial['settings']))}<td>{metrics or trial['status']}")
        votes = _format_votes(by_row.get(trial["row"]), trial["number"])
        text.append(f"<td>{votes}<td>{escape(trial['verdict']) or '-'}")
    return "".join(text) + "</table>"


def _format_votes(choice: Choice | None, number: int) -> str:
    if choice is None:
        return "-"
    votes, folds = choice["of_folds"].count(number), len(choice["of_folds"])
    text = f"{votes} of {folds} folds" if folds > 1 else "yes" if votes else "-"
    return f"<b>{text}</b>" if number == choice["taken"] else text


def _format_settings(settings: Mapping[str, object]) -> str:
    """E.g. learning_rate 0.001, dino.momentum 0.996."""
    return ", ".join(
        f"{name} {' '.join(map(str, value)) if isinstance(value, list | tuple) else value}"
        for name, value in flat(settings).items()
    )


# Curves, feature maps, failures


def _draw_curves(results: Results, settings: Compare) -> str:
    """Primary metric and effective rank during training, as means over seeds."""

    def read_primary(entry: CurveEntry) -> float | None:
        values = [_read_curve_value(entry, part) for part in settings.primary.split("+")]
        present = [value for value in values if value is not None]
        return float(np.mean(present)) if len(present) == len(values) else None

    def read_rank(entry: CurveEntry) -> float | None:
        return entry.get("rank")

    curves: dict[str, Callable[[CurveEntry], float | None]] = {
        "primary metric": read_primary,
        "effective rank of patch tokens": read_rank,
    }
    figures = []
    for title, read in curves.items():
        lines: dict[str, dict[int, list[float]]] = {}
        for job, result in results:
            for entry in result.get("curve", ()) if job.stage == "images" else ():
                if (value := read(entry)) is not None:
                    lines.setdefault(job.row.name, {}).setdefault(entry["step"], []).append(value)
        if lines:
            figures.append(f"<figure><figcaption>{title}, by steps</figcaption>{line_chart(lines)}</figure>")
    return "<h2>Learning curves</h2>" + "".join(figures) if figures else ""


def _read_curve_value(entry: CurveEntry, part: str) -> float | None:
    """The metric TASK:METRIC, or the first one of TASK, in a line of a run's logs."""
    task, _, metric = part.partition(":")
    name = f"{task}: {metric}" if metric else next((key for key in entry if key.startswith(f"{task}: ")), "")
    return entry.get(name)


def _show_feature_maps(results: Results, settings: Compare) -> str:
    """The feature maps of one network of every row."""
    figures: dict[str, str] = {}
    for job, result in results:
        file = folder_of(job, settings) / "maps.png"
        if job.stage == "images" and job.row.name not in figures and result["status"] == "done" and file.exists():
            data = base64.b64encode(file.read_bytes()).decode()
            caption = f"<figcaption>{escape(job.row.name)}, seed {job.number}</figcaption>"
            figures[job.row.name] = f'<figure>{caption}<img src="data:image/png;base64,{data}"></figure>'
    title = "<h2>Feature maps</h2><p class=quiet>The first three principal components of the patch tokens.</p>"
    return title + "".join(figures.values()) if figures else ""


def _list_failures(rows: Sequence[RowSummary]) -> str:
    failures = [(row["row"], seed, reason) for row in rows for seed, reason in row["failed"].items()]
    if not failures:
        return ""
    items = "".join(f"<li>{escape(row)}, seed {seed}: {escape(reason)}" for row, seed, reason in failures)
    return f"<h2 class=lost>Failed</h2><ul>{items}</ul>"
