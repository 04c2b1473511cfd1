"""How pictures and videos come in."""

import io
import re

import av
import numpy as np
import pytest
from browser import scene
from browser.driver import Driver
from PIL import Image
from playwright.sync_api import expect


@pytest.fixture
def start(open_page, server):
    return Driver(open_page(server.url))


@pytest.fixture(scope="module")
def photo():
    """A picture with a border that tells its size apart."""
    file = io.BytesIO()
    Image.fromarray(scene.picture(0)).resize((480, 270)).save(file, "JPEG", quality=92)
    return {"name": "holiday.jpg", "mimeType": "image/jpeg", "buffer": file.getvalue()}


def webm(seconds, size=(160, 96)):
    """A VP9 video, whose frames grow lighter."""
    file = io.BytesIO()
    with av.open(file, "w", format="webm") as container:
        video = container.add_stream("libvpx-vp9", rate=12, options={"deadline": "realtime", "cpu-used": "8"})
        video.width, video.height = size
        video.pix_fmt = "yuv420p"
        for t in range(int(12 * seconds)):
            frame = av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), 40 + 4 * t, np.uint8), format="rgb24")
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
    return {"name": "film.webm", "mimeType": "video/webm", "buffer": file.getvalue()}


def choose(page, file):
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Choose a file").click()
    chooser.value.set_files(file)


def test_a_picture_is_chosen_and_worked_on(start, photo):
    page = start.page
    choose(page, photo)
    start.opened()
    expect(page.locator("#title")).to_have_text("holiday.jpg")
    expect(page.locator("#timeline")).to_be_hidden()
    expect(page.locator("#track")).to_be_hidden()
    start.click(0.54, 0.5)
    start.drag(0.1, 0.2, 0.4, 0.7)
    assert start.names == ["Object 1"]
    assert start.prompts()[0][0]["box"] is not None
    page.get_by_role("button", name="Show Object 1").click()
    assert np.abs(np.array(start.pixel(0.05, 0.1)) - scene.picture(0)[54, 48]).max() < 8
    page.reload()
    start.opened()
    assert start.names == ["Object 1"]


def test_a_video_is_chosen_converted_and_tracked(start):
    page = start.page
    choose(page, webm(3))
    start.opened()
    # Of longer videos the server takes the first two seconds, at 24 frames a second.
    expect(page.locator("#clock")).to_contain_text("1 / 48")
    start.scrub(40)
    late = start.pixel(0.5, 0.5)
    start.scrub(2)
    assert late[0] > start.pixel(0.5, 0.5)[0] + 40
    start.click(0.5, 0.5)
    assert start.names == ["Object 1"]


def drop(page, file, target):
    """As if the file had been dragged from elsewhere."""
    page.evaluate(
        """([name, type, bytes, target]) => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], name, { type }));
            const element = document.querySelector(target);
            for (const kind of ["dragenter", "dragover"]) {
                element.dispatchEvent(new DragEvent(kind, { dataTransfer: data, bubbles: true, cancelable: true }));
            }
            globalThis.dropped = () => element.dispatchEvent(
                new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true }));
        }""",
        [file["name"], file["mimeType"], list(file["buffer"]), target],
    )


def test_files_are_dropped_at_the_start_and_on_the_work(start, photo):
    page = start.page
    drop(page, photo, "#drop")
    expect(page.locator("#drop")).to_have_class(re.compile("over"))
    page.evaluate("dropped()")
    start.opened()
    expect(page.locator("#title")).to_have_text("holiday.jpg")
    drop(page, {**photo, "name": "second.jpg"}, "#canvas")
    expect(page.locator("#veil")).to_be_visible()
    page.route("**/graphql?upload=*", lambda route: None)  # never answered
    page.evaluate("dropped()")
    expect(page.locator("#opening-text")).to_have_text("Uploading second.jpg…")
    page.locator("#opening-cancel").click()  # is seen over the work, too
    expect(page.locator("#opening")).to_be_hidden()
    expect(page.locator("#title")).to_have_text("holiday.jpg")
    page.unroute("**/graphql?upload=*")
    page.evaluate("dropped()")
    expect(page.locator("#title")).to_have_text("second.jpg")
    expect(page.locator("#veil")).to_be_hidden()


def test_a_picture_is_pasted(start, photo):
    start.page.evaluate(
        """([name, type, bytes]) => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], name, { type }));
            document.body.dispatchEvent(new ClipboardEvent("paste", { clipboardData: data, bubbles: true }));
        }""",
        [photo["name"], photo["mimeType"], list(photo["buffer"])],
    )
    start.opened()
    expect(start.page.locator("#title")).to_have_text("holiday.jpg")


def test_a_snapshot_of_the_webcam(start):
    page = start.page
    page.context.grant_permissions(["camera"])
    page.get_by_role("button", name="Webcam snapshot").click()
    page.get_by_role("button", name="Take the picture").click()
    start.opened()
    expect(page.locator("#title")).to_have_text("webcam.png")
    assert page.evaluate("document.getElementById('webcam-video').srcObject") is None  # the camera is off again
    start.click(0.5, 0.5)
    assert start.names == ["Object 1"]


def test_a_webcam_that_is_not_allowed_or_not_there(open_page, stand_in):
    page = open_page("about:blank")
    page.add_init_script(
        "navigator.mediaDevices.getUserMedia = async () => { throw new DOMException('no', globalThis.why); };"
    )
    page.goto(stand_in.url)
    driver = Driver(page)
    page.evaluate("globalThis.why = 'NotAllowedError'")
    driver.press("Webcam snapshot")
    driver.notice("Allow the camera for this page")
    page.evaluate("globalThis.why = 'NotFoundError'")
    driver.press("Webcam snapshot")
    driver.notice("No camera was found")
    page.evaluate("Object.defineProperty(navigator, 'mediaDevices', { value: undefined })")
    driver.press("Webcam snapshot")
    driver.notice("on this machine or over https only")


def test_what_is_neither_picture_nor_video_is_refused_by_name(start):
    choose(start.page, {"name": "notes.pdf", "mimeType": "application/pdf", "buffer": b"%PDF"})
    start.notice("notes.pdf is neither a picture nor a video")
    expect(start.page.locator("#start")).to_be_visible()


@pytest.mark.parametrize(
    "file",
    [
        {"name": "broken.mp4", "mimeType": "video/mp4", "buffer": b"\0\0\0\x18ftypmp42" + bytes(500)},
        {"name": "broken.png", "mimeType": "image/png", "buffer": b"\x89PNG\r\n\x1a\n" + bytes(50)},
    ],
    ids=lambda file: file["name"],
)
def test_a_file_that_cannot_be_decoded_is_refused_in_words(start, file):
    choose(start.page, file)
    start.notice(f"{file['name']} cannot be opened")
    start.notice("Try another file, or save it as")
    expect(start.page.locator("#opening")).to_be_hidden()


def test_a_file_that_is_too_large_is_not_even_sent(start):
    expect(start.page.get_by_text("Up to 20 MB")).to_be_visible()  # it knows how much the server takes
    requests = []
    start.page.on("request", lambda request: requests.append(request) if "upload=" in request.url else None)
    start.page.evaluate(
        """() => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(21_000_000)], "huge.mp4", { type: "video/mp4" }));
            const drop = new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true });
            document.getElementById("drop").dispatchEvent(drop);
        }"""
    )
    start.notice("huge.mp4 has 21 MB, the server takes 20 MB")
    assert requests == []


def test_an_upload_tells_how_far_it_is_and_is_cancelled(start, photo):
    page = start.page
    session = page.context.new_cdp_session(page)
    session.send("Network.enable")
    slow = {"offline": False, "latency": 0, "downloadThroughput": -1, "uploadThroughput": 40_000}
    session.send("Network.emulateNetworkConditions", slow)
    noise = np.random.default_rng(0).integers(0, 255, (400, 600, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    choose(page, {"name": "noise.png", "mimeType": "image/png", "buffer": file.getvalue()})
    expect(page.locator("#opening-text")).to_have_text("Uploading noise.png…")
    page.wait_for_function(
        "(bar) => bar.value > 0 && bar.value < 1", arg=page.locator("#opening-progress").element_handle()
    )
    page.locator("#opening-cancel").click()
    expect(page.locator("#opening")).to_be_hidden()
    expect(page.locator(".notice")).to_have_count(0)
    session.send("Network.emulateNetworkConditions", {**slow, "uploadThroughput": -1})
    choose(page, photo)
    start.opened()


def test_an_upload_that_the_server_does_not_take_is_tried_again(start, photo):
    page = start.page
    page.route("**/graphql?upload=*", lambda route: route.abort())
    choose(page, photo)
    start.notice("The server cannot be reached")
    page.unroute("**/graphql?upload=*")
    start.press("Try again")
    start.opened()


def test_pictures_are_samples_too(start):
    start.open_sample("hills")
    expect(start.page.locator("#timeline")).to_be_hidden()
    start.click(0.5, 0.5)
    assert start.names == ["Object 1"]


def test_samples_show_what_they_are(start):
    sample = start.page.get_by_role("button", name="balloons")
    expect(sample).to_contain_text("4 s")
    loaded = "(image) => image.complete && image.naturalWidth > 0"
    start.page.wait_for_function(loaded, arg=sample.locator("img").element_handle())
