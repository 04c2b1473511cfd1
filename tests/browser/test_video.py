"""The timeline: scrubbing, playing, tracking."""

import re
from functools import cache

import numpy as np
import pytest
from browser import scene
from browser.conftest import SHORT
from browser.driver import Driver
from playwright.sync_api import expect

from omniops.drawing import colour_of

TEAL, RED = (520 / 960, 262 / 540), (0.224, 0.30)


@pytest.fixture
def drawn(open_page, stand_in):
    return Driver(open_page(stand_in.url)).open_sample("balloons")


@pytest.fixture
def short(open_page, server):
    """A clip of a few frames on the server with random weights."""
    return Driver(open_page(server.url)).open_sample("short")


PLACES = [(0.2 + 0.02 * i, 0.3 + 0.03 * j) for i in range(28) for j in range(5)]


@cache
def looks():
    """The colours of every frame of the scene at PLACES."""
    rows, columns = np.array([(int(y * scene.HEIGHT), int(x * scene.WIDTH)) for x, y in PLACES]).T
    return np.stack([scene.picture(frame)[rows, columns] for frame in range(scene.FRAMES)]).astype(int)


def nearest(driver):
    """The frame of the scene that looks most like what is shown."""
    return int(np.abs(looks() - np.array(driver.pixels(PLACES))).mean((1, 2)).argmin())


def test_scrubbing_shows_the_frame_forwards_and_backwards(drawn):
    for frame in (0, 50, 51, 95, 20, 19, 94):
        drawn.scrub(frame)
        assert abs(nearest(drawn) - frame) <= 1
        expect(drawn.page.locator("#clock")).to_have_text(
            re.compile(rf"^{frame + 1} / 96 · {int(frame / 24)}\.\d\d s$")
        )
    expect(drawn.page.locator("#scrub")).to_have_attribute("aria-valuetext", "Frame 95 of 96, 3.92 seconds")


def test_the_slider_is_dragged_and_moved_by_keys(drawn):
    box = drawn.page.locator("#scrub").bounding_box()
    drawn.page.mouse.click(box["x"] + 0.5 * box["width"], box["y"] + box["height"] / 2)
    assert 46 <= drawn.frame <= 49
    drawn.page.keyboard.press("Home")
    drawn.page.keyboard.press("ArrowRight")
    expect(drawn.page.locator("#clock")).to_contain_text("2 / 96")
    drawn.page.keyboard.press(" ")
    expect(drawn.page.get_by_role("button", name="Pause")).to_be_visible()


def test_frames_are_stepped_and_played(drawn):
    page = drawn.page
    page.keyboard.press(".")
    page.keyboard.press(".")
    page.keyboard.press(",")
    expect(page.locator("#clock")).to_contain_text("2 / 96")
    page.get_by_role("button", name="Next frame").click()
    page.get_by_role("button", name="Previous frame").click()
    expect(page.locator("#clock")).to_contain_text("2 / 96")
    page.get_by_role("button", name="Play").click()
    expect(page.locator("#clock")).to_contain_text(re.compile(r"^(1[2-9]|[2-9]\d) /"))
    page.get_by_role("button", name="Pause").click()
    expect(page.get_by_role("button", name="Play")).to_be_visible()
    page.evaluate("document.activeElement.blur()")
    drawn.scrub(93)
    page.keyboard.press(" ")
    expect(page.locator("#clock")).to_contain_text("96 / 96")
    expect(page.get_by_role("button", name="Play")).to_be_visible()  # it stops at the end


def test_playing_keeps_time(drawn):
    """Four seconds of clip take about four seconds, however slow the machine draws."""
    page = drawn.page
    took = page.evaluate(
        """() => new Promise((resolve) => {
            const began = performance.now();
            document.getElementById("play").click();
            const clock = setInterval(() => {
                if (document.getElementById("play").getAttribute("aria-label") !== "Play") return;
                clearInterval(clock);
                resolve((performance.now() - began) / 1000);
            }, 20);
        })"""
    )
    assert 3.7 < took < 8


def test_tracking_follows_objects_through_the_video(drawn):
    page = drawn.page
    drawn.click(*RED)
    drawn.press("New object")
    drawn.click(*TEAL)
    plain = scene.picture(70)
    page.locator("#track").click()
    text = page.locator("#tracking-text")
    expect(text).to_have_text(re.compile(r"^\d+ / 96 frames · [\d.]+ frames/s · \d+ s left$"))
    assert 0 < float(page.locator("#tracking-progress").evaluate("bar => bar.value")) < 1
    drawn.says("All 96 frames were tracked")
    assert drawn.frame == 95  # what was tracked last is shown
    assert drawn.summary("Object 1") == "1 prompt · 96 frames"
    drawn.scrub(70)
    x, y = scene.centre(1, 70)
    before = plain[int(y), int(x)].astype(int)
    after = drawn.pixel(x / scene.WIDTH, y / scene.HEIGHT)
    assert np.abs(after - (before + colour_of(0)) / 2).max() <= 8
    marks = page.evaluate(
        """() => {
            const canvas = document.getElementById("marks");
            const at = (x, y) => [...canvas.getContext("2d").getImageData(x, y, 1, 1).data.slice(0, 3)];
            return [at(canvas.width * 0.6 | 0, 13), at(canvas.width * 0.6 | 0, 25)];
        }"""
    )
    assert marks == [list(colour_of(0)), list(colour_of(1))]


def test_tracking_is_cancelled(drawn):
    page = drawn.page
    drawn.click(*RED)
    page.locator("#track").click()
    expect(page.locator("#tracking-text")).to_contain_text("frames/s")
    page.get_by_role("button", name="Cancel").click()
    drawn.says("Tracking was cancelled")
    expect(page.locator("#track")).to_be_enabled()
    frames = int(re.search(r"(\d+) frames", drawn.summary("Object 1"))[1])
    assert 1 <= frames < 96
    page.keyboard.press("t")
    expect(page.locator("#tracking-text")).to_contain_text("frames/s")
    page.keyboard.press("Escape")
    drawn.says("Tracking was cancelled")
    drawn.track()  # and again, to the end
    assert drawn.summary("Object 1") == "1 prompt · 96 frames"


def test_a_click_while_it_tracks_ends_the_tracking_and_counts(drawn):
    page = drawn.page
    drawn.click(*RED)
    page.locator("#track").click()
    expect(page.locator("#tracking-text")).to_contain_text("frames/s")
    page.get_by_role("button", name="New object").click()
    page.locator("#scrub").evaluate("slider => { slider.value = 0; slider.dispatchEvent(new Event('input')); }")
    expect(page.locator("#clock")).to_contain_text("1 / 96")
    drawn.click(*TEAL)
    drawn.notice("Tracking stopped")
    assert sorted(drawn.prompts()) == [0, 1]


def test_looking_elsewhere_while_it_tracks(drawn):
    page = drawn.page
    drawn.click(*RED)
    page.locator("#track").click()
    expect(page.locator("#tracking-text")).to_contain_text("frames/s")
    drawn.scrub(3)
    drawn.says("frames were tracked")
    assert drawn.frame == 3


def test_tracking_with_a_model_from_a_frame_in_the_middle(short):
    """Forwards from there, then back to the first frame."""
    short.scrub(5)
    short.click(0.5, 0.5)
    short.track()
    assert short.summary("Object 1") == f"1 prompt · {SHORT} frames"
    short.scrub(8)
    short.click(0.2, 0.2, "Shift")
    expect(short.page.locator("#track")).to_have_text("Track the changes")
    short.track()
    expect(short.page.locator("#track")).to_have_text("Track again")
    assert sorted(short.prompts()[0]) == [5, 8]


def test_what_was_tracked_is_there_after_a_reload(short):
    short.click(0.5, 0.5)
    short.track()
    short.scrub(7)
    shown = short.shown()
    short.page.reload()
    short.opened()
    expect(short.page.locator("#clock")).to_contain_text("8 /")
    assert short.summary("Object 1") == f"1 prompt · {SHORT} frames"
    assert np.abs(short.shown() - shown).max() <= 1
    short.press("New object")
    short.click(0.3, 0.3)
    assert short.names == ["Object 1", "Object 2"]


def test_without_webcodecs_frames_come_from_a_video_element(open_page, stand_in, browser):
    page = open_page("about:blank")
    page.add_init_script("delete globalThis.VideoDecoder")
    page.goto(stand_in.url)
    driver = Driver(page).open_sample("balloons")
    for frame in (0, 50, 95, 20):
        driver.scrub(frame)
        assert abs(nearest(driver) - frame) <= 1
    driver.scrub(0)
    driver.click(*RED)
    driver.track()
    assert driver.summary("Object 1") == "1 prompt · 96 frames"
