"""SAM 2's prompts as they are shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from omniops.drawing.masks import colour_of

if TYPE_CHECKING:
    from PIL.Image import Image

FOREGROUND_COLOUR, BACKGROUND_COLOUR = (40, 200, 80), (230, 50, 50)


def draw_prompts(
    picture: Image,
    number: int,
    point_coords: Sequence[tuple[float, float]] = (),
    point_labels: Sequence[int] = (),
    box: tuple[float, float, float, float] | None = None,
) -> None:
    """Draw the prompts of one object on a picture.

    Args:
        picture: in RGB.
        number: of the object, whose colour its box has.
        point_coords: (x, y) in pixels.
        point_labels: for each point 1, of the object, which is green, or 0, not of it, which is red.
        box: (x0, y0, x1, y1) in pixels.

    Example:
        >>> from PIL import Image
        >>> picture = Image.new("RGB", (40, 30))
        >>> draw_prompts(picture, 1, [(20, 15)], [1], box=(5, 5, 35, 25))
        >>> picture.getpixel((20, 15)), picture.getpixel((5, 15)) == colour_of(1)
        ((40, 200, 80), True)
    """
    from PIL import ImageDraw

    drawing = ImageDraw.Draw(picture)
    width, radius = max(1, max(picture.size) // 400), max(1, max(picture.size) // 150)
    if box is not None:
        drawing.rectangle(box, outline=colour_of(number), width=width)
    for (x, y), label in zip(point_coords, point_labels, strict=True):
        colour = FOREGROUND_COLOUR if label else BACKGROUND_COLOUR
        drawing.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour, outline="white", width=width)
