"""What goes wrong, and what the page says and does then."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
from browser.driver import Driver
from playwright.sync_api import expect

TEAL, RED = (520 / 960, 262 / 540), (0.224, 0.30)


@pytest.fixture
def work(open_page, stand_in):
    return Driver(open_page(stand_in.url)).open_sample("balloons")


def ask(driver, query, session):
    """The server's answer to a question about a session."""
    return driver.page.evaluate(
        """async (asked) => (await fetch("graphql", { method: "POST", body: JSON.stringify(asked),
            headers: { "Content-Type": "application/json" } })).json()""",
        {"query": query, "variables": {"id": session}},
    )


def end_session(driver):
    """As the server would after a while."""
    ask(driver, "mutation ($id: String!) { closeSession(input: {sessionId: $id}) { success } }", driver.kept["id"])


def test_a_session_that_ended_is_started_again_with_all_clicks(work):
    work.click(*RED)
    work.click(0.21, 0.35, "Shift")
    work.press("New object")
    end_session(work)
    work.page.mouse.click(*work.page_position(*TEAL))
    work.notice("The session ended")
    work.press("Start again")
    work.says("A new session was started")
    assert {id: list(frames) for id, frames in work.prompts().items()} == {0: [0], 1: [0]}
    assert work.prompts()[0][0]["labels"] == [1, 0]
    assert work.names == ["Object 1", "Object 2"]
    assert work.pixel(*TEAL) != [0, 0, 0]


def test_a_session_that_ended_before_a_reload_too(work):
    work.click(*RED)
    work.scrub(10)
    work.click(0.24, 0.31)
    end_session(work)
    work.page.reload()
    work.notice("The session ended")
    work.press("Start again")
    work.opened()
    expect(work.page.locator(".summary")).to_have_text("2 prompts · 2 frames")
    assert sorted(work.prompts()[0]) == [0, 10]
    expect(work.page.locator("#clock")).to_contain_text("11 / 96")


def test_a_session_that_ends_while_it_tracks(work):
    work.click(*RED)
    work.page.locator("#track").click()
    expect(work.page.locator("#tracking-text")).to_contain_text("frames/s")
    end_session(work)
    work.notice("The session ended")
    expect(work.page.locator("#track")).to_be_visible()


def children(pid):
    """The processes that a process started, and those that they did."""
    table = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout.split()
    parents = dict(zip(map(int, table[::2]), map(int, table[1::2]), strict=True))
    found = [pid]
    for ancestor in found:
        found += [child for child, parent in parents.items() if parent == ancestor]
    return found[1:]


def is_python_with(pid, words):
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as line:
            return words in line.read()
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_predictor_that_dies_is_named_and_another_takes_over(open_page, server):
    work = Driver(open_page(server.url)).open_sample("short")
    work.click(0.5, 0.5)
    victims = [pid for pid in children(server.process.pid) if is_python_with(pid, b"omniops.remote")]
    assert victims
    os.kill(victims[-1], signal.SIGKILL)
    work.page.mouse.click(*work.page_position(0.3, 0.3))
    work.notice("The session ended")
    work.notice(re.compile("died"))
    work.press("Start again")
    expect(work.page.locator("#live")).to_contain_text("A new session was started", timeout=40000)
    assert len(work.prompts()[0][0]["points"]) == 2


def test_a_server_that_is_gone_is_named_and_found_again(work):
    work.click(*RED)
    page = work.page
    page.context.set_offline(True)
    page.mouse.click(*work.page_position(0.2, 0.33))
    work.notice("The server cannot be reached")
    work.notice("omniops serve is still running")
    assert work.summary("Object 1") == "2 prompts"
    page.context.set_offline(False)
    work.press("Try again")
    assert len(work.prompts()[0][0]["points"]) == 2


def test_a_page_without_a_server_says_so(open_page, stand_in):
    page = open_page("about:blank")
    page.route("**/graphql", lambda route: route.abort())
    page.goto(stand_in.url)
    driver = Driver(page)
    driver.notice("The server cannot be reached")
    page.unroute("**/graphql")
    driver.press("Try again")
    expect(page.locator("#device")).to_contain_text("Stand-in")
    expect(page.get_by_role("button", name="balloons")).to_be_visible()


def test_a_server_that_is_busy_says_so_and_what_was_done_is_kept(work):
    page = work.page
    answer = {"status": 503, "json": {"data": None, "errors": [{"message": "The server does all that it can"}]}}
    page.route("**/graphql", lambda route: route.fulfill(**answer))
    page.mouse.click(*work.page_position(*RED))
    work.notice("The server is busy")
    page.unroute("**/graphql")
    work.press("Try again")
    assert sorted(work.prompts()) == [0]


def test_what_is_refused_is_taken_back(work):
    work.click(*RED)
    page = work.page
    answer = {"status": 200, "json": {"data": None, "errors": [{"message": "There is no room for more points"}]}}
    page.route("**/graphql", lambda route: route.fulfill(**answer))
    page.mouse.click(*work.page_position(*TEAL))
    work.notice("There is no room for more points. What you did last was taken back.")
    page.unroute("**/graphql")
    assert work.summary("Object 1") == "1 prompt"
    work.press("Undo")
    assert work.names == []
    expect(page.locator("#undo")).to_be_disabled()


def test_a_stream_that_breaks_off_keeps_its_frames(work):
    work.click(*RED)
    page = work.page
    page.locator("#track").click()
    expect(page.locator("#tracking-text")).to_have_text(re.compile(r"^([2-9]|\d\d) / 96 frames"))
    page.evaluate("globalThis.stop()")
    work.notice("The connection broke off while tracking")
    assert re.search(r"\d+ frames", work.summary("Object 1"))
    work.press("Try again")
    work.says("All 96 frames were tracked")


def test_the_token_is_asked_for_and_a_wrong_one_refused(open_page, start_server):
    server = start_server("--stand-in", "--token", "open sesame")
    page = open_page(server.url)
    dialog = page.get_by_role("dialog", name="This server asks for its token")
    expect(dialog).to_be_visible()
    page.get_by_role("textbox", name="Token").fill("wrong")
    page.get_by_role("button", name="Sign in").click()
    expect(dialog.get_by_role("alert")).to_contain_text("That is not the server's token")
    page.get_by_role("textbox", name="Token").fill("open sesame")
    page.keyboard.press("Enter")
    expect(dialog).to_be_hidden()
    driver = Driver(page).open_sample("balloons")
    driver.click(*RED)
    assert driver.names == ["Object 1"]
    page.reload()  # the cookie is kept
    driver.opened()
    expect(dialog).to_be_hidden()


def test_a_reload_keeps_the_session_and_leaving_gives_it_back(work):
    page = work.page
    work.click(*RED)
    before = work.kept["id"]
    page.reload()
    work.opened()
    assert work.kept["id"] == before
    assert work.names == ["Object 1"]
    page.evaluate(
        """() => {
            const send = navigator.sendBeacon.bind(navigator);
            navigator.sendBeacon = (url) => localStorage.setItem("sent", `${url} ${send(url)}`);
        }"""
    )
    leave = f"{page.url}sessions/{before}/leave"
    page.goto(f"{page.url}page/favicon.svg")
    assert page.evaluate("localStorage.getItem('sent')") == f"{leave} true"
    assert page.request.post(leave).status == 204


def test_opening_another_gives_the_first_back(work):
    before = work.kept["id"]
    work.page.get_by_role("button", name="Open another").click()
    expect(work.page.locator("#start")).to_be_visible()
    deadline = time.monotonic() + 10
    while "errors" not in (answer := ask(work, "query ($id: String!) { session(sessionId: $id) { path } }", before)):
        assert time.monotonic() < deadline
    assert "Cannot find session" in answer["errors"][0]["message"]
    work.page.reload()
    expect(work.page.locator("#start")).to_be_visible()


def test_a_model_that_could_not_be_loaded_is_named(open_page, stand_in):
    page = open_page("about:blank")

    def answer(route):
        response = route.fetch().json() if "server {" in route.request.post_data else None
        if response is None:
            route.fallback()
            return
        response["data"]["server"] |= {
            "ready": False,
            "failure": "The model cannot be loaded: its checkpoint is not there",
        }
        route.fulfill(json=response)

    page.route("**/graphql", answer)
    page.goto(stand_in.url)
    driver = Driver(page)
    driver.notice("The model could not be loaded")
    driver.notice("its checkpoint is not there.")
    expect(page.locator("#device")).to_have_text("Stand-in · no model")
    page.unroute("**/graphql")
    expect(page.locator("#device")).to_have_text("Stand-in · SAM 2 tiny · bfloat16")


def test_it_says_what_it_runs_on_and_that_random_weights_mean_nothing(open_page, server, stand_in):
    page = open_page(server.url)
    expect(page.locator("#device")).to_have_text(re.compile(r"\w.* · SAM 2 tiny · \w+"), timeout=40000)
    expect(page.get_by_text("its masks mean nothing")).to_be_visible()
    page.goto(stand_in.url)
    expect(page.locator("#device")).to_have_text("Stand-in · SAM 2 tiny · bfloat16")
    expect(page.get_by_text("its masks mean nothing")).to_be_hidden()
