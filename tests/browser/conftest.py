"""A server of each kind that the tests of the page need, and a real browser."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from omniops.drawing import VideoWriter

TESTS = Path(__file__).parents[1]
SCREENSHOTS = TESTS.parent / "build" / "screenshots"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WIDE = {"width": 1280, "height": 800}
NARROW = {"width": 360, "height": 740}
SHORT = 12
"""Frames of short.mp4."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skipped only where there is no browser to test in."""
    missing = [] if CHROMIUM else ["the program chromium"]
    if find_spec("playwright") is None:
        missing.append("the package playwright")
    if missing:
        skip = pytest.mark.skip(
            reason=f"the page is tested in a real browser: {' and '.join(missing)} is not installed"
        )
        for item in items:
            if Path(item.fspath).is_relative_to(Path(__file__).parent):
                item.add_marker(skip)


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """balloons.mp4, of scene.py."""
    from browser import scene

    path = tmp_path_factory.mktemp("clips") / "balloons.mp4"
    with VideoWriter(path, fps=scene.FPS) as writer:
        for frame in range(scene.FRAMES):
            writer.write(scene.picture(frame))
    return path


@pytest.fixture(scope="session")
def short_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """short.mp4: a few small frames of the same, quick to track."""
    from browser import scene

    path = tmp_path_factory.mktemp("clips") / "short.mp4"
    with VideoWriter(path, fps=12) as writer:
        for frame in range(SHORT):
            small = Image.fromarray(scene.picture(8 * frame)).resize((192, 108))
            writer.write(np.asarray(small))
    return path


class Server:
    """A running server, which can be ended."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        assert process.stdout is not None
        self.process = process
        self.folder = folder
        self.url = f"http://127.0.0.1:{int(process.stdout.readline())}/"


@contextmanager
def running(folder: Path, *options: str) -> Iterator[Server]:
    """A server on a folder of data, of its own process."""
    paths = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "browser.server", str(folder), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        yield Server(process, folder)
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture(scope="session")
def start_server(tmp_path_factory, clip, short_clip):
    """Starts a server: ``start_server(*options)``; the gallery has balloons.mp4, short.mp4 and hills.jpg."""
    from browser import scene

    with ExitStack() as stack:

        def start(*options: str) -> Server:
            folder = tmp_path_factory.mktemp("data")
            (folder / "gallery").mkdir()
            shutil.copy(clip, folder / "gallery")
            shutil.copy(short_clip, folder / "gallery")
            Image.fromarray(scene.picture(0)).save(folder / "gallery" / "hills.jpg")
            return stack.enter_context(running(folder, *options))

        yield start


@pytest.fixture(scope="session")
def server(start_server) -> Server:
    """With tiny random weights."""
    return start_server()


@pytest.fixture(scope="session")
def stand_in(start_server) -> Server:
    """With an Inference that knows where the balloons are."""
    return start_server("--stand-in", "--delay", "0.01")


@pytest.fixture(scope="session")
def browser():
    from playwright.sync_api import sync_playwright

    camera = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=camera)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """Opens a page: ``open_page(url, viewport=..., color_scheme=...)``; what it logs as an error fails the test."""
    contexts = []
    errors = []

    def open_(url: str, **options):
        context = browser.new_context(**{"viewport": WIDE, "reduced_motion": "reduce", **options})
        context.set_default_timeout(15000)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(url)
        return page

    yield open_
    for context in contexts:
        context.close()
    assert errors == []
