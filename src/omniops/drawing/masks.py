"""Masks as they are shown: each object's colour, over the picture."""

from __future__ import annotations

import colorsys
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray


def colour_of(number: int) -> tuple[int, int, int]:
    """A bright colour for each class or object; the golden ratio keeps those of neighbours apart."""
    red, green, blue = colorsys.hsv_to_rgb(number * 0.618034 % 1, 0.7, 1)
    return int(255 * red), int(255 * green), int(255 * blue)


def paint(pixels: NDArray[np.uint8], masks: Iterable[tuple[int, NDArray[np.bool_]]]) -> None:
    """Colour (H, W, 3) where the masks of the objects of those numbers are, the last on top."""
    tinted = pixels // 2
    for number, mask in masks:
        pixels[mask] = tinted[mask] + np.array(colour_of(number), np.uint8) // 2
