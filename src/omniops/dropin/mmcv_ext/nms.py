"""Non-maximum suppression: boxes are (x1, y1, x2, y2), and as wide as x2 - x1 + offset.

Each raises ValueError for a box that is not a number; but for nms, on the CPU alone.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from omniops.backends import accumulated
from omniops.dropin.mmcv_ext._kernel import kernel
from omniops.dropin.mmcv_ext._torchvision import torchvision_ops

Array = npt.NDArray[np.float32]

NAIVE, LINEAR = 0, 1
"""Two of softnms's methods; the third, 2, is Gaussian."""


@kernel
def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """The indices of the boxes that no better box overlaps by more than ``iou_threshold``, best first."""
    boxes = accumulated(boxes)
    if boxes.device.type == "cpu":  # to look on another device would be to wait for it
        _check("boxes", bool(boxes.isnan().any()))
    # A pixel more at the far corners makes widths, heights and overlaps a pixel larger, as the offset does.
    wider = boxes + boxes.new_tensor([0, 0, offset, offset])
    threshold = float(np.float32(iou_threshold))  # a float in mmcv, a double in torchvision
    kept: Tensor = torchvision_ops("nms").nms(wider, scores.to(boxes.dtype), threshold)
    return kept


@kernel
def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Fill the first rows of ``dets`` with boxes and their lowered scores, best first; return their indices.

    A box that overlaps a better one is lowered by a factor (Bodla et al., arXiv:1704.04503), and is gone once its
    score is below ``min_score``. Of equal scores the one that mmcv takes is taken: boxes that are gone leave holes,
    and the last boxes move into them.
    """
    left = boxes.cpu().float().numpy()
    _check("boxes", bool(np.isnan(left).any()))
    points = scores.cpu().float().numpy().copy()
    indices = np.arange(len(left))
    found: list[Array] = []
    kept: list[int] = []
    while len(points):
        best = points.argmax()
        box = left[best]
        found.append(np.append(box, points[best]))
        kept.append(int(indices[best]))
        order = np.arange(1, len(points))
        if best != 0:
            order[best - 1] = 0  # the best and the first have changed places
        left, points, indices = left[order], points[order], indices[order]

        overlap = _overlaps(box, left, offset)
        if method == NAIVE:
            points = np.where(overlap >= iou_threshold, np.float32(0), points)
        elif method == LINEAR:
            points = np.where(overlap >= iou_threshold, points * (1 - overlap), points)
        else:
            points = points * np.exp(-(overlap * overlap) / np.float32(sigma))

        order = _without(points < min_score)
        left, points, indices = left[order], points[order], indices[order]
    if found:
        dets[: len(found)].copy_(torch.from_numpy(np.stack(found)))
    return torch.tensor(kept, dtype=torch.int64)


def _without(gone: npt.NDArray[np.bool_]) -> npt.NDArray[np.intp]:
    """The positions that are left, the last of them moved into the holes."""
    count = int((~gone).sum())
    order = np.arange(count)
    (kept,) = np.nonzero(~gone)
    order[gone[:count]] = kept[kept >= count][::-1]
    return order


@kernel
def nms_match(dets: Tensor, iou_threshold: float) -> list[list[int]]:
    """For each box that nms keeps, best first: its index, then those of the boxes that it suppresses, best first.

    ``dets`` is (N, 5), boxes and scores. A box is suppressed that overlaps by ``iou_threshold`` or more.
    """
    dets = dets.cpu().float()
    order = dets[:, 4].sort(descending=True, stable=True).indices.numpy()
    boxes = dets[:, :4].numpy()
    _check("dets", bool(np.isnan(boxes).any()))
    groups: list[list[int]] = []
    while len(order):
        best, rest = order[0], order[1:]
        suppressed = _overlaps(boxes[best], boxes[rest], 0) >= iou_threshold
        groups.append([int(best), *rest[suppressed].tolist()])
        order = rest[~suppressed]
    return groups


def _check(name: str, has_nan: bool) -> None:
    if has_nan:
        raise ValueError(f"{name} must be numbers, got NaN: look for it in what predicts the boxes")


def _overlaps(box: Array, others: Array, offset: int) -> Array:
    """Intersection over union of one box with others; not a number where both are of no area."""
    low, high = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:], others[:, 2:])
    width, height = (high - low + offset).clip(0).T
    areas = (others[:, 2] - others[:, 0] + offset) * (others[:, 3] - others[:, 1] + offset)
    area = (box[2] - box[0] + offset) * (box[3] - box[1] + offset)
    shared = width * height
    with np.errstate(invalid="ignore", divide="ignore"):
        overlaps: Array = shared / (area + areas - shared)
    return overlaps
