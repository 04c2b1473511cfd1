"""The clip that is served where there is none: discs that move, turn back at the borders and hide each other."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from omniops.drawing import VideoWriter

NAME = "discs.mp4"
FPS = 24
SECONDS = 3
HEIGHT, WIDTH = 360, 640

# x, y, pixels a frame to the right and downwards, radius, RGB. A later one hides those before.
_DISCS = (
    (110.0, 120.0, 6.0, 1.5, 52.0, (226, 87, 76)),
    (520.0, 240.0, -5.0, -2.5, 40.0, (66, 165, 108)),
    (320.0, 70.0, 1.5, 4.5, 32.0, (244, 190, 66)),
)


def write_sample(path: Path) -> None:
    """Write the clip as an MP4; ``path`` is replaced only once all of it is written.

    Raises:
        OSError: where it cannot be written, with the path.
    """
    partial = path.with_name(f".{path.name}.partial")
    with VideoWriter(partial, fps=FPS) as writer:
        for index in range(SECONDS * FPS):
            writer.write(frame(index))
    partial.replace(path)


def frame(index: int) -> NDArray[np.uint8]:
    """(HEIGHT, WIDTH, 3), RGB."""
    pixels: NDArray[np.float64] = _background().copy()
    for x0, y0, right, down, radius, colour in _DISCS:
        centre_x = _reflected(x0 + right * index, radius, WIDTH - radius)
        centre_y = _reflected(y0 + down * index, radius, HEIGHT - radius)
        left, top = max(0, int(centre_x - radius) - 1), max(0, int(centre_y - radius) - 1)
        box = pixels[top : int(centre_y + radius) + 2, left : int(centre_x + radius) + 2]
        y, x = np.ogrid[top : top + box.shape[0], left : left + box.shape[1]]
        distance = np.hypot(x - centre_x, y - centre_y)[..., None]
        inside = np.clip(radius - distance + 0.5, 0, 1)  # smooth at the border
        light = 1.15 - 0.35 * distance / radius
        box += (np.array(colour) * light - box) * inside
    np.clip(np.rint(pixels, out=pixels), 0, 255, out=pixels)
    return pixels.astype(np.uint8)


@cache
def _background() -> NDArray[np.float64]:
    """A faint chequer that grows lighter downwards."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    chequer = (x // 40 + y // 40) % 2 * 6.0
    shade: NDArray[np.float64] = (chequer + y / HEIGHT * 30)[..., None]
    return np.add(shade, (38, 44, 58))


def _reflected(position: float, low: float, high: float) -> float:
    """The position of something that turns back at both ends."""
    way = (position - low) % (2 * (high - low))
    return low + min(way, 2 * (high - low) - way)
