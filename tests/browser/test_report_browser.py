"""The pages of a run and of a comparison in a real browser: opened as files, hovered, zoomed, on a phone."""

import json
import re

import pytest
from comparing import data, whole

from browsing import DESKTOP, PHONE, browser, needs_chromium
from conftest import TINY, make_scenes, shared

__all__ = ["browser", "data", "whole"]  # fixtures
pytestmark = needs_chromium
NASTY = "<img src=x onerror=document.title='hacked'>.png"


@pytest.fixture(scope="module")
def run_page(tmp_path_factory):
    """The page of a run of which one file could not be used, whose name is HTML."""

    def make(folder):
        from gtsa import pretrain

        scenes = make_scenes(folder / "scenes")
        (scenes / NASTY).write_bytes(b"no image")
        pretrain(str(scenes), out=str(folder / "run"), **TINY | {"report": True})

    return shared(tmp_path_factory, "browser", make) / "run" / "report.html"


@pytest.fixture
def visit(browser):
    """Opens a page from its file, and notes what went wrong and what was requested."""
    contexts, problems, requests = [], [], []

    def open_file(path, viewport=DESKTOP, **options):
        contexts.append(browser.new_context(viewport=viewport, **options))
        page = contexts[-1].new_page()
        page.on("console", lambda message: problems.append(message.text) if message.type != "log" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        return page

    yield open_file
    for context in contexts:
        context.close()
    assert problems == []
    assert all(url.startswith(("file://", "data:")) for url in requests)


def test_pictures_have_a_frame(browser, finished):
    """A white picture would not be seen on a white page."""
    page = browser.new_page()
    page.goto((finished / "report.html").as_uri())
    widths = page.locator("main img").evaluate_all("all => all.map(img => getComputedStyle(img).borderTopWidth)")
    assert len(widths) > 20 and set(widths) == {"1px"}
    page.close()


def chart(page, title):
    return page.locator("figure.chart", has=page.locator(".title", has_text=re.compile(f"^{title}$")))


def place(figure, share):
    """The point of the plot at a share of its width, in the page."""
    figure.scroll_into_view_if_needed()
    box = figure.locator(".plot > svg").bounding_box()
    left, right = 60 / 480, 1 - 12 / 480
    return box["x"] + box["width"] * (left + share * (right - left)), box["y"] + box["height"] / 2


def steps(figure):
    """The labels of the horizontal axis."""
    texts = figure.locator(".plot > svg text[text-anchor=middle]").all_text_contents()
    return [float(text.replace(",", "")) for text in texts[:-1]]


def test_hover_shows_the_value_of_the_log(visit, run_page):
    lines = [json.loads(line) for line in (run_page.parent / "metrics.jsonl").read_text().splitlines()]
    figure = chart(page := visit(run_page), "Loss")
    for share, line in ((0.0, lines[0]), (1.0, lines[-1])):
        page.mouse.move(*place(figure, share))
        tip = figure.locator(".tip").inner_text()
        assert tip.startswith(f"step {line['step']}")
        assert float(tip.split()[-1]) == pytest.approx(line["loss"], abs=6e-4)
    page.mouse.move(5, 5)
    assert figure.locator(".tip").inner_text() == ""


def test_zoom_by_dragging_and_back(visit, run_page):
    figure = chart(page := visit(run_page), "Loss")
    before = steps(figure)
    assert figure.locator("button.reset").is_hidden()
    page.mouse.move(*place(figure, 0.05))
    page.mouse.down()
    page.mouse.move(*place(figure, 0.5), steps=4)
    page.mouse.up()
    after = steps(figure)
    assert max(after) < max(before) and max(after) <= 7
    assert figure.locator("button.reset").is_visible()
    figure.locator("button.reset").click()
    assert steps(figure) == before
    assert figure.locator("button.reset").is_hidden()


def test_charts_by_keyboard(visit, run_page):
    figure = chart(page := visit(run_page), "Loss")
    before = steps(figure)
    figure.locator(".plot > svg").focus()
    page.keyboard.press("End")
    assert figure.locator(".tip").inner_text().startswith("step 12")
    page.keyboard.press("ArrowLeft")
    assert figure.locator(".tip").inner_text().startswith("step 10")
    page.keyboard.press("+")
    assert steps(figure) != before
    page.keyboard.press("Escape")
    assert steps(figure) == before


def test_names_of_files_are_text(visit, run_page):
    page = visit(run_page)
    assert NASTY in page.inner_text("body")
    assert page.locator("img[src=x]").count() == 0
    assert page.title() == "Report of the run run"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_sideways_scroll(visit, run_page, whole, scheme):
    for path in (run_page, whole / "report.html"):
        page = visit(path, PHONE, color_scheme=scheme)
        page.evaluate("document.querySelectorAll('details').forEach((details) => { details.open = true; })")
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        assert page.evaluate("document.body.scrollWidth") <= PHONE["width"]


def test_colours_follow_the_scheme(visit, run_page):
    backgrounds = [
        visit(run_page, color_scheme=scheme).evaluate("getComputedStyle(document.body).backgroundColor")
        for scheme in ("light", "dark")
    ]
    assert backgrounds == ["rgb(255, 255, 255)", "rgb(20, 24, 22)"]


@pytest.mark.parametrize("script", [True, False])
def test_labels_of_axes_are_whole_and_alike(visit, run_page, script):
    page = visit(run_page, java_script_enabled=script)
    for title, least in (("Learning rate", "0"), ("Effective rank", "0"), ("Spread", "0")):
        figure = chart(page, title)
        figure.scroll_into_view_if_needed()
        labels = figure.locator(".plot > svg text[text-anchor=end]")
        assert labels.first.text_content() == least
        left = figure.locator(".plot > svg").bounding_box()["x"]
        assert all(label.bounding_box()["x"] >= left for label in labels.all())
    assert chart(page, "Learning rate").locator("text[text-anchor=end]").nth(1).text_content() == "2e-5"


def test_paper_gets_what_is_closed(visit, run_page):
    page = visit(run_page)
    settings = page.locator("details", has=page.locator("summary", has_text="all settings"))
    assert settings.get_attribute("open") is None
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.emulate_media(media="print")
    assert settings.locator("tbody").is_visible() and page.locator(".chart details").first.is_hidden()
    style = "getComputedStyle(document.querySelector('figure.chart')).breakInside"
    assert page.evaluate(style) == "avoid"
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert settings.get_attribute("open") is None


def test_without_javascript_charts_and_values_are_there(visit, run_page):
    figure = chart(visit(run_page, java_script_enabled=False), "Loss")
    assert figure.locator("path.curve").get_attribute("d").count("L") == 5
    figure.locator("summary").click()
    assert figure.locator("tbody tr").count() == 6


def test_what_a_screen_reader_gets(visit, run_page):
    page = visit(run_page)
    assert page.get_by_role("heading", level=1).count() == 1
    assert page.get_by_role("main").count() == 1
    assert page.locator("img:not([alt]), img[alt='']").count() == 0
    assert page.get_by_role("img", name=re.compile("^Line chart of Loss by step: loss from ")).count() == 1
    assert page.locator("table").count() == page.locator("table caption").count()
    assert page.locator("th:not([scope])").count() == 0


def test_the_page_of_a_comparison(visit, whole):
    page = visit(whole / "report.html")
    assert page.get_by_role("heading", level=1).inner_text() == "Which method is best on these images?"
    assert page.locator("img:not([alt]), img[alt='']").count() == 0
    figure = chart(page, "Effective rank of patch tokens")
    page.mouse.move(*place(figure, 1.0))
    assert figure.locator(".tip").inner_text().startswith("step 2")
