"""The page of a comparison: tables, curves, maps and failures, and before them in plain words what they say."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from gtsa.comparison.jobs import STAGES, Job
from gtsa.comparison.results import folder_of
from gtsa.comparison.settings import CONTROLS
from gtsa.core.html import STYLE, line_chart
from gtsa.core.settings import flat
from gtsa.evaluation import intervals


def html(summary: Mapping[str, Any], found: Sequence[tuple[Job, dict[str, Any]]], s: Any) -> str:
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>gtsa compare</title>",
        f"<style>{STYLE}</style><h1>Which method is best on these images?</h1>",
        *(f"<p>{line}</p>" for line in verdicts(summary)),
        *(f"<p>{escape(line)}</p>" for line in unsteady(summary["choices"])),
        _figures_table(summary),
        _differences_table(summary),
        _costs_table(summary),
        _curves(found, s),
        _maps(found, s),
        _trials_table(summary),
        _failures(summary),
        "<h2>How it was done</h2>",
        *(f"<p>{line}</p>" for line in _method(s)),
        f"<details><summary>All settings</summary><pre>{escape(s.model_dump_json(indent=1))}</pre></details></html>",
    ]
    return "\n".join(parts) + "\n"


def verdicts(summary: Mapping[str, Any]) -> list[str]:
    """What the figures say of the reference, against every other row, in plain words; whatever they say.

    What was lost is told first, and before that, where it is so, that nothing was learnt or that runs collapsed.
    """
    lines: list[tuple[int, str]] = []
    reference = escape(summary["reference"])
    for line in summary["rows"]:
        who = escape(line["row"]) + ("" if line["stage"] == "images" else f" at {STAGES[line['stage']]}")
        runs = line["costs"].get("verdicts", {})
        if collapsed := runs.get("collapsing"):
            many = f"{collapsed} of {sum(runs.values())} runs of {who} collapsed"
            lines.append((0, f"<b class=lost>{many}</b>: its figures say nothing about a {who} that learns."))
        less = line.get("less_reference", {}).get("primary")
        if less is None:
            continue
        gain = -less["mean"]
        if less["low"] is None:
            lines.append((3, f"{reference} less {who}: {gain:+.2f}, of one seed: no interval, so it proves nothing."))
            continue
        low, high = -less["high"], -less["low"]
        between = f"{gain:+.2f} (95 % interval {low:+.2f} to {high:+.2f})"
        word = intervals.verdict(low, high)
        if word == "better":
            lines.append((2, f"<b>{reference} is better than {who}</b> on the primary figure, by {between}."))
        elif word == "worse":
            lines.append((1, f"<b class=lost>{reference} is worse than {who}</b> on the primary figure: {between}."))
        else:
            lines.append((3, f"{reference} and {who} are not distinguishable on the primary figure: {between}."))
            if line["row"] == "untrained":
                more = "Longer runs, more images, or more images to judge by are needed."
                lines.append((0, f"<b>Nothing that {reference} has learnt shows in this figure.</b> {more}"))
    return [text for _, text in sorted(lines, key=lambda line: line[0])] or [
        f"There is nothing yet that {reference} could be compared with."
    ]


def _interval(value: Mapping[str, Any] | None, sign: str = "", mark: str = "") -> str:
    if value is None:
        return "<td class=quiet>-</td>"
    mean = format(value["mean"], f"{sign}.2f")
    if value["low"] is not None:
        if sign and intervals.verdict(value["low"], value["high"]) != "not distinguishable":
            mean = f"<b>{mean}</b>"
        mean += f"<br><small>{value['low']:{sign}.2f} to {value['high']:{sign}.2f}</small>"
    return f"<td>{mean}{mark}</td>"


def _mark(less: Mapping[str, Any] | None) -> str:
    """Of a figure, by its difference from the untrained network's."""
    if less is None or less["low"] is None:
        return ""
    word = intervals.verdict(less["low"], less["high"])
    marks = {"better": "", "worse": "below untrained", "not distinguishable": "as untrained"}
    return f"<br><small class=lost>{marks[word]}</small>" if marks[word] else ""


def _figures_table(summary: Mapping[str, Any]) -> str:
    names = list(dict.fromkeys(name for line in summary["rows"] for name in line["metrics"]))
    text = ["<h2>Figures</h2><p class=quiet>Means over seeds with 95 % intervals over seeds and images."]
    if any("less_untrained" in line for line in summary["rows"]):
        text.append(
            " As untrained: not distinguishable from the untrained network, for the 95 % interval of the difference "
            "holds 0; such a figure shows nothing that was learnt. Below untrained: all of that interval is below 0."
        )
    text.append("</p><table>")
    text.append("<tr><th>row<th>seeds" + "".join(f"<th>{escape(n)}" for n in names))
    for line in summary["rows"]:
        text.append(f"<tr><td>{_name(line['row'], line['stage'])}<td>{len(line['seeds'])}")
        less = line.get("less_untrained", {})
        text += [_interval(line["metrics"].get(name), mark=_mark(less.get(name))) for name in names]
    return "".join(text) + "</table>"


def _differences_table(summary: Mapping[str, Any]) -> str:
    found = {((d["row"], d["stage"]), (d["less_row"], d["less_stage"])): d for d in summary["differences"]}
    keys = list(dict.fromkeys(one for one, _ in found))
    if not keys:
        return ""
    text = [
        "<h2>Differences</h2><p class=quiet>Of the primary figure: the row less the column, same seeds, same images. "
    ]
    text.append("Bold: the interval leaves 0 out.</p><table><tr><th>" + "".join(f"<th>{_name(*key)}" for key in keys))
    for one in keys:
        text.append(f"<tr><td>{_name(*one)}" + "".join(_interval(found.get((one, other)), "+") for other in keys))
    return "".join(text) + "</table>"


def _name(row: str, stage: str) -> str:
    return escape(row) + ("" if stage == "images" else f" <small>{STAGES[stage]}</small>")


def _costs_table(summary: Mapping[str, Any]) -> str:
    lines = [line for line in summary["rows"] if line["costs"]]
    if not lines:
        return ""
    text = ["<h2>Costs</h2><table><tr><th>row<th>steps<th>images seen<th>operations an image<th>in all<th>minutes"]
    text.append("<th>peak memory, GiB<th>device<th>its own verdict: runs")
    for line in lines:
        c = line["costs"]
        said = ", ".join(f"{escape(word)}: {count}" for word, count in c["verdicts"].items()) or "-"
        text.append(
            f"<tr><td>{_name(line['row'], line['stage'])}<td>{c['steps']:,}<td>{c['images_seen']:,}"
            f"<td>{_flops(c['gflops_per_image'] * 1e9)}<td>{_flops(c['petaflops'] * 1e15)}<td>{c['minutes']:.1f}"
            f"<td>{c['peak_gib']:.1f}"
            f"<td>{escape(c['device'])}<td>{said}"
        )
    return "".join(text) + "</table>"


def _flops(count: float) -> str:
    power = min(int(math.log10(float(f"{count:.3g}")) // 3), 7)
    return f"{count / 1000**power:.3g} {('', 'k', 'M', 'G', 'T', 'P', 'E', 'Z')[power]}FLOPs"


def _curves(found: Sequence[tuple[Job, dict[str, Any]]], s: Any) -> str:
    """Mean over seeds of the primary figure on the way, and of the effective rank."""

    def primary(entry: Mapping[str, Any]) -> float | None:
        values = [entry.get(part.replace(":", ": ")) for part in s.primary.split("+")]
        return None if None in values else float(np.mean(values))  # type: ignore[arg-type]

    drawings = []
    for title, value in (("primary figure", primary), ("effective rank of patch tokens", lambda e: e.get("rank"))):
        lines: dict[str, dict[int, list[float]]] = {}
        for job, result in found:
            for entry in result.get("curve", ()) if job.stage == "images" else ():
                if (y := value(entry)) is not None:
                    lines.setdefault(job.row.name, {}).setdefault(entry["step"], []).append(y)
        if lines:
            drawings.append(f"<figure><figcaption>{title}, by steps</figcaption>{line_chart(lines)}</figure>")
    return "<h2>Learning curves</h2>" + "".join(drawings) if drawings else ""


def _maps(found: Sequence[tuple[Job, dict[str, Any]]], s: Any) -> str:
    text, seen = ["<h2>What the networks see</h2><p class=quiet>Three principal components of patch tokens.</p>"], set()
    for job, result in found:
        file = folder_of(job, s) / "maps.png"
        if job.stage == "images" and job.row.name not in seen and result["status"] == "done" and file.exists():
            seen.add(job.row.name)
            data = base64.b64encode(file.read_bytes()).decode()
            caption = f"{escape(job.row.name)}, seed {job.number}"
            text.append(f'<figure><figcaption>{caption}</figcaption><img src="data:image/png;base64,{data}"></figure>')
    return "".join(text) if seen else ""


def _trials_table(summary: Mapping[str, Any]) -> str:
    if not summary["trials"]:
        return ""
    text = [
        "<h2>Trials</h2><p class=quiet>The same number for every method; the best by the primary figure is "
        "chosen, of those that did not collapse. Bold: what is taken.</p>"
    ]
    text.append("<table><tr><th>method<th>trial<th>settings<th>figures<th>taken by<th>its own verdict")
    choices = {choice["row"]: choice for choice in summary["choices"]}
    for t in summary["trials"]:
        metrics = ", ".join(f"{escape(name)} {value:.2f}" for name, value in t["metrics"].items()) or t["status"]
        text.append(f"<tr><td>{escape(t['row'])}<td>{t['number']}<td>{escape(_words(t['settings']))}<td>{metrics}")
        text.append(f"<td>{_votes(choices.get(t['row']), t['number'])}<td>{escape(t['verdict']) or '-'}")
    return "".join(text) + "</table>"


def _votes(choice: Mapping[str, Any] | None, number: int) -> str:
    if choice is None:
        return "-"
    votes, folds = choice["of_folds"].count(number), len(choice["of_folds"])
    told = f"{votes} of {folds} folds" if folds > 1 else "yes" if votes else "-"
    return f"<b>{told}</b>" if number == choice["taken"] else told


def _words(settings: Mapping[str, Any]) -> str:
    """E.g. learning_rate 0.001, dino.momentum 0.996."""
    return ", ".join(
        f"{name} {' '.join(map(str, value)) if isinstance(value, list | tuple) else value}"
        for name, value in flat(settings).items()
    )


def unsteady(choices: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of choices of trials that are not the choice of every fold: what is to be thought of them."""
    lines = []
    for choice in choices:
        row, taken, of_folds = choice["row"], choice["taken"], choice["of_folds"]
        if others := [f"trial {best} (fold {fold})" for fold, best in enumerate(of_folds, start=1) if best != taken]:
            kept = f"{len(of_folds) - len(others)} of {len(of_folds)} folds"
            lines.append(
                f"{row} has the settings of trial {taken}, the choice of {kept}; without their own images the others "
                f"choose {', '.join(others)}: there they had a part in the choice."
            )
    return lines


def _failures(summary: Mapping[str, Any]) -> str:
    failed = [(line, seed, why) for line in summary["rows"] for seed, why in line["failed"].items()]
    if not failed:
        return ""
    items = (f"<li>{escape(line['row'])}, seed {seed}: {escape(why)}" for line, seed, why in failed)
    return f"<h2 class=lost>Failed</h2><ul>{''.join(items)}</ul>"


def _method(s: Any) -> Iterable[str]:
    tuned = (
        f"Learning rate and the settings that each method names were chosen by {s.trials} trials of every method, its "
        "preset and random ones, "
        + (
            "within the training images."
            if s.val
            else "for each fold by inner folds of the other images; what most folds choose is taken (see Trials)."
        )
        + " Variants and further rows take their method's choice, but for what they say themselves."
        if s.trials
        else "Settings were taken as given; nothing was tuned."
    )
    yield f"Primary figure, named beforehand: {escape(s.primary)}. {tuned}"
    yield (
        f"Every run sees the same {s.steps:,} x {s.batch_size} images in the same order. Differences are paired: of "
        "the same seed, on the same images. Intervals are of seeds (their variance) and images (a bootstrap) together."
    )
    missing = [name for name in ("untrained", *CONTROLS) if name not in s.controls]
    if missing or not s.weights:
        without = [*dict.fromkeys(missing), *([] if s.weights else ["published weights"])]
        yield f"Not among the rows: {', '.join(without)}."
