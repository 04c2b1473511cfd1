"""How the tests use the page: as a person would, by what is seen and said."""

from __future__ import annotations

import base64
import io
import json
import re

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from playwright.sync_api import Page, expect


class Driver:
    """A page on which something is open, or is about to be.

    Positions on the picture are fractions of its width and height.
    """

    def __init__(self, page: Page) -> None:
        self.page = page

    # Opening

    def open_sample(self, name: str) -> Driver:
        self.page.get_by_role("button", name=name).click()
        return self.opened()

    def opened(self) -> Driver:
        expect(self.page.locator("#work")).to_be_visible(timeout=40000)  # the model may have to be loaded first
        expect(self.page.locator("#opening")).to_be_hidden()
        return self

    # The picture

    def page_position(self, x: float, y: float) -> tuple[float, float]:
        box = self.page.locator("#canvas").bounding_box()
        assert box is not None
        return box["x"] + x * box["width"], box["y"] + y * box["height"]

    def click(self, x: float, y: float, *modifiers: str) -> None:
        for key in modifiers:
            self.page.keyboard.down(key)
        self.page.mouse.click(*self.page_position(x, y))
        for key in modifiers:
            self.page.keyboard.up(key)
        self.wait_for_answer()

    def drag(self, x0: float, y0: float, x1: float, y1: float) -> None:
        self.page.mouse.move(*self.page_position(x0, y0))
        self.page.mouse.down()
        self.page.mouse.move(*self.page_position((x0 + x1) / 2, (y0 + y1) / 2))
        self.page.mouse.move(*self.page_position(x1, y1))
        self.page.mouse.up()
        self.wait_for_answer()

    def wait_for_answer(self) -> None:
        """Until the server answered."""
        expect(self.page.locator("#working")).to_be_hidden(timeout=30000)

    def pixel(self, x: float, y: float) -> list[int]:
        """RGB of what is shown at a position, once it was drawn."""
        return self.pixels([(x, y)])[0]

    def pixels(self, positions: list[tuple[float, float]]) -> list[list[int]]:
        return self.page.evaluate(
            """(positions) => new Promise((resolve) => requestAnimationFrame(() => requestAnimationFrame(() => {
                const { width, height } = document.getElementById("canvas");
                const { data } = document.getElementById("canvas").getContext("2d").getImageData(0, 0, width, height);
                resolve(positions.map(([x, y]) => {
                    const offset = 4 * (Math.floor(y * height) * width + Math.floor(x * width));
                    return [...data.slice(offset, offset + 3)];
                }));
            })))""",
            positions,
        )

    def shown(self) -> NDArray[np.int64]:
        """All that is shown on the picture, (H, W, 3), once it was drawn; a browser rounds half a tone either way."""
        url = self.page.evaluate(
            """() => new Promise((resolve) => requestAnimationFrame(() => requestAnimationFrame(
                () => resolve(document.getElementById("canvas").toDataURL()))))"""
        )
        file = io.BytesIO(base64.b64decode(url.partition(",")[2]))
        return np.asarray(Image.open(file).convert("RGB")).astype(np.int64)

    # The panel

    @property
    def names(self) -> list[str]:
        return [field.input_value() for field in self.page.locator(".object input").all()]

    def summary(self, name: str) -> str:
        """What the panel says of an object."""
        row = self.page.locator(".object", has=self.page.get_by_role("textbox", name=f"Name of {name}", exact=True))
        return row.locator(".summary").inner_text()

    def press(self, name: str) -> None:
        self.page.get_by_role("button", name=name, exact=True).click()
        self.wait_for_answer()

    # Time

    @property
    def frame(self) -> int:
        return int(self.page.locator("#scrub").input_value())

    def scrub(self, frame: int) -> None:
        self.page.locator("#scrub").evaluate(
            "(slider, frame) => { slider.value = frame; slider.dispatchEvent(new Event('input')); }", frame
        )
        expect(self.page.locator("#clock")).to_contain_text(re.compile(rf"^{frame + 1} /"))

    def track(self) -> None:
        """Until the end."""
        self.page.locator("#track").click()
        self.says("frames were tracked", timeout=60000)

    def says(self, words: str | re.Pattern[str], timeout: float = 30000) -> None:
        """What screen readers are told."""
        expect(self.page.locator("#live")).to_contain_text(words, timeout=timeout)

    def notice(self, words: str | re.Pattern[str]) -> None:
        expect(self.page.locator(".notice").filter(has_text=words)).to_be_visible()

    # What the server has

    @property
    def kept(self) -> dict:
        """What the tab keeps for a reload."""
        return json.loads(self.page.evaluate("sessionStorage.getItem('omniops.session')"))

    def prompts(self) -> dict[int, dict[int, dict]]:
        """The prompts of the session as the server has them, by object and frame."""
        query = """query ($id: String!) { session(sessionId: $id) {
            objects { objectId prompts { frameIndex points labels box hasMask } } } }"""
        answer = self.page.evaluate(
            """async (asked) => (await fetch("graphql", { method: "POST", body: JSON.stringify(asked),
                headers: { "Content-Type": "application/json" } })).json()""",
            {"query": query, "variables": {"id": self.kept["id"]}},
        )
        assert "errors" not in answer, answer
        return {
            item["objectId"]: {prompt["frameIndex"]: prompt for prompt in item["prompts"]}
            for item in answer["data"]["session"]["objects"]
        }
