"""The page of a comparison: conclusions in plain words, then tables, curves, feature maps and failures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from gtsa.comparison.conclusions import describe_disagreements, describe_power, describe_protocol, describe_verdicts
from gtsa.comparison.jobs import STAGES, Job
from gtsa.comparison.results import CurveEntry, Result, folder_of
from gtsa.comparison.settings import Compare
from gtsa.comparison.summary import Difference, Interval, RowSummary, SmallestDifference, Summary, TrialSummary
from gtsa.comparison.tuning import Choice
from gtsa.core import html
from gtsa.core.chart import Line, Point, line_chart
from gtsa.core.html import Markup, Text
from gtsa.core.settings import flat
from gtsa.evaluation import intervals

Results = Sequence[tuple[Job, Result]]


def make_page(summary: Summary, results: Results, settings: Compare) -> str:
    """The whole page as HTML, without any external file. There may be a single result."""
    verdicts = [*map(Markup, describe_verdicts(summary["reference"], summary["rows"]))]
    return html.page(
        "Which method is best on these images?",
        *map(html.paragraph, [*verdicts, *describe_disagreements(summary["choices"])]),
        _make_metrics_table(summary["rows"]),
        _make_differences_table(summary["differences"], summary["smallest_difference"]),
        _make_costs_table(summary["rows"]),
        html.section("Learning curves", html.grid(_draw_curves(results, settings), "charts")),
        _show_feature_maps(results, settings),
        _make_trials_table(summary["trials"], summary["choices"]),
        _list_failures(summary["rows"]),
        html.section("Protocol", *(html.paragraph(Markup(line)) for line in describe_protocol(settings))),
        html.details("all settings", html.preformatted(settings.model_dump_json(indent=1))),
    )


# Tables


def _make_metrics_table(rows: Sequence[RowSummary]) -> Markup:
    names = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    text = "Means over seeds with 95 % intervals over seeds and images."
    if any("less_untrained" in row for row in rows):
        text += (
            " Not distinguishable from untrained: the 95 % interval of the difference from the untrained network "
            "contains 0; such a metric shows no effect of training. Significantly below untrained: the whole interval "
            "is below 0."
        )
    lines = []
    for row in rows:
        differences = row.get("less_untrained", {})
        cells = [_make_cell(row["metrics"].get(name), mark=_make_mark(differences.get(name))) for name in names]
        lines.append([_make_row_cell(row["row"], row["stage"]), str(len(row["seeds"])), *cells])
    table = html.table("Metrics of every row", ["row", "seeds", *names], lines)
    return html.section("Metrics", html.paragraph(text, "quiet"), table)


def _make_row_cell(row: str, stage: str) -> Markup:
    return html.escape(row) if stage == "images" else Markup("{} <small>{}</small>").format(row, STAGES[stage])


def _make_cell(value: Interval | None, sign: str = "", mark: Text = "") -> Markup:
    """Mean and interval; bold if it is a significant difference (``sign`` is +)."""
    if value is None:
        return html.marked("-", "quiet")
    mean = html.escape(format(value["mean"], f"{sign}.2f"))
    if value["low"] is not None and value["high"] is not None:
        if sign and intervals.verdict(value["low"], value["high"]) != "not distinguishable":
            mean = html.bold(mean)
        mean += html.small(f"{value['low']:{sign}.2f} to {value['high']:{sign}.2f}")
    return mean + mark


def _make_mark(difference: Interval | None) -> Markup:
    """The mark of a metric that is not above that of the untrained network."""
    if difference is None or difference["low"] is None or difference["high"] is None:
        return html.EMPTY
    match intervals.verdict(difference["low"], difference["high"]):
        case "better":
            return html.EMPTY
        case "worse":
            return html.small(html.marked("significantly below untrained", "bad"))
        case "not distinguishable":
            return html.small(html.marked("not distinguishable from untrained", "bad"))


def _make_differences_table(differences: Sequence[Difference], smallest: SmallestDifference | None) -> Markup:
    by_rows = {((d["row"], d["stage"]), (d["less_row"], d["less_stage"])): d for d in differences}
    rows = list(dict.fromkeys(row for row, _ in by_rows))
    if not rows:
        return html.EMPTY
    text = (
        "Primary metric: the row minus the column, with the same seeds and images. Bold: significantly different (95 % "
        "interval excludes 0)."
    )
    if smallest:
        text += f" {describe_power(smallest)}"
    lines = [[_make_row_cell(*row), *(_make_cell(by_rows.get((row, column)), "+") for column in rows)] for row in rows]
    table = html.table("Differences of the primary metric", ["row", *(_make_row_cell(*row) for row in rows)], lines)
    return html.section("Differences", html.paragraph(text, "quiet"), table)


def _make_costs_table(rows: Sequence[RowSummary]) -> Markup:
    head = ["row", "steps", "images seen", "operations per image", "in total", "minutes", "peak memory, GiB", "device"]
    lines = []
    for row in rows:
        if costs := row["costs"]:
            lines.append(
                [
                    _make_row_cell(row["row"], row["stage"]),
                    f"{costs['steps']:,}",
                    f"{costs['images_seen']:,}",
                    _format_flops(costs["gflops_per_image"] * 1e9),
                    _format_flops(costs["petaflops"] * 1e15),
                    f"{costs['minutes']:.1f}",
                    f"{costs['peak_gib']:.1f}",
                    costs["device"],
                    ", ".join(f"{name}: {count}" for name, count in costs["verdicts"].items()) or "-",
                ]
            )
    if not lines:
        return html.EMPTY
    return html.section("Costs", html.table("Costs of a network", [*head, "verdicts: runs"], lines))


def _format_flops(count: float) -> str:
    power = min(int(math.log10(float(f"{count:.3g}")) // 3), 7)
    return f"{count / 1000**power:.3g} {('', 'k', 'M', 'G', 'T', 'P', 'E', 'Z')[power]}FLOPs"


def _make_trials_table(trials: Sequence[TrialSummary], choices: Sequence[Choice]) -> Markup:
    if not trials:
        return html.EMPTY
    text = (
        "The same number for every method. The trial with the best primary metric is chosen among those that did not "
        "collapse. Bold: the chosen trial."
    )
    by_row = {choice["row"]: choice for choice in choices}
    lines = [
        [
            trial["row"],
            str(trial["number"]),
            _format_settings(trial["settings"]),
            ", ".join(f"{name} {value:.2f}" for name, value in trial["metrics"].items()) or trial["status"],
            _format_votes(by_row.get(trial["row"]), trial["number"]),
            trial["verdict"] or "-",
        ]
        for trial in trials
    ]
    head = ["method", "trial", "settings", "metrics", "chosen by", "verdict of the run"]
    return html.section("Trials", html.paragraph(text, "quiet"), html.table("Trials", head, lines, words=True))


def _format_votes(choice: Choice | None, number: int) -> Text:
    if choice is None:
        return "-"
    votes, folds = choice["of_folds"].count(number), len(choice["of_folds"])
    text = f"{votes} of {folds} folds" if folds > 1 else "yes" if votes else "-"
    return html.bold(text) if number == choice["taken"] else text


def _format_settings(settings: Mapping[str, object]) -> str:
    """E.g. learning_rate 0.001, dino.momentum 0.996."""
    return ", ".join(
        f"{name} {' '.join(map(str, value)) if isinstance(value, list | tuple) else value}"
        for name, value in flat(settings).items()
    )


# Curves, feature maps, failures


def _draw_curves(results: Results, settings: Compare) -> Iterator[Markup]:
    """Primary metric and effective rank during training, as means over seeds."""

    def read_primary(entry: CurveEntry) -> float | None:
        values = [_read_curve_value(entry, part) for part in settings.primary.split("+")]
        present = [value for value in values if value is not None]
        return float(np.mean(present)) if len(present) == len(values) else None

    def read_rank(entry: CurveEntry) -> float | None:
        return entry.get("rank")

    curves: list[tuple[str, Callable[[CurveEntry], float | None], Sequence[float]]] = [
        ("Primary metric", read_primary, ()),
        ("Effective rank of patch tokens", read_rank, (0,)),
    ]
    for title, read, include in curves:
        values: dict[str, dict[int, list[float]]] = {}
        for job, result in results:
            for entry in result.get("curve", ()) if job.stage == "images" else ():
                if (value := read(entry)) is not None:
                    values.setdefault(job.row.name, {}).setdefault(entry["step"], []).append(value)
        lines = [
            Line(name, [Point(step, float(np.mean(of_seeds))) for step, of_seeds in sorted(by_step.items())])
            for name, by_step in values.items()
        ]
        yield line_chart(title, lines, note="Mean over seeds.", include=include)


def _read_curve_value(entry: CurveEntry, part: str) -> float | None:
    """The metric TASK:METRIC, or the first one of TASK, in a line of a run's logs."""
    task, _, metric = part.partition(":")
    name = f"{task}: {metric}" if metric else next((key for key in entry if key.startswith(f"{task}: ")), "")
    return entry.get(name)


def _show_feature_maps(results: Results, settings: Compare) -> Markup:
    """The feature maps of one network of every row."""
    figures: dict[str, Markup] = {}
    for job, result in results:
        file = folder_of(job, settings) / "maps.png"
        if job.stage == "images" and job.row.name not in figures and result["status"] == "done" and file.exists():
            alt = f"Images above, and the feature maps of {job.row.name} below them"
            picture = html.image(file.read_bytes(), alt, kind="png")
            figures[job.row.name] = html.figure(picture, f"{job.row.name}, seed {job.number}")
    text = (
        "The three strongest principal components of the patch tokens of a network, as lightness and two axes of hue. "
        "Each network has components of its own: compare shapes, not colours."
    )
    return (
        html.section("Feature maps", html.paragraph(text, "quiet"), html.grid(figures.values()))
        if figures
        else html.EMPTY
    )


def _list_failures(rows: Sequence[RowSummary]) -> Markup:
    failures = [(row["row"], seed, reason) for row in rows for seed, reason in row["failed"].items()]
    if not failures:
        return html.EMPTY
    items = [f"{row}, seed {seed}: {reason}" for row, seed, reason in failures]
    return html.section(html.marked("Failed", "bad"), html.bullets(items))
