"""The explorer's page in a real Chromium: clicks do what they say, and nothing leaves the machine."""

import json
from urllib.parse import parse_qs, quote, urlsplit

import pytest

from browsing import DESKTOP, PHONE, browser, needs_chromium, sync_api
from conftest import make_scenes, scene
from exploring import PATIENCE, explorer

__all__ = ["browser"]  # a fixture
pytestmark = needs_chromium

ODD = "<img src=x onerror=alert(1)> & 'x'.png"
SCRIPT = "<script>alert(2)</script>.jpg".replace("/", "\u2215")  # a name cannot hold a slash


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    place = make_scenes(tmp_path_factory.mktemp("explored") / "images", 14)
    scene(50, 60, 90).save(place / ODD)
    (place / SCRIPT).write_bytes(b"no picture")
    more = "--against", "random:vit_tiny_patch16_224", "--size", 96, "--cache", tmp_path_factory.mktemp("features")
    with explorer("random:test_vit", "--data", place, *more) as started:
        started.finish()
        yield started


@pytest.fixture
def page(browser, server):
    """The explorer's page; it must not complain, nor ask another host."""
    context = browser.new_context(viewport=DESKTOP)
    page, complaints, hosts = context.new_page(), [], set()
    page.set_default_timeout(1000 * PATIENCE)
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
    page.goto(server.url)
    settled(page)
    yield page
    assert complaints == [] and hosts == {f"127.0.0.1:{server.port}"}
    context.close()


def settled(page):
    sync_api.expect(page.locator(".tile:visible").first).to_be_visible(timeout=1000 * PATIENCE)
    sync_api.expect(page.locator(".waiting")).to_have_count(0, timeout=1000 * PATIENCE)
    page.wait_for_load_state("networkidle")


def named(page, name):
    sync_api.expect(page.locator("#name")).to_have_text(name, timeout=1000 * PATIENCE)


def state(page):
    return {name: values[0] for name, values in parse_qs(urlsplit(page.url).fragment).items()}


def visit(page, /, **values):
    address = "&".join(f"{k}={quote(str(v))}" for k, v in values.items())
    with page.expect_response(lambda answer: "/api/gallery" in answer.url):
        page.evaluate("address => { location.hash = address }", address)
    settled(page)


def click_patch(page, frame, row, column, grid):
    box = frame.bounding_box()
    position = {"x": (column + 0.5) * box["width"] / grid[1], "y": (row + 0.5) * box["height"] / grid[0]}
    with page.expect_response(lambda answer: "/api/gallery" in answer.url):
        frame.click(position=position)
    settled(page)


def colours_of(frame):
    """Red + green + blue of each patch on the canvas."""
    values = frame.locator("canvas").evaluate(
        "c => [c.height, c.width, ...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]"
    )
    height, width, *data = values
    return {(i // width, i % width): sum(data[4 * i : 4 * i + 3]) for i in range(height * width)}


def first_frame(page, number=0):
    return page.locator(".network").nth(number).locator(".stage .frame").first


def test_a_click_shows_the_similarities_with_the_patch(page, server):
    visit(page, image="scene_03.png", weights="0")
    click_patch(page, first_frame(page), 1, 4, (4, 6))
    colours = colours_of(first_frame(page))
    assert max(colours, key=colours.get) == (1, 4)
    index = server.ask("find", name="scene_03.png")["image"]
    upright = server.ask("look", image=index, y=1.5 / 4, x=4.5 / 6)["upright"]
    similarities = {place: upright[place[0]][place[1]] for place in colours}
    by_colour = sorted(colours, key=colours.get)
    assert [similarities[place] for place in by_colour] == pytest.approx(sorted(similarities.values()), abs=0.02)
    marker = first_frame(page).locator(".marker").bounding_box()
    box = first_frame(page).bounding_box()
    assert marker["x"] - box["x"] == pytest.approx(4 * box["width"] / 6, abs=1.5)
    assert marker["y"] - box["y"] == pytest.approx(box["height"] / 4, abs=1.5)
    assert page.locator(".tile:visible").count() == 12
    assert page.locator(".tile .value").first.text_content() == f"{_nearest(server, index)['similarity']:.3f}"


def test_two_sets_of_weights_have_one_scale(page, server):
    visit(page, image="scene_03.png", at="0.4,0.6")
    index = server.ask("find", name="scene_03.png")["image"]
    maps = [server.ask("look", image=index, y=0.4, x=0.6, network=n)["upright"] for n in (0, 1)]
    lows = [min(min(row) for row in values) for values in maps]
    legends = page.locator(".network .legend")
    for number in (0, 1):
        assert legends.nth(number).locator(".low").text_content() == f"{min(lows):.2f}"
        assert legends.nth(number).locator(".high").text_content() == "1.00, one scale for both weights"
    assert abs(lows[0] - lows[1]) > 0.01
    least = [min(colours_of(first_frame(page, number)).values()) for number in (0, 1)]
    assert least.index(min(least)) == lows.index(min(lows)) and min(least) < max(least)
    visit(page, image="scene_03.png", at="0.4,0.6", weights="0")
    assert legends.nth(0).locator(".low").text_content() == f"{lows[0]:.2f}"
    assert legends.nth(0).locator(".high").text_content() == "1.00"


def test_the_share_of_variance_stands_at_the_principal_components(page):
    visit(page, image="scene_03.png", show="pca", weights="0")
    network = page.locator(".network").first
    assert network.locator(".others h3").text_content() == "Nearest images by the chosen patch"
    text = network.locator(".legend .low").text_content()
    assert text.startswith("3 components: ") and text.endswith(" % of variance")


def _nearest(server, index):
    return server.ask("gallery", image=index, y=1.5 / 4, x=4.5 / 6)["tiles"][0]


def test_a_click_on_another_image_explores_from_there(page):
    visit(page, image="scene_03.png", weights="0", order="name", filter="scene_08")
    click_patch(page, page.locator(".tile .frame").first, 2, 5, (4, 6))
    assert state(page)["image"] == "scene_08.jpg" and page.text_content("#name") == "scene_08.jpg"
    assert state(page)["at"] == f"{2.5 / 4:.5f},{5.5 / 6:.5f}"


def test_arrow_keys_move_the_patch_and_say_where_it_is(page):
    visit(page, image="scene_03.png", weights="0", at=f"{0.5 / 4},{0.5 / 6}")
    first_frame(page).focus()
    for key in ("ArrowUp", "ArrowDown", "ArrowRight", "ArrowRight"):
        page.keyboard.press(key)
    sync_api.expect(page.locator("#announcement")).to_contain_text("Patch in row 2, column 3", timeout=1000 * PATIENCE)
    assert state(page)["at"] == f"{1.5 / 4:.5f},{2.5 / 6:.5f}"
    assert "row 2 of 4, column 3 of 6" in first_frame(page).get_attribute("aria-label")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # the first tile
    sync_api.expect(page.locator("#name")).not_to_have_text("scene_03.png", timeout=1000 * PATIENCE)


def test_a_rotation_shows_both_maps_and_the_numbers(page, server):
    visit(page, image="scene_04.jpg", weights="0", at=f"{0.5 / 4},{1.5 / 6}")
    with page.expect_response(lambda answer: "/api/look" in answer.url) as answer:
        page.get_by_role("radio", name="90°").check()
    settled(page)
    follows = json.loads(answer.value.body())["rotated"]
    stages = page.locator(".stage:visible")
    assert stages.count() == 4 and state(page)["rotation"] == "1"
    colours = colours_of(stages.nth(1).locator(".frame"))
    assert (
        max(colours, key=colours.get) == (4, 0) == tuple(follows["patch"])
    )  # the second column is the last but one row
    assert f"{follows['mean']:.3f}" in page.text_content(".numbers dt:nth-of-type(2)")
    boxes = [stage.locator(".frame").bounding_box() for stage in stages.all()]
    for one, other in (boxes[:2], boxes[2:]):  # no hole beside a rotated image
        assert one["y"] == other["y"] and one["height"] == pytest.approx(other["height"], rel=0.03)
    click_patch(page, stages.nth(1).locator(".frame"), 5, 3, (6, 4))  # the bottom right corner was the bottom left
    assert state(page)["at"] == f"{3.5 / 4:.5f},{0.5 / 6:.5f}"


def test_two_sets_of_weights_side_by_side(page):
    visit(page, image="scene_02.jpg")
    assert page.locator(".network:visible").count() == 2
    titles = page.locator(".chosen h3").all_text_contents()
    assert titles == ["random:test_vit (test_vit)", "random:vit_tiny_patch16_224 (vit_tiny_patch16_224)"]
    one, other = (colours_of(first_frame(page, number)) for number in (0, 1))
    assert one.keys() == other.keys() and one != other
    left, right = (page.locator(".network").nth(number).bounding_box() for number in (0, 1))
    assert left["y"] == right["y"] and left["x"] + left["width"] <= right["x"]
    page.get_by_label("Second").check()
    settled(page)
    assert page.locator(".network:visible").count() == 1


def test_pca_colours(page):
    visit(page, image="scene_02.jpg", weights="0", rotation=2)
    with page.expect_response(lambda answer: "/api/gallery" in answer.url) as answer:
        page.get_by_label("PCA").check()
    settled(page)
    content = json.loads(answer.value.body())
    assert page.locator(".stage:visible").count() == 2
    for stage, name in enumerate(("upright", "rotated")):
        expected = {(r, c): sum(rgb) for r, row in enumerate(content[name]) for c, rgb in enumerate(row)}
        assert colours_of(page.locator(".stage .frame").nth(stage)) == expected


def test_a_link_restores_the_state_and_back_goes_back(page, server):
    visit(page, image="scene_05.png", weights="1", rotation="3", show="pca", order="name", page="1")
    address, shown = page.url, page.locator(".network:visible .tile .title").all_text_contents()
    assert shown
    page.get_by_role("button", name="Next", exact=True).click()
    named(page, "scene_06.jpg")
    settled(page)
    page.go_back()
    named(page, "scene_05.png")
    settled(page)
    assert page.url == address
    page.go_forward()
    named(page, "scene_06.jpg")
    page.goto("about:blank")
    page.goto(address)
    settled(page)
    assert page.text_content("#name") == "scene_05.png"
    assert page.get_by_role("radio", name="270°").is_checked() and page.get_by_label("PCA").is_checked()
    assert page.get_by_label("Second").is_checked() and page.get_by_label("By name").is_checked()
    assert page.locator(".network:visible .tile .title").all_text_contents() == shown


def test_names_with_html_are_text(page):
    visit(page, image=ODD, weights="0", order="name")
    assert page.text_content("#name") == ODD
    assert ODD in page.locator(".tile .title").all_text_contents()
    assert page.locator("main img[src='x'], main script").count() == 0
    assert SCRIPT in page.text_content("#left-out li")


def test_the_counts_of_images_agree(page):
    visit(page, image="scene_03.png", weights="0")
    assert page.text_content("#progress").strip() == "16 images: 15 can be searched, 1 cannot be read."
    assert page.text_content(".pages span") == "page 1 of 2, 14 other images"
    visit(page, image="scene_03.png", weights="0", order="name")
    assert page.text_content(".pages span") == "page 1 of 2, 15 images"
    visit(page, image="scene_03.png", weights="0", order="name", filter="scene_08")
    assert page.text_content(".pages span") == "page 1 of 1, 1 image"


def test_an_unknown_image_is_a_sentence(page):
    page.evaluate("location.hash = 'image=gone.jpg'")
    page.wait_for_selector("#problem:visible")
    assert "There is no image gone.jpg" in page.text_content("#problem")
    visit(page, image="scene_01.png")
    assert page.locator("#problem").is_hidden()


def test_it_fits_a_phone(browser, server):
    context = browser.new_context(viewport=PHONE, color_scheme="dark", has_touch=True)
    page = context.new_page()
    page.goto(f"{server.url}#image=scene_04.jpg&rotation=1&weights=0")
    settled(page)
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    box = page.locator(".stage:visible .frame").first.bounding_box()
    page.touchscreen.tap(box["x"] + 0.9 * box["width"], box["y"] + 0.1 * box["height"])
    page.wait_for_url("**at=0.12500%2C0.91667**")
    context.close()
