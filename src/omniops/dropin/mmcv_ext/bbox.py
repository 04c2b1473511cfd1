"""Overlaps of boxes, which are (x1, y1, x2, y2) and as wide as x2 - x1 + offset."""

from __future__ import annotations

import torch
from torch import Tensor

from omniops.dropin.mmcv_ext._kernel import kernel

IOU = 0
"""A mode of bbox_overlaps; the other, 1, divides by the area of the first box alone."""


@kernel
def bbox_overlaps(bboxes1: Tensor, bboxes2: Tensor, ious: Tensor, mode: int, aligned: bool, offset: int) -> None:
    """Fill ``ious``: of each box of the first with each of the second, (M, N), or with its partner, (N,).

    What it divides by is at least ``offset``, as in mmcv: a box whose corners are swapped may have less.
    """
    first = bboxes1 if aligned else bboxes1[:, None]
    low, high = torch.maximum(first[..., :2], bboxes2[..., :2]), torch.minimum(first[..., 2:], bboxes2[..., 2:])
    shared = (high - low + offset).clamp(min=0).prod(-1)
    divisor = _area(first, offset)
    if mode == IOU:
        divisor = divisor + _area(bboxes2, offset) - shared
    ious.copy_(shared / divisor.clamp(min=offset))


def _area(boxes: Tensor, offset: int) -> Tensor:
    return (boxes[..., 2:] - boxes[..., :2] + offset).prod(-1)
