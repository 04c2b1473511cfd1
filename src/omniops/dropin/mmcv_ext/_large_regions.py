"""RoIAlign's average of large regions on the CPU, in memory that is linear in their side.

torchvision's kernel for CPUs keeps 32 bytes or more for each sample, and the number of samples is quadratic in the side
of a region. But the samples of a bin are a grid, and a sample's weights for rows and for columns are independent: their
average is a weighted sum over rows of weighted sums over columns.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

MANY_SAMPLES = 2**16
"""The samples that make a region large: torchvision's kernel takes 2 MiB for them, and more time than this does."""

_ROUNDING = 8
"""Samples to each side of the map for rounding."""


class Bin(NamedTuple):
    """What the samples of a bin take along one axis: ``weights`` of the pixels from ``first`` on."""

    first: int
    weights: Tensor

    @property
    def pixels(self) -> slice:
        return slice(self.first, self.first + len(self.weights))


def large_regions(extent: Tensor, size: tuple[int, int]) -> list[int]:
    """The numbers of the regions, of (K, 2) extents in pixels, x before y, that are large for so many bins.

    With them are those of a negative extent, which have no samples: torchvision's kernel counts less than none.
    """
    samples = (extent / extent.new_tensor([size[1], size[0]])).ceil().prod(1) * (size[0] * size[1])
    large: list[int] = ((samples >= MANY_SAMPLES) | (extent < 0).any(1)).nonzero()[:, 0].tolist()
    return large


def bins_of(begin: Tensor, extent: Tensor, bins: int, side: int) -> list[Bin]:
    """The bins of a region along one axis, from where it begins and how far it goes, on a map of ``side`` pixels."""
    step = extent / bins
    count = step.ceil()
    return [_bin(begin + i * step, step, count, side) for i in range(bins)]


def _bin(begin: Tensor, step: Tensor, count: Tensor, side: int) -> Bin:
    if count < 1:
        return Bin(0, begin.new_zeros(0))
    spacing = (step / count).item()
    low = max(math.floor((-1 - begin.item()) / spacing) - _ROUNDING, 0)
    high = min(math.ceil((side - begin.item()) / spacing) + _ROUNDING, int(count))
    number = low + torch.arange(max(high - low, 0), dtype=begin.dtype, device=begin.device)
    position = begin + (number + 0.5) * step / count
    position = position[(position >= -1) & (position <= side)].clamp(0, side - 1)
    if len(position) == 0:
        return Bin(0, position)
    left = position.long()
    right, share = (left + 1).clamp(max=side - 1), position - left
    first = int(left[0])
    weights = position.new_zeros(int(right[-1]) - first + 1)
    weights.index_add_(0, left - first, 1 - share).index_add_(0, right - first, share)
    return Bin(first, weights / count)


def average(image: Tensor, down: list[Bin], across: list[Bin]) -> Tensor:
    """The average samples of a region's bins, (C, bins down, bins across), in an image of (C, H, W)."""
    # Bin by bin, so that a pixel that is not a number stays out of bins that do not sample it.
    rows = torch.stack([bin.weights @ image[:, bin.pixels] for bin in down], 1)
    return torch.stack([rows[..., bin.pixels] @ bin.weights for bin in across], 2)


def add_gradient(by_image: Tensor, grad: Tensor, down: list[Bin], across: list[Bin]) -> None:
    """Add to ``by_image`` what ``grad``, the gradient of :func:`average`, makes the gradient of its image."""
    by_rows = grad.new_zeros(*grad.shape[:2], by_image.shape[2])
    for j, bin in enumerate(across):
        by_rows[..., bin.pixels] += grad[:, :, j, None] * bin.weights
    for i, bin in enumerate(down):
        by_image[:, bin.pixels] += by_rows[:, i, None] * bin.weights[:, None]
