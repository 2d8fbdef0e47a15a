"""Parts of an HTML page: style, colours, line charts."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

import numpy as np

COLOURS = ("#0b6e4f", "#c2410c", "#1d4ed8", "#7e22ce", "#a16207", "#be123c", "#0e7490", "#4d7c0f")

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:76em;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0}td,th{padding:.25em .7em;text-align:right;border-bottom:1px solid #ddd}
td:first-child,th:first-child{text-align:left}small,.quiet{color:#666}.lost{color:#b00020}h2{margin-top:2em}
img{image-rendering:pixelated;max-width:100%}figure{margin:1em 0;display:inline-block}"""


def line_chart(lines: Mapping[str, Mapping[int, list[float]]]) -> str:
    """An SVG of the mean of each line: {name: {x: values}}."""
    width, height, left, low = 560, 300, 50, 30
    points = {name: [(x, float(np.mean(ys))) for x, ys in sorted(line.items())] for name, line in lines.items()}
    xs, ys = ([point[i] for line in points.values() for point in line] for i in (0, 1))
    x0, x1, y0, y1 = 0.0, float(max(xs)), min(ys), max(ys)
    span = (y1 - y0) or 1.0

    def position(x: float, y: float) -> str:
        right, up = (x - x0) / (x1 - x0 or 1), (y - y0) / span
        return f"{left + (width - left - 130) * right:.1f},{height - low - (height - 45) * up:.1f}"

    text = [f'<svg width="{width}" height="{height}" font-size="12">']
    for y in (y0, (y0 + y1) / 2, y1):
        x_, y_ = position(x0, y).split(",")
        text.append(f'<text x="4" y="{y_}">{y:.3g}</text><path d="M{x_},{y_}H{width - 130}" stroke="#ddd"/>')
    text.append(f'<text x="{left}" y="{height - 8}">0</text><text x="{width - 160}" y="{height - 8}">{x1:,.0f}</text>')
    for number, (name, line) in enumerate(points.items()):
        colour = COLOURS[number % len(COLOURS)]
        path = " ".join(position(*point) for point in line)
        text.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        text.append(f'<text x="{width - 124}" y="{20 + 16 * number}" fill="{colour}">{escape(name)}</text>')
    return "".join(text) + "</svg>"
