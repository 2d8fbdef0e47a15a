"""The report of a comparison: a long table, all figures as JSON, and one page that needs nothing else.

It is a function of the committed results alone.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np

from gtsa import cells, config, evals, judging, statistics
from gtsa.cells import Cell, Row
from gtsa.checkpoint import store
from gtsa.core import Evidence
from gtsa.statistics import Drawn, Estimate

COLOURS = ("#0b6e4f", "#c2410c", "#1d4ed8", "#7e22ce", "#a16207", "#be123c", "#0e7490", "#4d7c0f")
STAGES = {"images": "equal images", "flops": "equal operations"}
Key = tuple[str, str]  # row and stage


def write(rows: Sequence[Row], wanted: Iterable[Cell], s: Any) -> Path:
    """Writes results.csv, results.json and report.html into the comparison's folder; returns the last."""
    done = [(cell, cells.done(cell, s)) for cell in wanted]
    found = [(cell, result) for cell, result in done if result is not None]
    place = Path(s.out)
    store(place / "results.csv", _csv(found).encode())
    summary = summarised(rows, found, s)
    store(place / "results.json", (json.dumps(summary, indent=1) + "\n").encode())
    page = place / "report.html"
    store(page, _page(summary, found, s).encode())
    return page


def _csv(found: Sequence[tuple[Cell, dict[str, Any]]]) -> str:
    """One line for every value: what a statistician wants to start from."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["method", "stage", "seed", "task", "feature", "block", "metric", "value", "n"])
    for cell, result in found:
        for entry in result.get("results", ()):
            for metric, value in entry["figures"].items():
                where = cell.row.name, cell.stage, cell.number, entry["task"], entry["feature"], "last"
                table.writerow([*where, metric, repr(value), entry["images"]])
    return text.getvalue()


# Figures with intervals


def summarised(rows: Sequence[Row], found: Sequence[tuple[Cell, dict[str, Any]]], s: Any) -> dict[str, Any]:
    """All that the page tells, as plain values."""
    reference = rows[0].name
    drawn = _drawn(found, s)
    lines = []
    for stage in STAGES:
        for row in rows:
            mine = [(c, r) for c, r in found if c.row.name == row.name and c.stage == stage]
            if not mine:
                continue
            good = [(c, r) for c, r in mine if r["status"] == "done"]
            figures = drawn.get((row.name, stage), {})
            against = drawn.get((reference, "images"), {})
            line: dict[str, Any] = {
                "row": row.name,
                "stage": stage,
                "seeds": sorted(c.number for c, _ in good),
                "failed": {c.number: r["reason"] for c, r in mine if r["status"] != "done"},
                "figures": {name: _told(statistics.estimate(value)) for name, value in figures.items()},
                "settings": {key: cells.training_of(mine[0][0], s)[key] for key in mine[0][0].changes},
                "costs": _costs([r for _, r in good]),
            }
            if (row.name, stage) != (reference, "images"):
                line["less_reference"] = {
                    name: _told(statistics.estimate(_paired(value, against[name])))
                    for name, value in figures.items()
                    if name in against
                }
            lines.append(line)
    trials = [
        {
            "row": c.row.name,
            "number": c.number,
            "settings": dict(c.changes),
            "status": r["status"],
            "figures": _plain(r),
        }
        for c, r in found
        if c.stage == "trial"
    ]
    told = {"reference": reference, "primary": s.primary, "seeds": s.seeds, "rows": lines, "trials": trials}
    return told | {"differences": _differences(drawn)}


def _differences(drawn: Mapping[Key, Mapping[str, Drawn]]) -> list[dict[str, Any]]:
    """Of the primary figure, every row less every other."""
    primary = {key: figures["primary"] for key, figures in drawn.items() if "primary" in figures}
    return [
        {"row": one, "stage": stage, "less_row": other, "less_stage": its_stage}
        | _told(statistics.estimate(_paired(primary[one, stage], primary[other, its_stage])))
        for (one, stage), (other, its_stage) in permutations(primary, 2)
    ]


def _plain(result: Mapping[str, Any]) -> dict[str, float]:
    return {f"{e['task']}:{n}": v for e in result.get("results", ()) for n, v in e["figures"].items()}


def _drawn(found: Sequence[tuple[Cell, dict[str, Any]]], s: Any) -> dict[Key, dict[str, Drawn]]:
    """For every row the figures of its networks, by name, with those of random choices of the images."""
    evidence: dict[Key, list[dict[tuple[str, str], Evidence]]] = {}
    steady = {cell.row.name for cell, _ in found if not cell.row.varies}
    for cell, result in found:
        if cell.stage in STAGES and result["status"] == "done":
            evidence.setdefault((cell.row.name, cell.stage), []).append(cells.evidence_of(cell, s))
    all_drawn: dict[Key, dict[str, Drawn]] = {}
    for key, networks in evidence.items():
        named: dict[str, Drawn] = {}
        for task, feature in networks[0]:
            names, drawn = _of_task(task, [network[task, feature] for network in networks], s)
            if key[0] in steady:
                drawn = _repeated(drawn, s.seeds)  # another seed would have given the same
            for number, name in enumerate(names):
                named[f"{task}:{name}" if feature in ("patches", s.tokens[0]) else f"{task}:{name} ({feature})"] = (
                    drawn[number]
                )
        parts = [_part(named, part) for part in s.primary.split("+")]
        if all(part is not None for part in parts) and len({part.images for part in parts if part}) == 1:
            named = {"primary": statistics.mean_of([part for part in parts if part]), **named}
        all_drawn[key] = named
    return all_drawn


def _part(named: Mapping[str, Drawn], part: str) -> Drawn | None:
    return named.get(part) or next((value for name, value in named.items() if name.split(":")[0] == part), None)


def _of_task(task: str, networks: Sequence[Evidence], s: Any) -> tuple[list[str], Drawn]:
    evaluator = evals.found()[task](**{**s.evaluate, **s.tasks.get(task, {})}.get(task, {}))
    names = list(evaluator.figures(networks[0]))

    def figures(network: int, places: np.ndarray) -> np.ndarray:
        values = evaluator.figures(judging.some(networks[network], places))
        return np.array([values.get(name, math.nan) for name in names])

    images = len(next(iter(networks[0].values())))
    return names, statistics.draw(figures, len(networks), images)


def _paired(one: Drawn, other: Drawn) -> Drawn:
    """The difference, seed by seed; what does not vary with the seed is the same for all of them."""
    seeds = max(len(one.values), len(other.values))
    if len(one.values) != len(other.values) and 1 not in (len(one.values), len(other.values)):
        seeds = min(len(one.values), len(other.values))  # some failed: as many as both have
    wide = [_repeated(each, seeds) for each in (one, other)]
    return wide[0] - wide[1]


def _repeated(found: Drawn, seeds: int) -> Drawn:
    if len(found.values) == 1:
        return Drawn(found.values.repeat(seeds, 0), found.drawn.repeat(seeds, 1), found.images)
    return Drawn(found.values[:seeds], found.drawn[:, :seeds], found.images)


def _told(value: Estimate) -> dict[str, Any]:
    sure = math.isfinite(value.low)
    ends = {"low": value.low, "high": value.high} if sure else {"low": None, "high": None}
    return {"mean": value.mean, **ends, "seeds": value.seeds, "images": value.images}


def _costs(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    trained = [r for r in results if "steps" in r]
    if not trained:
        return {}
    per_image = trained[0]["flops_per_image"]
    return {
        "steps": trained[0]["steps"],
        "images_seen": trained[0]["images_seen"],
        "gflops_per_image": per_image / 1e9,
        "petaflops": per_image * trained[0]["images_seen"] / 1e15,
        "minutes": float(np.median([r["seconds"] for r in trained])) / 60,
        "peak_gib": float(np.median([r["peak_memory"] for r in trained])) / 2**30,
        "device": trained[0]["device"],
        "verdicts": dict(Counter(seen[-1] for r in trained if (seen := _verdicts(r)))),
    }


def _verdicts(result: Mapping[str, Any]) -> list[str]:
    """What a run said of itself at every look."""
    return [entry["verdict"] for entry in result["curve"] if "verdict" in entry]


# The page

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:76em;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0}td,th{padding:.25em .7em;text-align:right;border-bottom:1px solid #ddd}
td:first-child,th:first-child{text-align:left}small,.quiet{color:#666}.lost{color:#b00020}h2{margin-top:2em}
img{image-rendering:pixelated;max-width:100%}figure{margin:1em 0;display:inline-block}"""


def _page(summary: Mapping[str, Any], found: Sequence[tuple[Cell, dict[str, Any]]], s: Any) -> str:
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>gtsa compare</title>",
        f"<style>{STYLE}</style><h1>Which method is best on these images?</h1>",
        *(f"<p>{line}</p>" for line in verdicts(summary)),
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

    What was lost is told first, and before that, where it is so, that nothing was learnt.
    """
    lines: list[tuple[int, str]] = []
    reference = escape(summary["reference"])
    for line in summary["rows"]:
        less = line.get("less_reference", {}).get("primary")
        if less is None:
            continue
        gain = -less["mean"]
        who = escape(line["row"]) + ("" if line["stage"] == "images" else f" at {STAGES[line['stage']]}")
        if less["low"] is None:
            lines.append((3, f"{reference} less {who}: {gain:+.2f}, of one seed: no interval, so nothing is shown."))
            continue
        low, high = -less["high"], -less["low"]
        between = f"{gain:+.2f} (95 % interval {low:+.2f} to {high:+.2f})"
        if low > 0:
            lines.append((2, f"<b>{reference} is better than {who}</b> on the primary figure, by {between}."))
        elif high < 0:
            lines.append((1, f"<b class=lost>{reference} is worse than {who}</b> on the primary figure: {between}."))
        else:
            lines.append((3, f"{reference} and {who} are not told apart on the primary figure: {between}."))
            if line["row"] == "untrained":
                more = "Longer runs, more images, or more images to judge by are needed."
                lines.append((0, f"<b>Nothing that {reference} has learnt shows in this figure.</b> {more}"))
    return [text for _, text in sorted(lines, key=lambda line: line[0])] or [
        f"There is nothing yet that {reference} could be compared with."
    ]


def _interval(value: Mapping[str, Any] | None, sign: str = "") -> str:
    if value is None:
        return "<td class=quiet>-</td>"
    mean = format(value["mean"], f"{sign}.2f")
    if value["low"] is None:
        return f"<td>{mean}</td>"
    if sign and value["low"] * value["high"] > 0:
        mean = f"<b>{mean}</b>"
    return f"<td>{mean}<br><small>{value['low']:{sign}.2f} to {value['high']:{sign}.2f}</small></td>"


def _figures_table(summary: Mapping[str, Any]) -> str:
    names = list(dict.fromkeys(name for line in summary["rows"] for name in line["figures"]))
    text = ["<h2>Figures</h2><p class=quiet>Means over seeds with 95 % intervals over seeds and images.</p><table>"]
    text.append("<tr><th>row<th>seeds" + "".join(f"<th>{escape(n)}" for n in names))
    for line in summary["rows"]:
        text.append(f"<tr><td>{_name(line['row'], line['stage'])}<td>{len(line['seeds'])}")
        text += [_interval(line["figures"].get(name)) for name in names]
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
    text = ["<h2>Costs</h2><table><tr><th>row<th>steps<th>images seen<th>GFLOPs an image<th>PFLOPs in all<th>minutes"]
    text.append("<th>peak memory, GiB<th>device<th>its own verdict: runs")
    for line in lines:
        c = line["costs"]
        said = ", ".join(f"{escape(word)}: {count}" for word, count in c["verdicts"].items()) or "-"
        text.append(
            f"<tr><td>{_name(line['row'], line['stage'])}<td>{c['steps']:,}<td>{c['images_seen']:,}"
            f"<td>{c['gflops_per_image']:.3g}<td>{c['petaflops']:.3g}<td>{c['minutes']:.1f}<td>{c['peak_gib']:.1f}"
            f"<td>{escape(c['device'])}<td>{said}"
        )
    return "".join(text) + "</table>"


def _curves(found: Sequence[tuple[Cell, dict[str, Any]]], s: Any) -> str:
    """Mean over seeds of the primary figure on the way, and of the effective rank."""

    def primary(entry: Mapping[str, Any]) -> float | None:
        values = [entry.get(part.replace(":", ": ")) for part in s.primary.split("+")]
        return None if None in values else float(np.mean(values))  # type: ignore[arg-type]

    drawings = []
    for title, value in (("primary figure", primary), ("effective rank of patch tokens", lambda e: e.get("rank"))):
        lines: dict[str, dict[int, list[float]]] = {}
        for cell, result in found:
            for entry in result.get("curve", ()) if cell.stage == "images" else ():
                if (y := value(entry)) is not None:
                    lines.setdefault(cell.row.name, {}).setdefault(entry["step"], []).append(y)
        if lines:
            drawings.append(f"<figure><figcaption>{title}, by steps</figcaption>{_svg(lines)}</figure>")
    return "<h2>Learning curves</h2>" + "".join(drawings) if drawings else ""


def _svg(lines: Mapping[str, Mapping[int, list[float]]]) -> str:
    width, height, left, low = 560, 300, 50, 30
    points = {name: [(x, float(np.mean(ys))) for x, ys in sorted(of.items())] for name, of in lines.items()}
    xs, ys = ([p[i] for of in points.values() for p in of] for i in (0, 1))
    x0, x1, y0, y1 = 0.0, float(max(xs)), min(ys), max(ys)
    span = (y1 - y0) or 1.0

    def at(x: float, y: float) -> str:
        right, up = (x - x0) / (x1 - x0 or 1), (y - y0) / span
        return f"{left + (width - left - 130) * right:.1f},{height - low - (height - 45) * up:.1f}"

    text = [f'<svg width="{width}" height="{height}" font-size="12">']
    for y in (y0, (y0 + y1) / 2, y1):
        x_, y_ = at(x0, y).split(",")
        text.append(f'<text x="4" y="{y_}">{y:.3g}</text><path d="M{x_},{y_}H{width - 130}" stroke="#ddd"/>')
    text.append(f'<text x="{left}" y="{height - 8}">0</text><text x="{width - 160}" y="{height - 8}">{x1:,.0f}</text>')
    for number, (name, of) in enumerate(points.items()):
        colour = COLOURS[number % len(COLOURS)]
        path = " ".join(at(*point) for point in of)
        text.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        text.append(f'<text x="{width - 124}" y="{20 + 16 * number}" fill="{colour}">{escape(name)}</text>')
    return "".join(text) + "</svg>"


def _maps(found: Sequence[tuple[Cell, dict[str, Any]]], s: Any) -> str:
    text, seen = ["<h2>What the networks see</h2><p class=quiet>Three principal components of patch tokens.</p>"], set()
    for cell, result in found:
        file = cells.folder_of(cell, s) / "maps.png"
        if cell.stage == "images" and cell.row.name not in seen and result["status"] == "done" and file.exists():
            seen.add(cell.row.name)
            data = base64.b64encode(file.read_bytes()).decode()
            caption = f"{escape(cell.row.name)}, seed {cell.number}"
            text.append(f'<figure><figcaption>{caption}</figcaption><img src="data:image/png;base64,{data}"></figure>')
    return "".join(text) if seen else ""


def _trials_table(summary: Mapping[str, Any]) -> str:
    if not summary["trials"]:
        return ""
    text = [
        "<h2>Trials</h2><p class=quiet>The same number for every method; the best by the primary figure is taken.</p>"
    ]
    text.append("<table><tr><th>method<th>trial<th>settings<th>figures")
    for t in summary["trials"]:
        figures = ", ".join(f"{escape(name)} {value:.2f}" for name, value in t["figures"].items()) or t["status"]
        text.append(f"<tr><td>{escape(t['row'])}<td>{t['number']}<td>{escape(json.dumps(t['settings']))}<td>{figures}")
    return "".join(text) + "</table>"


def _failures(summary: Mapping[str, Any]) -> str:
    failed = [(line, seed, why) for line in summary["rows"] for seed, why in line["failed"].items()]
    if not failed:
        return ""
    items = (f"<li>{escape(line['row'])}, seed {seed}: {escape(why)}" for line, seed, why in failed)
    return f"<h2 class=lost>Failed</h2><ul>{''.join(items)}</ul>"


def _method(s: Any) -> Iterable[str]:
    tuned = (
        f"Learning rate and the settings that each method names were chosen by {s.tune} trials of every method, its "
        "preset and random ones, "
        + (
            "within the training images."
            if s.val
            else "on the same folds as the figures are of: alike for all methods."
        )
        + " Variants and further rows take their method's choice, but for what they say themselves."
        if s.tune
        else "Settings were taken as given; nothing was tuned."
    )
    yield f"Primary figure, named beforehand: {escape(s.primary)}. {tuned}"
    yield (
        f"Every run sees the same {s.steps:,} x {s.batch_size} images in the same order. Differences are paired: of "
        "the same seed, on the same images. Intervals are of seeds (their variance) and images (a bootstrap) together."
    )
    missing = [name for name in ("untrained", *config.CONTROLS) if name not in s.controls]
    if missing or not s.weights:
        without = [*dict.fromkeys(missing), *([] if s.weights else ["published weights"])]
        yield f"Not among the rows: {', '.join(without)}."
