"""Inputs of mmcv's compiled functions, and how their tests compare results."""

import torch
from torch import Tensor

EMPTY = torch.empty(0)

# Regions of interest: the image, x1, y1, x2, y2.
ROIS = torch.tensor(
    [
        [0, 1.0, 2.0, 9.5, 13.0],
        [1, -6.0, -3.0, 5.0, 4.2],
        [1, 14.0, 10.0, 40.0, 33.0],  # beyond the map
        [0, 3.3, 3.3, 3.4, 3.5],  # less than a pixel
        [0, 5.0, 5.0, 5.0, 9.0],  # of no area
    ],
    dtype=torch.float64,
)
SIZE = (3, 2)
SCALE = 0.5


def random_tensor(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def assert_near(actual: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=tolerance, atol=tolerance)


def bilinear(image: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """(C,) at one position of (C, H, W): at most a pixel outside it is the border's, further out nothing's."""
    height, width = image.shape[1:]
    if not (-1 <= y <= height and -1 <= x <= width):
        return image.new_zeros(len(image))
    y, x = y.clamp(0, height - 1), x.clamp(0, width - 1)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    upper = image[:, top, left] * (1 - (x - left)) + image[:, top, right] * (x - left)
    lower = image[:, bottom, left] * (1 - (x - left)) + image[:, bottom, right] * (x - left)
    return upper * (1 - (y - top)) + lower * (y - top)
