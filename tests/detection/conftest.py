"""A structured image of any size: detectors give nothing to compare on noise or on a single colour."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

Picture = Callable[[int, int], np.ndarray]


@pytest.fixture(scope="session")
def picture() -> Picture:
    """Makes a uint8 image (H, W, 3): a gradient, waves, forty rectangles and discs, and a little noise."""

    def make(height: int, width: int) -> np.ndarray:
        random = np.random.default_rng(7)
        y, x = np.meshgrid(np.linspace(0, 1, height), np.linspace(0, 1, width), indexing="ij")
        image = np.stack([255 * x, 255 * y, 128 + 100 * np.sin(40 * x * y + 9 * y)], axis=-1)
        for number in range(40):
            (cy, cx), (ry, rx) = random.uniform(0, 1, 2), random.uniform(0.02, 0.2, 2)
            far = (
                np.maximum(abs(y - cy) / ry, abs(x - cx) / rx) if number % 2 else np.hypot((y - cy) / ry, (x - cx) / rx)
            )
            image[far < 1] = 0.3 * image[far < 1] + 0.7 * random.uniform(0, 255, 3)
        return (image + random.normal(0, 6, image.shape)).clip(0, 255).astype(np.uint8)

    return make
