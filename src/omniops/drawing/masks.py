"""Masks as they are shown: each object's colour, over the picture."""

from __future__ import annotations

import colorsys
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image

_LARGEST_BYTE = 255


def colour_of(number: int) -> tuple[int, int, int]:
    """A bright colour for each class or object; the golden ratio keeps those of neighbours apart.

    Example:
        >>> colour_of(1)
        (76, 128, 255)
    """
    red, green, blue = colorsys.hsv_to_rgb(number * 0.618034 % 1, 0.7, 1)
    return int(255 * red), int(255 * green), int(255 * blue)


def paint(pixels: NDArray[np.uint8], masks: Iterable[tuple[int, NDArray[np.bool_]]]) -> None:
    """Colour a picture where the masks of objects are.

    Args:
        pixels: (H, W, 3) in RGB, which is changed.
        masks: each object's number, whose colour it gets, and its mask (H, W); the last is on top.

    Example:
        >>> pixels, mask = np.full((2, 3, 3), 100, np.uint8), np.eye(2, 3, dtype=bool)
        >>> paint(pixels, [(1, mask)])
        >>> pixels[0, 0].tolist(), pixels[0, 1].tolist()
        ([88, 114, 177], [100, 100, 100])
    """
    painted = np.ascontiguousarray(pixels).reshape(-1)
    tinted = painted // 2
    for number, mask in masks:
        first = 3 * np.flatnonzero(mask)  # several times as fast as indexing with the mask
        for channel, value in enumerate(colour_of(number)):
            painted[first + channel] = tinted[first + channel] + np.uint8(value // 2)
    if not np.may_share_memory(painted, pixels):
        pixels[...] = painted.reshape(pixels.shape)


def mask_image(masks: Iterable[tuple[int, NDArray[np.bool_]]], height: int, width: int) -> Image:
    """Masks of objects of those numbers as one picture without a background, for other programs to read.

    One mask: white inside. More: the number of the object at each pixel, the last on top. Numbers up to 255 are
    coloured by a palette, as in DAVIS; higher ones make it a grey picture of 16 bits.

    Args:
        masks: each object's number, from 1 on, and its mask (H, W).
        height: H.
        width: W.

    Example:
        >>> mask = np.eye(2, 3, dtype=bool)
        >>> np.array(mask_image([(1, mask), (2, ~mask)], 2, 3)).tolist()
        [[1, 2, 2], [2, 1, 2]]
    """
    from PIL import Image

    numbers: list[int] = []
    labels = np.zeros((height, width), np.uint16)
    single = np.zeros((height, width), np.bool_)
    for number, mask in masks:
        labels[mask] = number
        single = mask
        numbers.append(number)
    if len(numbers) < 2:
        return Image.fromarray(single * np.uint8(_LARGEST_BYTE))
    highest = max(numbers)
    if highest > _LARGEST_BYTE:
        return Image.fromarray(labels)
    picture = Image.fromarray(labels.astype(np.uint8))
    picture.putpalette(bytes([0, 0, 0, *(value for i in range(1, highest + 1) for value in colour_of(i))]))
    return picture
