"""mmcv's non-maximum suppressions and overlaps of boxes against loops over boxes."""

import itertools
import math
import sys

import numpy as np
import pytest
import torch
from dropin.mmcv_inputs import assert_near
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from omniops.dropin import mmcv_ext


@st.composite
def scored_boxes(draw):
    """Boxes on a coarse grid, with few different scores, so that overlaps and scores are often equal."""
    count = draw(st.integers(0, 12))
    numbers = draw(st.lists(st.integers(0, 8), min_size=4 * count, max_size=4 * count))
    boxes = torch.tensor(numbers, dtype=torch.float32).view(count, 4)
    boxes[:, 2:] += boxes[:, :2] + 1
    scores = draw(st.lists(st.sampled_from([0.125, 0.25, 0.5, 0.75, 0.875]), min_size=count, max_size=count))
    return boxes, torch.tensor(scores)


def _iou(a: Tensor, b: Tensor, offset: int, first_alone: bool = False) -> np.float32:
    def area(x1: Tensor, y1: Tensor, x2: Tensor, y2: Tensor) -> np.float32:
        return np.float32(max(x2 - x1 + offset, 0)) * np.float32(max(y2 - y1 + offset, 0))

    shared = area(*torch.maximum(a, b)[:2], *torch.minimum(a, b)[2:])
    return shared / (area(*a) if first_alone else area(*a) + area(*b) - shared)


@given(scored_boxes(), st.sampled_from([0.2, 0.3, 0.5]), st.integers(0, 1))
def test_nms(boxes_and_scores, threshold, offset):
    pytest.importorskip("torchvision")
    boxes, scores = boxes_and_scores
    kept: list[int] = []
    for i in scores.sort(descending=True, stable=True).indices.tolist():
        if all(_iou(boxes[i], boxes[j], offset) <= np.float32(threshold) for j in kept):
            kept.append(i)
    assert mmcv_ext.nms(boxes, scores, threshold, offset).tolist() == kept
    assert mmcv_ext.nms(boxes.half(), scores.half(), threshold, offset).tolist() == kept  # exact in half, too


def _softnms(boxes, scores, threshold, sigma, least, method, offset):
    """One box after the other, as arXiv:1704.04503 has it, on a list whose last member fills every hole."""
    left = [(box, np.float32(score), i) for i, (box, score) in enumerate(zip(boxes, scores.tolist(), strict=True))]
    done = []
    while left:
        best = max(range(len(left)), key=lambda i: (left[i][1], -i))
        left[0], left[best] = left[best], left[0]
        done.append(left.pop(0))
        box = done[-1][0]
        i = 0
        while i < len(left):
            other, lower, number = left[i]
            overlap = _iou(box, other, offset)
            if method == "naive":
                factor = np.float32(overlap < np.float32(threshold))
            elif method == "linear":
                factor = 1 - overlap if overlap >= np.float32(threshold) else np.float32(1)
            else:
                factor = np.exp(-(overlap * overlap) / np.float32(sigma))
            left[i] = other, lower * factor, number
            if left[i][1] < np.float32(least):
                last = left.pop()
                if i < len(left):
                    left[i] = last
            else:
                i += 1
    return done


@given(
    scored_boxes(),
    st.sampled_from([0.2, 0.3, 0.5]),
    st.sampled_from([0.0, 0.001, 0.2]),
    st.sampled_from(["naive", "linear", "gaussian"]),
    st.integers(0, 1),
)
def test_softnms(boxes_and_scores, threshold, least, method, offset):
    boxes, scores = boxes_and_scores
    expected = _softnms(boxes, scores, threshold, 0.5, least, method, offset)
    dets = torch.full((len(boxes), 5), torch.nan)
    number = ["naive", "linear", "gaussian"].index(method)
    kept = mmcv_ext.softnms(boxes, scores, dets, threshold, 0.5, least, number, offset)
    assert kept.tolist() == [i for _, _, i in expected]
    for row, (box, score, _) in zip(dets, expected, strict=False):
        assert row[:4].tolist() == box.tolist()
        assert math.isclose(row[4], score, rel_tol=1e-5, abs_tol=1e-7)


def test_softnms_moves_the_last_box_into_the_hole_of_one_that_is_gone():
    boxes = torch.tensor([[0.0, 0, 1, 1]]) + torch.arange(5)[:, None] * 2
    scores, dets = torch.tensor([0.875, 0.125, 0.5, 0.5, 0.5]), torch.empty(5, 5)
    assert mmcv_ext.softnms(boxes, scores, dets, 0.3, 0.5, 0.2, 1, 0).tolist() == [0, 4, 2, 3]
    assert [number for _, _, number in _softnms(boxes, scores, 0.3, 0.5, 0.2, "linear", 0)] == [0, 4, 2, 3]


@given(scored_boxes(), st.sampled_from([0.2, 0.3, 0.5]))
def test_nms_match(boxes_and_scores, threshold):
    boxes, scores = boxes_and_scores
    groups: list[list[int]] = []
    for i in scores.sort(descending=True, stable=True).indices.tolist():
        for group in groups:
            if _iou(boxes[group[0]], boxes[i], 0) >= np.float32(threshold):
                group.append(i)
                break
        else:
            groups.append([i])
    assert mmcv_ext.nms_match(torch.cat([boxes, scores[:, None]], 1), threshold) == groups


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("mode", [0, 1])
@pytest.mark.parametrize("aligned", [False, True])
def test_bbox_overlaps(mode, aligned, offset):
    boxes = torch.tensor([[0, 0, 4, 4], [2, 1, 5, 9], [6, 6, 7, 8], [1, 1, 3, 3.5], [0, 0, 4, 4], [4, 4, 5, 5]])
    first, second = boxes[:3], boxes[3:]
    pairs = zip(first, second, strict=True) if aligned else itertools.product(first, second)
    expected = torch.tensor([float(_iou(a, b, offset, mode == 1)) for a, b in pairs])
    ious = torch.zeros(3) if aligned else torch.zeros(3, 3)
    mmcv_ext.bbox_overlaps(first, second, ious, mode, aligned, offset)
    assert_near(ious.flatten(), expected, 1e-6)


@pytest.mark.parametrize("mode", [0, 1])
def test_bbox_overlaps_of_boxes_whose_corners_are_swapped_divide_by_the_offset_at_least(mode):
    # The first is half a pixel wide with the offset's pixel, and lies in the second.
    first, second = torch.tensor([[2.5, 0, 2, 0]]), torch.tensor([[0.0, 0, 3, 0]])
    ious = torch.zeros(1, 1)
    mmcv_ext.bbox_overlaps(first, second, ious, mode, False, 1)
    assert ious == (0.5 / 4 if mode == 0 else 0.5 / 1)
    mmcv_ext.bbox_overlaps(first, first, ious, mode, False, 1)
    assert ious == 0.5


def test_torchvision_is_asked_for_by_what_needs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ImportError, match=r"mmcv's nms needs torchvision here: pip install torchvision"):
        mmcv_ext.nms(torch.zeros(1, 4), torch.zeros(1), 0.5, 0)
