"""Pages: what is put in is escaped, tables have headers, and charts hold the values that they were given."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gtsa.core import chart, html
from gtsa.core.chart import Line, Point, line_chart

NASTY = '<script>alert("x")</script>\u202e & \x1b[31m\n.png'


class Reader(HTMLParser):
    """Text, tags and attributes of a page, as a browser's parser takes them."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text = [], []
        self.feed(str(page))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)


@given(st.text())
def test_text_comes_out_as_it_went_in(text):
    found = Reader(html.paragraph(text))
    assert [tag for tag, _ in found.tags] == ["p"]
    assert "".join(found.text) == text


@given(st.text())
def test_a_name_is_text_without_control_characters(name):
    found = Reader(html.code(name))
    assert [tag for tag, _ in found.tags] == ["code"]
    assert "".join(found.text).isprintable()


def test_names_in_every_place_are_text():
    parts = [
        html.table(NASTY, [NASTY, NASTY], [[html.code(NASTY), NASTY]]),
        html.figure(html.image(b"x", NASTY), NASTY),
        html.section(NASTY, html.bullets([NASTY])),
        html.details(NASTY, html.preformatted(NASTY)),
        html.facts([(NASTY, NASTY)]),
        line_chart(NASTY, [Line(NASTY, [Point(0, 1.0), Point(1, 2.0)])], unit=NASTY, x_name=NASTY, note=NASTY),
    ]
    page = html.page(NASTY, *parts)
    assert [tag for tag, _ in Reader(page).tags].count("script") == 1  # the page's own
    assert 'alert("x")</script>' not in page


def test_a_page_has_a_language_a_title_and_a_policy_without_network():
    page = html.page("A title", html.section("First", html.paragraph("text")))
    tags = Reader(page).tags
    assert ("html", {"lang": "en"}) in tags
    policy = next(attrs["content"] for _, attrs in tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'") and "http" not in policy
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page)
    assert [tag for tag, _ in tags if re.fullmatch(r"h\d", tag)] == ["h1", "h2"]


def test_a_table_has_headers_of_rows_and_columns():
    table = html.table("Sizes", ["name", "px"], [["a", "1"], ["b", "2"]])
    scopes = [attrs["scope"] for tag, attrs in Reader(table).tags if tag == "th"]
    assert scopes == ["col", "col", "row", "row"]
    assert "<caption>Sizes</caption>" in table


def test_nothing_makes_no_section():
    assert html.section("Empty", html.bullets([]), html.grid([])) == ""
    assert line_chart("Empty", [Line("none", [Point(0, None)])]) == ""


def test_a_chart_is_svg_with_the_values_in_a_table():
    figure = line_chart("Loss", [Line("loss", [Point(0, 2.0), Point(10, 1.5, 1.0, 2.0), Point(20, 1.0)])], " s")
    svg = ElementTree.fromstring(re.search(r"<svg viewBox=\"0 0 480.*?</svg>", figure, re.S)[0])
    assert svg.get("role") == "img" and svg.get("aria-label") == "Line chart of Loss by step: loss from 2 s to 1 s"
    path = svg.find(".//path").get("d")
    xs, ys = zip(*((float(x), float(y)) for x, y in re.findall(r"([\d.]+),([\d.]+)", path)), strict=True)
    assert xs[0] < xs[1] < xs[2] and xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.2)
    assert ys[0] < ys[1] < ys[2] and ys[1] - ys[0] == pytest.approx(ys[2] - ys[1], abs=0.2)  # SVG counts downwards
    cells = re.findall(r"<t[dh](?: scope=\"row\")?>([^<]*)</t", figure.split("<tbody>")[1])
    assert cells == ["0", "2", "10", "1.5 (1 to 2)", "20", "1"]


def test_a_missing_value_interrupts_the_line():
    figure = line_chart("Loss", [Line("loss", [Point(0, 1.0), Point(1, None), Point(2, 3.0)])])
    assert re.search(r'class="curve" d="([^"]+)"', figure)[1].count("M") == 2


def axis_of(figure):
    """The labels of the vertical axis."""
    return [float(text) for text in re.findall(r'text-anchor="end">([^<]+)<', figure)]


def test_an_axis_holds_the_values_to_include():
    line = Line("rank", [Point(0, 32.2), Point(1, 31.9)])
    near, whole = line_chart("Rank", [line]), line_chart("Rank", [line], include=[0])
    assert min(axis_of(near)) > 31 and min(axis_of(whole)) == 0
    assert json.loads(Reader(whole).tags[0][1]["data-chart"])["include"] == [0]  # for page.js
    assert json.loads(Reader(line_chart("Rank", [line], level=25)).tags[0][1]["data-chart"])["include"] == [25]


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (8e-5, "8e-5"), (-0.000123456, "-1.235e-4"), (0.001, "0.001"), (12345.6, "12,346")]
)
def test_numbers_are_short(value, text):
    assert chart.number(value) == text


def test_a_long_line_is_thinned_to_means_and_says_so():
    points = [Point(x, float(x)) for x in range(10 * chart.MOST)]
    figure = line_chart("Long", [Line("a", points)])
    data = json.loads(Reader(figure).tags[0][1]["data-chart"])["lines"][0]["points"]
    assert len(data) == chart.MOST
    assert data[0][:2] == [9, 4.5]
    assert "mean of about 10 lines" in figure
    figure = line_chart("Two", [Line("empty", [Point(0, None)]), Line("a", points)])  # only lines with values count
    assert "mean of about 10 lines" in figure


def test_the_script_draws_with_the_same_numbers():
    script = (Path(chart.__file__).parent / "page.js").read_text()
    for name in ("WIDTH", "HEIGHT", "LEFT", "RIGHT", "TOP", "BOTTOM", "HUES"):
        assert f" {name} = {getattr(chart, name)}" in script


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_ticks_are_round_and_inside(low, span):
    values = chart.ticks(low, low + span)
    assert 1 <= len(values) <= 8
    assert all(low - span * 1e-5 <= v <= low + span * (1 + 1e-5) for v in values)
    assert values == sorted(values)
