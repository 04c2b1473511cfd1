"""What was found, as files."""

import io
import json
import zipfile

import av
import numpy as np
import pytest
from browser import scene
from browser.driver import Driver
from PIL import Image
from playwright.sync_api import expect

from omniops.sam2 import rle

TEAL, RED = (520 / 960, 262 / 540), (0.224, 0.30)


@pytest.fixture(scope="module")
def tracked(browser, stand_in):
    """A video with two objects, one of them named, tracked to its end."""
    context = browser.new_context(viewport={"width": 1280, "height": 800}, accept_downloads=True)
    driver = Driver(context.new_page())
    driver.page.goto(stand_in.url)
    driver.open_sample("balloons")
    driver.click(*RED)
    name = driver.page.get_by_role("textbox", name="Name of Object 1")
    name.fill("Red balloon")
    name.press("Enter")
    driver.press("New object")
    driver.click(*TEAL)
    driver.track()
    yield driver
    context.close()


def fetch(driver, title):
    """The file's name and bytes."""
    driver.page.get_by_role("button", name="Download", exact=True).click()
    with driver.page.expect_download(timeout=60000) as download:
        driver.page.get_by_role("button", name=title).click()
    expect(driver.page.locator("#download-dialog")).to_be_hidden()
    driver.says("is downloaded")
    return download.value.suggested_filename, download.value.path().read_bytes()


def test_masks_as_coco(tracked):
    name, data = fetch(tracked, "Masks as JSON")
    assert name == "balloons-coco.json"
    found = json.loads(data)
    assert {(record["frame"], record["id"]) for record in found} == {
        (f, o) for f in range(scene.FRAMES) for o in (0, 1)
    }
    red = next(record for record in found if (record["frame"], record["id"]) == (30, 0))
    assert red["name"] == "Red balloon"
    assert (rle.decode(red["segmentation"]).astype(bool) == scene.masks(30)[1]).all()


def test_masks_as_pictures(tracked):
    name, data = fetch(tracked, "Masks as PNG")
    assert name == "balloons-png.zip"
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = sorted(archive.namelist())
        assert len(names) == 2 * scene.FRAMES
        mask = np.asarray(Image.open(io.BytesIO(archive.read(next(n for n in names if "ed" in n and "00030" in n)))))
    assert ((mask > 0) == scene.masks(30)[1]).all()


@pytest.mark.parametrize(
    ("title", "ending"),
    [
        ("Video with masks, MP4", "overlay.mp4"),
        ("Video with masks, WebM", "overlay.webm"),
        ("Cut-out, WebM", "cutout.webm"),
        ("Cut-out, MP4", "cutout.mp4"),
    ],
)
def test_videos(tracked, title, ending):
    name, data = fetch(tracked, title)
    assert name == f"balloons-{ending}"
    with av.open(io.BytesIO(data)) as container:
        frames = sum(1 for _ in container.decode(video=0))
    assert frames == scene.FRAMES


def test_a_download_tells_how_far_it_is_and_is_cancelled(tracked):
    page = tracked.page
    page.route("**/downloads/**", lambda route: None)  # never answered
    page.route("**/progress/*", lambda route: route.fulfill(json={"done": 30, "total": 96, "what": "writing"}))
    page.get_by_role("button", name="Download", exact=True).click()
    page.get_by_role("button", name="Video with masks, MP4").click()
    expect(page.locator("#fetching-text")).to_have_text("Writing, 31 %")
    page.locator("#fetching-cancel").click()
    expect(page.locator("#fetching")).to_be_hidden()
    page.unroute("**/downloads/**")
    page.route(
        "**/downloads/**", lambda route: route.fulfill(status=503, json={"error": {"message": "Too much to do"}})
    )
    page.get_by_role("button", name="Masks as PNG").click()
    expect(page.get_by_role("alert")).to_contain_text(
        "Masks as PNG: Too much to do. Try again, or choose another format."
    )
    page.unroute("**/downloads/**")
    page.unroute("**/progress/*")
    page.keyboard.press("Escape")


def test_a_picture_as_files(open_page, server):
    page = open_page(server.url, accept_downloads=True)
    driver = Driver(page)
    file = io.BytesIO()
    Image.fromarray(scene.picture(0)).resize((320, 180)).save(file, "JPEG")
    page.set_input_files("#file", {"name": "photo.jpg", "mimeType": "image/jpeg", "buffer": file.getvalue()})
    driver.opened()
    driver.click(0.5, 0.5)
    for title, ending in (("Picture with masks, PNG", "overlay.png"), ("Cut-out, PNG", "cutout.png")):
        name, data = fetch(driver, title)
        assert name.endswith(ending)
        picture = Image.open(io.BytesIO(data))
        assert picture.size == (320, 180)
        assert ("A" in picture.getbands()) == ("cutout" in ending)
    _, data = fetch(driver, "Masks as JSON")
    assert [record["segmentation"]["size"] for record in json.loads(data)] == [[180, 320]]
