"""A clip that the tests draw: balloons that drift over hills, and where each of them is."""

from __future__ import annotations

import math
from functools import cache, lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

WIDTH, HEIGHT = 960, 540
FPS = 24
FRAMES = 96
# x and y at the start, pixels a frame to the right, pixels up and down, radius, two colours; the farthest first.
BALLOONS = (
    (670, 150, -1.1, 10, 52, (236, 176, 66), (214, 106, 60)),
    (215, 205, 1.5, 16, 84, (205, 66, 77), (247, 240, 228)),
    (520, 262, 0.5, 22, 118, (40, 120, 150), (244, 196, 84)),
)
_FINER = 2


def centre(balloon: int, frame: int) -> tuple[float, float]:
    """The centre of a balloon on a frame."""
    x, y, right, down, *_ = BALLOONS[balloon]
    return x + right * frame, y + down * math.sin(2 * math.pi * frame / FRAMES + balloon)


@lru_cache(maxsize=8)
def masks(frame: int) -> list[NDArray[np.bool_]]:
    """What is seen of each balloon, (HEIGHT, WIDTH)."""
    found = [_drawn(balloon, frame)[..., 3] > 127 for balloon in range(len(BALLOONS))]
    for nearer in range(1, len(found)):
        for farther in range(nearer):
            found[farther] &= ~found[nearer]
    return found


def picture(frame: int) -> NDArray[np.uint8]:
    """(HEIGHT, WIDTH, 3), RGB."""
    image = _ground().copy()
    for balloon in range(len(BALLOONS)):
        layer = Image.fromarray(_drawn(balloon, frame))
        image.paste(layer, (0, 0), layer)
    return np.asarray(image)


@cache
def _ground() -> Image.Image:
    y = np.linspace(0, 1, HEIGHT)[:, None, None]
    sky = np.array([96, 158, 214]) * (1 - y) + np.array([250, 222, 196]) * y
    image = Image.fromarray(np.broadcast_to(sky, (HEIGHT, WIDTH, 3)).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    hills = (
        (395, 26, 210.0, 0.4, (142, 160, 178)),
        (435, 30, 150.0, 2.1, (98, 132, 132)),
        (488, 22, 190.0, 4.0, (66, 104, 88)),
    )
    for height, rise, length, shift, colour in hills:
        line = [
            (x, height + rise * math.sin(x / length * 2 + shift) + rise / 3 * math.sin(x / 37 + shift))
            for x in range(0, WIDTH + 8, 8)
        ]
        draw.polygon([(0, HEIGHT), *line, (WIDTH, HEIGHT)], fill=colour)
    return image


@cache
def _stripes(balloon: int) -> NDArray[np.float64]:
    """A balloon's envelope with its basket, RGBA, drawn finer than it is shown."""
    *_, radius, first, second = BALLOONS[balloon]
    size = 2 * _FINER * radius
    y, x = np.mgrid[: int(1.7 * size), :size] / (size / 2) - 1
    # A sphere above, a cone that narrows to the basket below.
    half = np.where(y < 0.25, np.sqrt(np.clip(1 - y**2, 0, 1)), np.clip(0.968 - (y - 0.25) * 0.88, 0, 1))
    inside = (np.abs(x) <= half) & (y < 1.12)
    turn = np.arcsin(np.clip(x / np.maximum(half, 1e-6), -1, 1))
    stripe = (np.floor((turn + math.pi / 2) / (math.pi / 7)).astype(int) % 2)[..., None]
    light = (1.06 - 0.34 * np.hypot(x + 0.35, y + 0.4))[..., None]
    colour = np.where(stripe == 0, np.array(first), np.array(second)) * np.clip(light, 0.45, 1.1)
    basket = (np.abs(x) < 0.17) & (y > 1.34) & (y < 1.6)
    ropes = (np.abs(np.abs(x) - (0.17 + (1.34 - y) * 0.05)) < 0.014) & (y >= 1.1) & (y <= 1.36)
    colour = np.where((basket | ropes)[..., None], np.array([96, 66, 44]), colour)
    alpha = 255.0 * (inside | basket | ropes)[..., None]
    return np.concatenate([np.clip(colour, 0, 255), alpha], axis=2)


@cache
def _small(balloon: int) -> Image.Image:
    return Image.fromarray(_stripes(balloon).astype(np.uint8))


@lru_cache(maxsize=8)
def _drawn(balloon: int, frame: int) -> NDArray[np.uint8]:
    """A balloon at its position, (HEIGHT, WIDTH, 4)."""
    x, y = centre(balloon, frame)
    radius = BALLOONS[balloon][4]
    # From the pixels of the clip to those of the balloon.
    to = (_FINER, 0, _FINER * (radius - x), 0, _FINER, _FINER * (radius - y))
    return np.asarray(_small(balloon).transform((WIDTH, HEIGHT), Image.Transform.AFFINE, to, Image.Resampling.BILINEAR))
