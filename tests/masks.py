"""Masks on which a connected-component kernel is likely to be wrong: components that are long, many, or meet late."""

import torch
from torch import Tensor

from omniops.cli.cases.connected_components import spiral


def noise(h: int, w: int, density: float, seed: int = 0) -> Tensor:
    """(H, W) in bool, each pixel set with the given probability."""
    return torch.rand(h, w, generator=torch.Generator().manual_seed(seed)) < density


def adversarial(h: int, w: int) -> dict[str, Tensor]:
    """Each by its name, (H, W) in bool."""
    y, x = torch.arange(h)[:, None], torch.arange(w)
    masks = {
        "all": torch.ones(h, w, dtype=torch.bool),
        "none": torch.zeros(h, w, dtype=torch.bool),
        "checkerboard": (y + x) % 2 == 0,
        "other checkerboard": (y + x) % 2 == 1,
        "comb": (x % 2 == 0) | (y == h - 1),  # the teeth meet last
        "comb upside down": (x % 2 == 0) | (y == 0),
        "comb to the left": (y % 2 == 0) | (x == w - 1),
        "combs in each other": ((x % 4 == 0) & (y < h - 1)) | ((x % 4 == 2) & (y > 0)) | (y == 0) | (y == h - 1),
        "zigzag": ((x + y) % 8 == 0) | ((x - y) % 8 == 4),
        "rings": torch.minimum(torch.minimum(y, h - 1 - y), torch.minimum(x, w - 1 - x)) % 2 == 0,
        "spiral": spiral(h, w),
        "what the spiral leaves": ~spiral(h, w),
        "mirrored spiral": spiral(h, w).flip(1),
        "serpent": (y % 2 == 0) | ((x == w - 1) & (y % 4 == 1)) | ((x == 0) & (y % 4 == 3)),
        "staircase": (x - y) % 3 == 0,
        "other staircase": (x + y) % 3 == 0,
    }
    densities = (0.02, 0.3, 0.41, 0.5, 0.593, 0.7, 0.95)
    return masks | {f"{density:.0%} noise": noise(h, w, density) for density in densities}
