"""The picture of the page in README: made here, looked at by people. docs/images/serve.png is a copy of it."""

from browser import scene
from browser.conftest import SCREENSHOTS
from browser.driver import Driver


def test_the_picture_of_readme(open_page, stand_in):
    page = open_page(stand_in.url, viewport={"width": 1280, "height": 760}, color_scheme="light")
    driver = Driver(page).open_sample("balloons")
    centres = [(215, 190), (520, 240), (670, 140)]
    names = ["Red balloon", "Teal balloon", "Far balloon"]
    for number, ((x, y), name) in enumerate(zip(centres, names, strict=True)):
        if number:
            driver.press("New object")
        driver.click(x / scene.WIDTH, y / scene.HEIGHT)
        field = page.get_by_role("textbox", name=f"Name of Object {number + 1}")
        field.fill(name)
        field.press("Enter")
        driver.wait_for_answer()
    driver.track()
    driver.scrub(34)
    driver.press("Choose Teal balloon")
    x, y = scene.centre(2, 34)
    driver.click(x / scene.WIDTH, (y - 20) / scene.HEIGHT)
    page.mouse.move(1150, 420)
    page.evaluate("document.activeElement.blur()")
    assert driver.names == names
    assert len(driver.prompts()[1]) == 2
    driver.shown()
    cut_off = """() => [...document.querySelectorAll("#work button, #work input")].filter((element) => {
        const { right, bottom, width } = element.getBoundingClientRect();
        return width && (right > innerWidth || bottom > innerHeight);
    }).length"""
    assert page.evaluate(cut_off) == 0
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / "serve.png")
