"""Clicks, boxes and the list of objects."""

import numpy as np
import pytest
from browser.conftest import NARROW
from browser.driver import Driver
from playwright.sync_api import expect
from server.waiting import wait_until

from omniops.drawing import colour_of

TEAL, RED, ORANGE = (520 / 960, 262 / 540), (215 / 960, 205 / 540), (670 / 960, 150 / 540)
SKY = (0.08, 0.08)


@pytest.fixture
def work(open_page, server):
    """A clip on the server with random weights."""
    return Driver(open_page(server.url)).open_sample("balloons")


@pytest.fixture
def drawn(open_page, stand_in):
    """The clip on the server that knows where the balloons are."""
    return Driver(open_page(stand_in.url)).open_sample("balloons")


def test_a_click_makes_an_object_whose_mask_is_shown(drawn):
    before, sky = drawn.pixel(*RED), drawn.pixel(*SKY)
    drawn.click(0.21, 0.28)
    drawn.page.mouse.move(5, 5)
    assert drawn.names == ["Object 1"]
    tinted = (np.array(before) + colour_of(0)) / 2
    assert np.abs(drawn.pixel(*RED) - tinted).max() <= 2  # as in the overlay that is downloaded
    assert drawn.pixel(*SKY) == sky
    drawn.says("Object 1 covers 4 % of the picture")


def test_shift_click_and_the_button_subtract(work):
    work.click(*TEAL)
    work.click(0.5, 0.4, "Shift")
    work.page.get_by_role("button", name="Subtract", exact=True).click()
    work.click(0.3, 0.6)
    work.press("Add")
    work.click(0.6, 0.6)
    prompt = work.prompts()[0][0]
    assert prompt["labels"] == [1, 0, 0, 1]
    assert prompt["points"][1] == pytest.approx([0.5, 0.4], abs=0.005)
    assert work.summary("Object 1") == "4 prompts"


def test_subtracting_from_nothing_says_what_to_do(work):
    work.click(*TEAL, "Shift")
    assert work.names == []
    work.says("First add an object")


def test_a_drag_draws_a_box_that_later_clicks_refine(work):
    work.drag(0.4, 0.25, 0.68, 0.9)
    work.click(*TEAL)
    prompt = work.prompts()[0][0]
    assert prompt["box"] == pytest.approx([0.4, 0.25, 0.68, 0.9], abs=0.005)
    assert prompt["points"] == [pytest.approx(TEAL, abs=0.005)]
    work.drag(0.68, 0.9, 0.38, 0.2)  # from the other corner; a second box replaces the first
    assert work.prompts()[0][0]["box"] == pytest.approx([0.38, 0.2, 0.68, 0.9], abs=0.005)
    assert work.summary("Object 1") == "2 prompts"


def test_a_click_on_a_dot_takes_it_back(work):
    work.click(*TEAL)
    work.click(0.3, 0.3)
    work.click(0.3, 0.3)
    assert work.prompts()[0][0]["points"] == [pytest.approx(TEAL, abs=0.005)]
    work.click(*TEAL)
    assert work.prompts() == {0: {}}
    assert work.summary("Object 1") == "Click in the picture"
    expect(work.page.locator("#track")).to_be_disabled()


def test_more_than_three_objects_each_of_its_colour(work):
    for number in range(14):
        if number:
            work.press("New object")
        work.click(0.1 + 0.06 * number, 0.5)
    assert work.names == [f"Object {number + 1}" for number in range(14)]
    assert sorted(work.prompts()) == list(range(14))
    rows = work.page.locator(".object").all()
    assert len({row.evaluate("row => row.style.getPropertyValue('--color')") for row in rows}) == 14


def test_the_object_that_is_chosen_gets_the_clicks(work):
    work.click(*TEAL)
    work.press("New object")
    work.click(*RED)
    work.press("Choose Object 1")
    work.click(0.5, 0.6)
    assert [len(work.prompts()[id][0]["points"]) for id in (0, 1)] == [2, 1]
    expect(work.page.get_by_role("button", name="Choose Object 1")).to_have_attribute("aria-pressed", "true")


def test_names_are_edited_where_they_stand_and_sent_to_the_server(work):
    work.click(*TEAL)
    name = work.page.get_by_role("textbox", name="Name of Object 1")
    name.fill("Teal balloon")
    name.press("Enter")
    work.wait_for_answer()
    assert work.names == ["Teal balloon"]
    expect(work.page.get_by_role("button", name="Remove Teal balloon")).to_be_visible()
    work.page.reload()
    work.opened()
    assert work.names == ["Teal balloon"]


def test_an_object_is_hidden_and_shown(drawn):
    before = drawn.pixel(*RED)
    drawn.click(0.224, 0.30)
    highlighted = drawn.pixel(*RED)
    drawn.page.mouse.move(5, 5)
    eye = drawn.page.get_by_role("button", name="Show Object 1")
    eye.click()
    expect(eye).to_have_attribute("aria-pressed", "false")
    assert drawn.pixel(*RED) == before
    eye.click()
    assert drawn.pixel(*RED) == highlighted


def test_objects_are_removed_and_the_others_keep_their_numbers(work):
    for position in (TEAL, RED, ORANGE):
        work.press("New object")
        work.click(*position)
    work.press("Remove Object 2")
    assert work.names == ["Object 1", "Object 3"]
    assert sorted(work.prompts()) == [0, 2]
    work.press("New object")
    work.click(0.5, 0.8)
    assert work.names == ["Object 1", "Object 3", "Object 4"]
    work.press("Remove all objects")
    assert work.names == []
    assert work.prompts() == {}


def test_undo_and_redo_of_all_of_it(work):
    page = work.page
    work.click(*TEAL)
    first = work.shown()
    work.click(0.5, 0.6, "Shift")
    work.press("New object")
    work.drag(0.1, 0.2, 0.35, 0.7)
    page.get_by_role("textbox", name="Name of Object 2").fill("Red")
    page.get_by_role("textbox", name="Name of Object 2").press("Enter")
    work.wait_for_answer()
    done = work.prompts()
    work.press("Remove Object 1")
    assert sorted(work.prompts()) == [1]

    work.press("Undo")  # the removal
    assert work.prompts() == done
    work.press("Undo")  # the name
    assert work.names == ["Object 1", "Object 2"]
    page.keyboard.press("Control+z")  # the box
    work.wait_for_answer()
    assert sorted(work.prompts()) == [0]
    page.keyboard.press("Control+z")  # the click that subtracted
    work.wait_for_answer()
    assert work.prompts()[0][0]["labels"] == [1]
    page.mouse.move(5, 5)
    assert np.abs(work.shown() - first).max() <= 1  # the very mask of the first click
    page.keyboard.press("Control+z")
    work.wait_for_answer()
    assert work.prompts() == {}
    expect(page.locator("#undo")).to_be_disabled()

    for _ in range(4):
        page.keyboard.press("Control+Shift+z")
        work.wait_for_answer()
    assert work.prompts() == done
    assert work.names == ["Object 1", "Red"]
    work.press("Redo")
    assert sorted(work.prompts()) == [1]
    expect(page.locator("#redo")).to_be_disabled()


def test_clicks_made_faster_than_the_answers_all_arrive(work):
    for number in range(6):
        work.page.mouse.click(*work.page_position(0.2 + 0.1 * number, 0.5))
    work.wait_for_answer()
    assert len(work.prompts()[0][0]["points"]) == 6


def test_the_object_under_the_pointer_is_shown_before_a_click(drawn):
    before = drawn.pixel(*RED)
    with drawn.page.expect_response(lambda answer: "preview" in (answer.request.post_data or "")):
        drawn.page.mouse.move(*drawn.page_position(0.224, 0.30))
    tinted = 0.7 * np.array(before) + 0.3 * np.array(colour_of(0))
    # The page still has to read the answer and to draw it.
    wait_until(lambda: np.abs(drawn.pixel(*RED) - tinted).max() <= 3, 10, "the preview")
    assert drawn.names == []
    drawn.page.mouse.move(5, 5)
    assert drawn.pixel(*RED) == before


def test_hovering_asks_once_the_pointer_rests(work):
    asked = []
    work.page.on("request", lambda request: asked.append(request) if "preview" in (request.post_data or "") else None)
    for number in range(20):
        work.page.mouse.move(*work.page_position(0.3 + 0.01 * number, 0.5))
    with work.page.expect_response(lambda answer: "preview" in (answer.request.post_data or "")):
        work.page.mouse.move(*work.page_position(0.5, 0.5))
    assert len(asked) <= 4
    assert work.prompts() == {}


def test_the_keyboard_alone_does_it(work):
    page = work.page
    page.locator("#canvas").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    work.wait_for_answer()
    for _ in range(4):
        page.keyboard.press("ArrowLeft")
    page.keyboard.press("Shift+Enter")
    work.wait_for_answer()
    prompt = work.prompts()[0][0]
    assert prompt["labels"] == [1, 0]
    assert prompt["points"][0] == pytest.approx([0.5, 0.52], abs=0.001)
    assert prompt["points"][1] == pytest.approx([0.42, 0.52], abs=0.001)
    page.keyboard.press("n")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("b")
    for _ in range(5):
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowDown")
    page.keyboard.press("b")
    work.wait_for_answer()
    assert work.prompts()[1][0]["box"] == pytest.approx([0.42, 0.5, 0.52, 0.6], abs=0.001)


def test_fingers_tap_and_choose_subtract(open_page, server):
    page = open_page(server.url, viewport=NARROW, has_touch=True, is_mobile=True)
    work = Driver(page).open_sample("balloons")
    page.touchscreen.tap(*work.page_position(*TEAL))
    work.wait_for_answer()
    page.locator("#mode-less").tap()
    page.touchscreen.tap(*work.page_position(0.3, 0.5))
    work.wait_for_answer()
    assert work.prompts()[0][0]["labels"] == [1, 0]


def test_find_everything_and_make_objects_of_it(drawn):
    page = drawn.page
    drawn.click(*TEAL)
    page.get_by_role("button", name="Find everything").click()
    drawn.says("3 masks were found")
    before = drawn.pixel(0.224, 0.30)
    page.mouse.move(*drawn.page_position(*RED))
    assert drawn.pixel(0.224, 0.30) != before  # what is under the pointer is marked
    drawn.click(*RED)
    drawn.click(*ORANGE)
    drawn.click(*SKY)
    assert drawn.names == ["Object 1", "Object 2", "Object 3"]
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Find everything")).to_have_attribute("aria-pressed", "false")
    drawn.press("Undo")
    assert drawn.names == ["Object 1", "Object 2"]


def test_find_everything_with_a_model(work):
    page = work.page
    with page.expect_response(lambda answer: "findEverything" in (answer.request.post_data or "")) as answer:
        page.keyboard.press("e")
    found = answer.value.json()["data"]["findEverything"]
    work.wait_for_answer()
    if not found:
        work.says("Nothing was found")
        return
    work.says(f"{len(found)} mask")


def test_guided_upsampling_keeps_the_clicks(work):
    work.click(*TEAL)
    before = work.kept["id"]
    work.page.get_by_text("Sharper edges").click()
    work.says("A new session was started")
    work.wait_for_answer()
    assert work.kept["id"] != before
    assert work.kept["guided"] is True
    assert work.prompts()[0][0]["points"] == [pytest.approx(TEAL, abs=0.005)]
    work.page.reload()
    work.opened()
    expect(work.page.locator("#guided")).to_be_checked()


def test_guided_upsampling_is_chosen_while_it_tracks(drawn):
    page = drawn.page
    drawn.click(*TEAL)
    page.locator("#track").click()
    expect(page.locator("#tracking-text")).to_contain_text("frames/s")
    page.locator("#guided").click()
    drawn.says("A new session was started")
    expect(page.locator("#tracking")).to_be_hidden()
    expect(page.locator("#guided")).to_be_checked()
    expect(page.locator(".notice")).to_have_count(0)
    assert drawn.summary("Object 1") == "1 prompt"  # the masks of the session before are gone
    assert sorted(drawn.prompts()) == [0]


def test_guided_upsampling_that_is_refused_is_not_shown_as_chosen(drawn):
    drawn.click(*TEAL)
    answer = {"status": 503, "json": {"data": None, "errors": [{"message": "There are too many sessions"}]}}
    drawn.page.route("**/graphql", lambda route: route.fulfill(**answer))
    drawn.page.locator("#guided").click()
    drawn.notice("The server is busy")
    expect(drawn.page.locator("#guided")).not_to_be_checked()
    drawn.page.unroute("**/graphql")
    drawn.press("Try again")
    expect(drawn.page.locator("#guided")).to_be_checked()
