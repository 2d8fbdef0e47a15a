"""Line charts as SVG. They can be read without JavaScript; page.js adds values under the pointer, and zoom."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gtsa.core.html import EMPTY, Markup, Text, details, escape, join, plain, table

WIDTH, HEIGHT = 480, 270  # px of the drawing; page.js draws with the same numbers
LEFT, RIGHT, TOP, BOTTOM = 60, 12, 12, 40  # px around the plot
MOST = 300  # points of a line; of a longer one neighbours are averaged
HUES = 8  # in page.css; further lines repeat them


@dataclass(frozen=True)
class Point:
    """A value, and the ends of its interval where it has one. A value that is None interrupts the line."""

    x: float
    y: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Line:
    name: str
    points: Sequence[Point]


def line_chart(
    title: Text,
    lines: Sequence[Line],
    unit: str = "",
    x_name: str = "step",
    note: Text = "",
    level: float | None = None,
    include: Sequence[float] = (),
) -> Markup:
    """A figure: an SVG of the lines, a legend, and the values as a table that opens with a click.

    Args:
        unit: of the values, e.g. %.
        x_name: what x counts.
        note: text below the title.
        level: a value to draw as a horizontal line, e.g. chance.
        include: values that the vertical axis always has, e.g. 0, so that noise does not fill the plot.
    """
    known = [line for line in lines if any(p.y is not None for p in line.points)]
    if not known:
        return EMPTY
    drawn = [Line(line.name, _thinned(line.points)) for line in known]
    fewer = max(len(line.points) / len(d.points) for line, d in zip(known, drawn, strict=True))
    include = [*include, *([] if level is None else [level])]
    note = escape(note) + (f" Each point is the mean of about {round(fewer)} lines of the log." if fewer > 1 else "")
    data = {
        "unit": unit, "x": x_name, "level": level, "include": include,
        "lines": [{"name": d.name, "points": [[p.x, p.y, p.low, p.high] for p in d.points]} for d in drawn],
    }  # fmt: skip
    return Markup(
        '<figure class="chart" data-chart="{}">\n<figcaption><span class="title">{}</span>{}</figcaption>\n{}'
        '<div class="plot">{}</div>\n{}\n</figure>'
    ).format(
        json.dumps(data, separators=(",", ":")),
        title,
        Markup(" {}").format(note) if note else EMPTY,
        _legend(drawn),
        _drawing(title, drawn, unit, x_name, level, include),
        details("values", _values(title, drawn, unit, x_name)),
    )


def _thinned(points: Sequence[Point]) -> list[Point]:
    """At most MOST points: means of neighbours."""
    size = math.ceil(len(points) / MOST)
    if size <= 1:
        return list(points)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [
        Point(group[-1].x, *(_mean([getattr(p, n) for p in group]) for n in ("y", "low", "high"))) for group in groups
    ]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _legend(lines: Sequence[Line]) -> Markup:
    sample = Markup('<svg viewBox="0 0 26 10" aria-hidden="true"><line x1="0" x2="26" y1="5" y2="5"/></svg>')
    items = [
        Markup('<li class="hue-{}">{}{}</li>').format(n % HUES + 1, sample, line.name) for n, line in enumerate(lines)
    ]
    return Markup('<ul class="legend">{}</ul>\n').format(join(items)) if len(lines) > 1 else EMPTY


def _drawing(
    title: Text, lines: Sequence[Line], unit: str, x_name: str, level: float | None, include: Sequence[float]
) -> Markup:
    values = [v for line in lines for p in line.points for v in (p.y, p.low, p.high) if v is not None]
    values += include
    xs = [p.x for line in lines for p in line.points]
    scale = Scale(min(xs), max(xs), *padded(min(values), max(values)))
    parts = [
        *_axes(scale, unit, x_name),
        *(_curve(n, line, scale) for n, line in enumerate(lines)),
    ]
    if level is not None:
        parts.append(_rule("level", scale.y(level)))
    words = "; ".join(f"{line.name} {_course(line, unit)}" for line in lines)
    return Markup(
        '<svg viewBox="0 0 {} {}" role="img" tabindex="0" aria-label="Line chart of {} by {}: {}">{}</svg>'
    ).format(WIDTH, HEIGHT, plain(title), x_name, words, join(parts))


def _course(line: Line, unit: str) -> str:
    """The first and the last value, in words."""
    known = [p.y for p in line.points if p.y is not None]
    return (
        f"from {number(known[0])}{unit} to {number(known[-1])}{unit}" if len(known) > 1 else f"{number(known[0])}{unit}"
    )


@dataclass(frozen=True)
class Scale:
    """Values to px."""

    x0: float
    x1: float
    y0: float
    y1: float

    def x(self, value: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * (value - self.x0) / ((self.x1 - self.x0) or 1), 1)

    def y(self, value: float) -> float:
        return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - self.y0) / (self.y1 - self.y0), 1)


def padded(low: float, high: float) -> tuple[float, float]:
    """The range of an axis for values from ``low`` to ``high``."""
    room = 0.06 * (high - low) or 0.5 * abs(high) or 0.5
    return low - room, high + room


def ticks(low: float, high: float) -> list[float]:
    """About five round numbers from ``low`` to ``high``."""
    span = high - low
    if span <= 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(span / 5))
    step = next(m * power for m in (1, 2, 5, 10) if span / (m * power) <= 6)
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """A value with four digits. Small ones have an exponent, so that the labels of an axis stay narrow: 8e-5."""
    if 0 < abs(value) < 0.001:
        digits, exponent = f"{value:.3e}".split("e")
        return f"{float(digits):g}e{int(exponent)}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _axes(scale: Scale, unit: str, x_name: str) -> Iterator[Markup]:
    for value in ticks(scale.y0, scale.y1):
        yield _rule("grid", scale.y(value))
        yield _text(LEFT - 6, scale.y(value) + 4, "end", f"{number(value)}{unit}")
    for value in ticks(scale.x0, scale.x1):
        yield _text(scale.x(value), HEIGHT - BOTTOM + 17, "middle", number(value))
    yield _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 5, "middle", x_name)


def _rule(kind: str, y: float) -> Markup:
    return Markup('<line class="{}" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(kind, LEFT, WIDTH - RIGHT, y, y)


def _text(x: float, y: float, anchor: str, text: str) -> Markup:
    return Markup('<text x="{}" y="{}" text-anchor="{}">{}</text>').format(x, y, anchor, text)


def _curve(index: int, line: Line, scale: Scale) -> Markup:
    """A line, dots where it is short, and the band of its intervals."""
    path, pen = [], "M"
    for p in line.points:
        if p.y is None:
            pen = "M"
        else:
            path.append(f"{pen}{scale.x(p.x)},{scale.y(p.y)}")
            pen = "L"
    band = [p for p in line.points if p.low is not None and p.high is not None]
    upper = [f"{scale.x(p.x)},{scale.y(p.high)}" for p in band if p.high is not None]
    lower = [f"{scale.x(p.x)},{scale.y(p.low)}" for p in reversed(band) if p.low is not None]
    area = Markup('<polygon class="band" points="{}"/>').format(" ".join(upper + lower)) if len(band) > 1 else EMPTY
    dots = [
        Markup('<circle class="dot" cx="{}" cy="{}" r="3"/>').format(scale.x(p.x), scale.y(p.y))
        for p in (line.points if len(line.points) <= 20 else ())
        if p.y is not None
    ]
    return Markup('<g class="hue-{}">{}<path class="curve" d="{}"/>{}</g>').format(
        index % HUES + 1, area, "".join(path), join(dots)
    )


def _values(title: Text, lines: Sequence[Line], unit: str, x_name: str) -> Markup:
    at: dict[float, dict[str, Point]] = {}
    for line in lines:
        for p in line.points:
            at.setdefault(p.x, {})[line.name] = p
    rows = [[number(x), *(_value(points.get(line.name)) for line in lines)] for x, points in sorted(at.items())]
    heads = [f"{line.name}{f', {unit.strip()}' if unit.strip() else ''}" for line in lines]
    return table(title, [x_name, *heads], rows)


def _value(p: Point | None) -> str:
    if p is None or p.y is None:
        return "-"
    return (
        f"{number(p.y)} ({number(p.low)} to {number(p.high)})"
        if p.low is not None and p.high is not None
        else number(p.y)
    )
