"""Rotated boxes: (x, y) of the centre, width, height, and the angle in radians from the x axis towards the y axis.

The intersection of two boxes is computed in the frame of the smaller one, where that is [-W, W] x [-H, H]. With
F(x, y) = clamp(x, -W, W) + W for |y| <= H and 0 elsewhere, dF/dx is 1 inside of it and 0 outside, so by Green's theorem
the area of the intersection is the integral of F dy along the edges of the other box, counterclockwise. F is piecewise
linear along an edge, and nothing has to be decided about corners that lie on edges.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from omniops.backends import accumulated
from omniops.dropin.mmcv_ext._kernel import kernel
from omniops.dropin.mmcv_ext.bbox import IOU

_MAX_PAIRS = 2**18
"""The pairs of boxes that are computed at a time."""

_BLOCK = 256
"""The boxes that nms_rotated decides about at a time."""

_LEAST_AREA = 1e-14
"""Boxes of less overlap none, as in mmcv."""


@kernel
def box_iou_rotated(boxes1: Tensor, boxes2: Tensor, ious: Tensor, mode_flag: int, aligned: bool) -> None:
    """Fill ``ious``: of each box of the first with each of the second, (M * N,), or with its partner, (N,).

    ``mode_flag`` is 0 for the intersection over the union, 1 for that over the area of the first box. What overlaps a
    box that is not a number is not a number.
    """
    _check_shapes(boxes1=boxes1, boxes2=boxes2)
    first, second = accumulated(boxes1), accumulated(boxes2)
    if aligned:
        if len(first) != len(second):
            raise ValueError(
                f"boxes1 and boxes2 must be as many if they are aligned, got {len(first)} and {len(second)}"
            )
        for begin in range(0, len(first), _MAX_PAIRS):
            pairs = slice(begin, begin + _MAX_PAIRS)
            ious[pairs] = _overlaps(first[pairs], second[pairs], mode_flag).to(ious.dtype)
        return
    table = ious.view(len(first), len(second))
    for rows, overlaps in _tables(first, second, mode_flag):
        table[rows] = overlaps.to(ious.dtype)


@kernel
def nms_rotated(
    dets: Tensor,
    scores: Tensor,
    order: Tensor,
    dets_sorted: Tensor,
    labels: Tensor,
    iou_threshold: float,
    multi_label: bool,
) -> Tensor:
    """The indices of the boxes that no better box of their label overlaps by more than ``iou_threshold``, best first.

    ``order`` sorts by scores, best first, and ``dets_sorted`` is in that order: (N, 5), or (N, 6) with the label in the
    last column where ``multi_label``. Raises ValueError for a box that is not a number.
    """
    boxes = accumulated(dets_sorted[:, :5])
    _check_shapes(dets=boxes)
    if boxes.isnan().any():
        raise ValueError("dets must be numbers, got NaN: look for it in what predicts the boxes")
    groups = dets_sorted[:, 5] if multi_label else boxes.new_zeros(len(boxes))
    threshold = float(np.float32(iou_threshold))  # a float in mmcv
    kept = torch.empty(0, dtype=torch.int64, device=boxes.device)
    for begin in range(0, len(boxes), _BLOCK):
        block = torch.arange(begin, min(begin + _BLOCK, len(boxes)), device=boxes.device)
        left = block
        if len(kept):
            left = block[~_overlapped(boxes, groups, block, kept, threshold).any(1)]
        overlapped = _overlapped(boxes, groups, left, left, threshold).cpu().numpy()
        best = np.zeros(len(left), dtype=bool)
        for i, row in enumerate(overlapped):
            best[i] = not (row[:i] & best[:i]).any()
        kept = torch.cat([kept, left[torch.from_numpy(best).to(left.device)]])
    return order[kept]


def _overlapped(boxes: Tensor, groups: Tensor, rows: Tensor, columns: Tensor, threshold: float) -> Tensor:
    """Which boxes of a group overlap by more than the threshold, (rows, columns)."""
    result = torch.zeros(len(rows), len(columns), dtype=torch.bool, device=boxes.device)
    for block, overlaps in _tables(boxes[rows], boxes[columns], IOU):
        result[block] = overlaps > threshold
    return result & (groups[rows][:, None] == groups[columns])


def _tables(first: Tensor, second: Tensor, mode_flag: int) -> Iterator[tuple[slice, Tensor]]:
    """The overlaps of each box with each, so many rows at a time as memory allows; none where there are no boxes."""
    if len(first) == 0 or len(second) == 0:
        return
    limit = max(1, _MAX_PAIRS // len(second))
    radius = _radius(second)
    for begin in range(0, len(first), limit):
        rows = slice(begin, begin + limit)
        block = first[rows]
        apart = (block[:, None, :2] - second[:, :2]).norm(dim=2)
        # A pair that is not a number is not apart.
        near = ~(apart > _radius(block)[:, None] + radius)
        i, j = near.nonzero(as_tuple=True)
        table = block.new_zeros(near.shape)
        if len(i):
            table[i, j] = _overlaps(block[i], second[j], mode_flag)
        yield rows, table


def _radius(boxes: Tensor) -> Tensor:
    """Of a circle around each box; no number where any but its centre is none."""
    radius: Tensor = boxes[:, 2:4].norm(dim=1) / 2 + boxes[:, 4] * 0
    return radius


def _overlaps(first: Tensor, second: Tensor, mode_flag: int) -> Tensor:
    """The intersection of pairs, each (P, 5), over their union or over the area of the first."""
    area, other_area = first[:, 2] * first[:, 3], second[:, 2] * second[:, 3]
    smaller = (area < other_area)[:, None]
    shared = _intersection(torch.where(smaller, first, second), torch.where(smaller, second, first))
    shared = torch.minimum(shared.clamp(min=0), torch.minimum(area, other_area))
    overlaps = shared / (area + other_area - shared if mode_flag == IOU else area)
    return torch.where((area < _LEAST_AREA) | (other_area < _LEAST_AREA), 0, overlaps)


def _intersection(frame: Tensor, box: Tensor) -> Tensor:
    """The area of the intersection of pairs of boxes, each (P, 5)."""
    cosine, sine = frame[:, 4].cos(), frame[:, 4].sin()
    apart_x, apart_y = (box[:, :2] - frame[:, :2]).T
    center_x, center_y = apart_x * cosine + apart_y * sine, apart_y * cosine - apart_x * sine
    turn = box[:, 4] - frame[:, 4]
    half_x, half_y = box[:, 2] / 2 * turn.cos(), box[:, 2] / 2 * turn.sin()
    up_x, up_y = -box[:, 3] / 2 * turn.sin(), box[:, 3] / 2 * turn.cos()
    corners = [
        (center_x + u * half_x + v * up_x, center_y + u * half_y + v * up_y)
        for u, v in ((-1, -1), (1, -1), (1, 1), (-1, 1))
    ]
    width, height = frame[:, 2] / 2, frame[:, 3] / 2
    area = torch.zeros_like(width)
    for i in range(4):
        area = area + _integral(*corners[i - 1], *corners[i], width, height)
    return area


def _integral(x0: Tensor, y0: Tensor, x1: Tensor, y1: Tensor, width: Tensor, height: Tensor) -> Tensor:
    """That of F dy from (x0, y0) to (x1, y1)."""
    rise = y1 - y0
    begin, end = _crossings(y0, rise, height)
    x, run = x0 + begin * (x1 - x0), (end - begin) * (x1 - x0)
    left, right = _crossings(x, run, width)
    values = [torch.minimum(torch.maximum(x + share * run, -width), width) + width for share in (0, left, right, 1)]
    # F is linear between these.
    mean = (values[0] + values[1]) * left + (values[1] + values[2]) * (right - left)
    mean = (mean + (values[2] + values[3]) * (1 - right)) / 2
    return mean * (end - begin) * rise


def _crossings(begin: Tensor, length: Tensor, bound: Tensor) -> tuple[Tensor, Tensor]:
    """From which share of the length on it is between -bound and bound, and to which, each from 0 to 1."""
    divisor = torch.where(length == 0, 1, length)
    one, other = ((edge - begin) / divisor for edge in (-bound, bound))
    return torch.minimum(one, other).clamp(0, 1), torch.maximum(one, other).clamp(0, 1)


def _check_shapes(**boxes: Tensor) -> None:
    for name, tensor in boxes.items():
        if tensor.dim() != 2 or tensor.shape[1] != 5:
            raise ValueError(f"{name} must have shape (N, 5), x, y, width, height and angle, got {tuple(tensor.shape)}")
