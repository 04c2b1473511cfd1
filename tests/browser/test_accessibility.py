"""That everybody can use the page: axe finds nothing, light and dark, wide and narrow; focus, words, motion."""

import re

import pytest
from axe_playwright_python.sync_playwright import Axe
from browser.conftest import NARROW, SCREENSHOTS, WIDE
from browser.driver import Driver
from playwright.sync_api import expect

TEAL, RED = (520 / 960, 262 / 540), (0.224, 0.30)


def check(page, name):
    """Axe's findings, of which there are none; and a screenshot to look at."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png")
    results = Axe().run(page)
    assert results.violations_count == 0, results.generate_report()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "it scrolls sideways"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", ["wide", "narrow"])
def test_axe_finds_nothing(open_page, stand_in, scheme, width):
    viewport = WIDE if width == "wide" else NARROW
    page = open_page(stand_in.url, viewport=viewport, color_scheme=scheme, has_touch=width == "narrow")
    driver = Driver(page)
    name = f"{width}-{scheme}"
    expect(page.get_by_role("button", name="balloons")).to_be_visible()
    check(page, f"start-{name}")
    driver.open_sample("balloons")
    check(page, f"empty-{name}")
    driver.click(*RED)
    driver.press("New object")
    driver.drag(0.4, 0.26, 0.68, 0.9)
    driver.click(0.54, 0.7, "Shift")
    check(page, f"objects-{name}")
    page.locator("#track").click()
    expect(page.locator("#tracking-text")).to_contain_text("frames/s")
    check(page, f"tracking-{name}")
    driver.says("frames were tracked")
    driver.scrub(48)
    check(page, f"tracked-{name}")
    page.locator("#everything").click()
    driver.says("masks were found")
    check(page, f"everything-{name}")
    page.keyboard.press("Escape")
    page.locator("#help").click()
    check(page, f"help-{name}")
    page.keyboard.press("Escape")
    page.locator("#download").click()
    check(page, f"download-{name}")
    page.keyboard.press("Escape")
    page.route("**/graphql", lambda route: route.abort())
    driver.click(*TEAL)
    driver.notice("cannot be reached")
    check(page, f"notice-{name}")


def test_axe_finds_nothing_where_weights_are_random_and_a_token_is_asked_for(open_page, server):
    page = open_page("about:blank")
    page.route("**/graphql", lambda route: route.fulfill(status=401, json={"errors": [{"message": "token"}]}))
    page.goto(server.url)
    expect(page.locator("#token-dialog")).to_be_visible()
    check(page, "token")
    page.unroute("**/graphql")
    page.goto(server.url)
    expect(page.locator("#random")).to_be_visible()
    check(page, "random")


def test_everything_is_reached_by_the_tabulator_and_shows_its_focus(open_page, stand_in):
    driver = Driver(open_page(stand_in.url)).open_sample("balloons")
    page = driver.page
    driver.click(*RED)
    page.locator("#open").focus()
    reached, unseen = [], []
    for _ in range(40):
        page.keyboard.press("Tab")
        focused = page.evaluate(
            """() => {
                const element = document.activeElement;
                const ring = element.id === "scrub" ? element.parentElement : element;
                const style = getComputedStyle(ring);
                return [element.id || element.getAttribute("aria-label") || element.tagName,
                        style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2];
            }"""
        )
        if focused[0] == "BODY":
            break
        reached.append(focused[0])
        if not focused[1]:
            unseen.append(focused[0])
    wanted = [
        "mode-add",
        "mode-less",
        "everything",
        "undo",
        "clear",
        "canvas",
        "back",
        "play",
        "forward",
        "scrub",
        "new",
    ]
    wanted += ["Choose Object 1", "Name of Object 1", "Show Object 1", "Remove Object 1", "guided", "track", "download"]
    assert [name for name in reached if name in wanted] == wanted
    assert unseen == []


def test_the_dialog_of_help_is_opened_by_its_key_and_closed(open_page, stand_in):
    page = open_page(stand_in.url)
    page.keyboard.press("?")
    dialog = page.get_by_role("dialog", name="Help")
    expect(dialog).to_be_visible()
    for key in ("Arrows", "Enter", "Shift", "B", "A", "S", "N", "E", "Space", ",", ".", "T", "D", "Ctrl", "Z", "Esc"):
        expect(dialog.locator("kbd", has_text=re.compile(f"^{re.escape(key)}$")).first).to_be_visible()
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()


def test_keys_mean_nothing_where_a_name_is_typed(open_page, stand_in):
    driver = Driver(open_page(stand_in.url)).open_sample("balloons")
    driver.click(*RED)
    name = driver.page.get_by_role("textbox", name="Name of Object 1")
    name.fill("")
    name.press_sequentially("test, and so")
    expect(driver.page.locator("#tracking")).to_be_hidden()
    expect(driver.page.locator("#mode-add")).to_have_attribute("aria-pressed", "true")
    expect(driver.page.locator("#clock")).to_contain_text("1 / 96")


def test_the_theme_follows_the_system_until_the_button_says_otherwise(open_page, stand_in):
    page = open_page(stand_in.url, color_scheme="dark")
    ground = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(ground)
    page.emulate_media(color_scheme="light")
    light = page.evaluate(ground)
    assert dark != light
    page.get_by_role("button", name="Theme").click()
    page.get_by_role("button", name="Theme").click()
    assert page.evaluate(ground) == dark
    page.reload()
    assert page.evaluate(ground) == dark  # it is remembered
    page.get_by_role("button", name="Theme: dark").click()
    assert page.evaluate(ground) == light


def test_nothing_moves_for_who_wants_that(open_page, stand_in):
    page = open_page(stand_in.url)  # with prefers-reduced-motion
    moving = page.evaluate(
        """() => [...document.querySelectorAll("*")].filter((element) => {
            const { animationName, transitionDuration } = getComputedStyle(element);
            return animationName !== "none" || parseFloat(transitionDuration) > 0;
        }).length"""
    )
    assert moving == 0


def test_narrow_screens_show_all_of_it(open_page, server):
    page = open_page(server.url, viewport=NARROW, has_touch=True, is_mobile=True)
    chip = page.locator("#device")
    expect(chip).to_contain_text("SAM 2 tiny", timeout=40000)
    assert chip.evaluate("(chip) => chip.scrollWidth <= chip.clientWidth"), "the device is cut off"
    driver = Driver(page).open_sample("short")
    canvas = page.locator("#canvas").bounding_box()
    assert canvas["width"] > 330
    page.touchscreen.tap(*driver.page_position(0.5, 0.5))
    driver.wait_for_answer()
    for name in ("#everything", "#undo", "#clear", "#play", "#scrub", "#track", "#download", "#new", "#guided"):
        control = page.locator(name)
        control.scroll_into_view_if_needed()
        box = control.bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= NARROW["width"]
    page.locator("#track").tap()
    driver.says("frames were tracked")
    page.set_input_files("#file", {"name": "notes.pdf", "mimeType": "application/pdf", "buffer": b"%PDF"})
    driver.notice("notes.pdf")
    page.locator("#work").evaluate("(work) => work.scrollTo(0, work.scrollHeight)")
    page.locator("#download").tap()  # the notice does not hide it
    expect(page.locator("#download-dialog")).to_be_visible()
