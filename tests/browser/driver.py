"""How the tests use the page: as a person would, by what is seen and said."""

from __future__ import annotations

import re

from playwright.sync_api import Page, expect


class Driver:
    """A page on which something is open, or is about to be.

    Places on the picture are fractions of its width and height.
    """

    def __init__(self, page: Page) -> None:
        self.page = page

    # Opening

    def open_sample(self, name: str) -> Driver:
        self.page.get_by_role("button", name=name).click()
        return self.opened()

    def opened(self) -> Driver:
        expect(self.page.locator("#work")).to_be_visible()
        expect(self.page.locator("#opening")).to_be_hidden()
        return self

    # The picture

    def at(self, x: float, y: float) -> tuple[float, float]:
        box = self.page.locator("#canvas").bounding_box()
        assert box is not None
        return box["x"] + x * box["width"], box["y"] + y * box["height"]

    def click(self, x: float, y: float, *modifiers: str) -> None:
        for key in modifiers:
            self.page.keyboard.down(key)
        self.page.mouse.click(*self.at(x, y))
        for key in modifiers:
            self.page.keyboard.up(key)
        self.settle()

    def drag(self, x0: float, y0: float, x1: float, y1: float) -> None:
        self.page.mouse.move(*self.at(x0, y0))
        self.page.mouse.down()
        self.page.mouse.move(*self.at((x0 + x1) / 2, (y0 + y1) / 2))
        self.page.mouse.move(*self.at(x1, y1))
        self.page.mouse.up()
        self.settle()

    def settle(self) -> None:
        """Until the server answered."""
        expect(self.page.locator("#working")).to_be_hidden()

    def pixel(self, x: float, y: float) -> list[int]:
        """RGB of what is shown at a place, once it was drawn."""
        return self.page.evaluate(
            """([x, y]) => new Promise((resolve) => requestAnimationFrame(() => requestAnimationFrame(() => {
                const canvas = document.getElementById("canvas");
                const [left, top] = [Math.floor(x * canvas.width), Math.floor(y * canvas.height)];
                resolve([...canvas.getContext("2d").getImageData(left, top, 1, 1).data.slice(0, 3)]);
            })))""",
            [x, y],
        )

    def shown(self) -> str:
        """A name for all that is shown on the picture, once it was drawn."""
        return self.page.evaluate(
            """() => new Promise((resolve) => requestAnimationFrame(() => requestAnimationFrame(
                () => resolve(document.getElementById("canvas").toDataURL()))))"""
        )

    # The panel

    @property
    def names(self) -> list[str]:
        return [field.input_value() for field in self.page.locator(".object input").all()]

    def told(self, name: str) -> str:
        """What the panel says of an object."""
        row = self.page.locator(".object", has=self.page.get_by_role("textbox", name=f"Name of {name}", exact=True))
        return row.locator(".told").inner_text()

    def press(self, name: str) -> None:
        self.page.get_by_role("button", name=name, exact=True).click()
        self.settle()

    # Time

    @property
    def frame(self) -> int:
        return int(self.page.locator("#scrub").input_value())

    def scrub(self, frame: int) -> None:
        self.page.locator("#scrub").evaluate(
            "(slider, frame) => { slider.value = frame; slider.dispatchEvent(new Event('input')); }", frame
        )
        expect(self.page.locator("#clock")).to_contain_text(re.compile(rf"^{frame + 1} /"))

    def track(self, timeout: float = 60000) -> None:
        """Until the end."""
        self.page.locator("#track").click()
        expect(self.page.locator("#live")).to_contain_text("frames were tracked", timeout=timeout)

    def says(self, words: str | re.Pattern[str]) -> None:
        """What screen readers are told."""
        expect(self.page.locator("#live")).to_contain_text(words)

    def notice(self, words: str | re.Pattern[str]) -> None:
        expect(self.page.locator(".notice").filter(has_text=words)).to_be_visible()
