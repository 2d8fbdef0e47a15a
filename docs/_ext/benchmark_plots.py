"""Plots of the committed results of benchmarks/, drawn when the pages are built; a result may be missing."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

RESULTS = Path(__file__).parents[2] / "benchmarks/results"
WIDTH, NAMES, VALUES, HEIGHT = 800, 330, 150, 26  # of a plot, its names, its values, a bar with its gap; px
Bars = Iterator[tuple[str, float]]
Result = Mapping[str, Any]


def step(result: Result) -> Bars:
    for row in result["rows"]:
        yield f"{row['precision']}, batch {row['batch']}", row["images_per_second"]


def reference(result: Result) -> Bars:
    for row in result["rows"]:
        yield f"plain implementation, {row['precision']}", row["batch"] / row["reference_seconds"]
        yield f"gtsa, {row['precision']}", row["images_per_second"]


def end_to_end(result: Result) -> Bars:
    yield "the step alone", result["step_images_per_second"]
    yield "gtsa pretrain", result["run_images_per_second"]


def batch(result: Result) -> Bars:
    for row in result["batch"]:
        yield f"batch {row['batch']}", row["milliseconds_an_image"]


def images(result: Result) -> Bars:
    for row in result["images"]:
        yield f"{row['images']:,} images listed", 1000 * row["step_seconds"]


def processes(result: Result) -> Bars:
    for row in result["processes"]:
        yield f"{row['processes']} x 1 thread", 1000 * row["step_seconds"]


def loader(result: Result) -> Bars:
    yield from result["images_per_second"].items()


def scan(result: Result) -> Bars:
    for row in result["rows"]:
        yield f"{row['images']:,} images, {row['data']}, {row['step']}", row["us_per_image"]


PLOTS: dict[str, tuple[str, str, Callable[[Result], Bars]]] = {  # name: files, unit, bars
    "step": ("h100.json gpu/step_profile.json", "images/s", step),
    "step-cpu": ("cpu.json", "images/s", step),
    "reference": ("step_reference_cpu.json step_reference_gpu.json", "images/s", reference),
    "end-to-end": ("end_to_end_cpu.json end_to_end_gpu.json", "images/s", end_to_end),
    "batch": ("scaling_cpu.json scaling_gpu.json", "ms an image", batch),
    "images": ("scaling_cpu.json", "ms a step", images),
    "processes": ("scaling_cpu.json", "ms a step", processes),
    "loader": ("loader.json loader_cpu.json", "images/s", loader),
    "scan": ("scan.json scan_cpu.json", "µs an image", scan),
}


def draw(bars: list[tuple[str, float]], unit: str) -> str:
    """Horizontal bars with their names and values, as SVG in the colours of the page."""
    most = max(value for _, value in bars) or 1
    room = WIDTH - NAMES - VALUES
    text = "; ".join(f"{name}: {value:.3g} {unit}" for name, value in bars)
    lines = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT * len(bars)}" role="img" style="width:100%;height:auto" '
        f'font-size="14" font-family="inherit" aria-label="{html.escape(text)}">'
    ]
    for row, (name, value) in enumerate(bars):
        middle, length = HEIGHT * row + HEIGHT / 2, room * value / most
        lines += [
            f'<text x="{NAMES - 8}" y="{middle + 5}" text-anchor="end" fill="var(--ink)">{html.escape(name)}</text>',
            f'<rect x="{NAMES}" y="{middle - 9}" width="{length:.1f}" height="18" fill="var(--accent)"/>',
            f'<text x="{NAMES + length + 6:.1f}" y="{middle + 5}" fill="var(--ink)">{value:.3g} {unit}</text>',
        ]
    return "\n".join([*lines, "</svg>"])


def caption(result: Result, file: str) -> str:
    """Device, versions, load and file of a result."""
    versions = ", ".join(f"{name} {value}" for name, value in result.get("versions", {}).items())
    device = result.get("device") or result.get("machine") or "a machine that the file does not name"
    load = result.get("load_average_before")
    busy = f"; load average before: {load}" if load is not None else ""
    return f"{device}{busy}; {versions}. benchmarks/results/{file}"


class Plot(SphinxDirective):
    """``{gtsa-plot} NAME``: the bars of each result that there is."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        files, unit, read = PLOTS[self.arguments[0]]
        for file in files.split():  # a missing one, too: it may come
            self.env.note_dependency(str(RESULTS / file))
        found = [file for file in files.split() if (RESULTS / file).is_file()]
        figures = []
        for file in found:
            result = json.loads((RESULTS / file).read_bytes())
            words = html.escape(caption(result, file))
            figures.append(f"<figure>{draw(list(read(result)), unit)}<figcaption>{words}</figcaption></figure>")
        if not found:
            return [nodes.paragraph(text="No result has been committed yet.")]
        return [nodes.raw(text="\n".join(figures), format="html")]


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("gtsa-plot", Plot)
    return {"parallel_read_safe": True}
