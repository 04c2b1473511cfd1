"""mmcv's rotated boxes against polygons that are clipped in exact arithmetic."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from omniops.dropin import mmcv_ext
from omniops.dropin.mmcv_ext import rotated

IOU, IOF = 0, 1
# Multiples of these angles are what most boxes have, or nearly.
ANGLES = [0.0, math.pi / 6, math.pi / 4, math.pi / 2, math.pi, -math.pi / 2, 1e-7, math.pi / 2 + 1e-6, 0.3, -7.1]


def _corners(box):
    """Counterclockwise where y points up. The sine and cosine are rounded, and nothing after them."""
    x, y, w, h, angle = box
    c, s = Fraction(math.cos(angle)), Fraction(math.sin(angle))
    x, y, w, h = map(Fraction, (x, y, w, h))
    for u, v in ((-w / 2, -h / 2), (w / 2, -h / 2), (w / 2, h / 2), (-w / 2, h / 2)):
        yield x + u * c - v * s, y + u * s + v * c


def _clipped(polygon, a, b):
    """What of it lies to the left of the line from a to b (Sutherland and Hodgman)."""
    found = []
    sides = [(b[0] - a[0]) * (p[1] - a[1]) - (b[1] - a[1]) * (p[0] - a[0]) for p in polygon]
    for i, (p, side) in enumerate(zip(polygon, sides, strict=True)):
        before, previous = sides[i - 1], polygon[i - 1]
        if (side > 0) != (before > 0):
            share = before / (before - side)
            found.append(tuple(u + share * (v - u) for u, v in zip(previous, p, strict=True)))
        if side > 0:
            found.append(p)
    return found


def _area(polygon):
    crosses = (polygon[i - 1][0] * polygon[i][1] - polygon[i][0] * polygon[i - 1][1] for i in range(len(polygon)))
    return sum(crosses, Fraction(0)) / 2


def _overlap(first, second, mode):
    """Of two boxes, as a number in double precision."""
    areas = [box[2] * box[3] for box in (first, second)]
    if min(areas) < 1e-14:
        return 0.0
    polygon, other = list(_corners(first)), list(_corners(second))
    for i in range(4):
        polygon = _clipped(polygon, other[i - 1], other[i])
    shared = float(_area(polygon))
    return shared / (sum(areas) - shared if mode == IOU else areas[0])


def _box_iou_rotated(first, second, mode=IOU, aligned=False):
    ious = torch.full((len(first) if aligned else len(first) * len(second),), torch.nan, dtype=first.dtype)
    mmcv_ext.box_iou_rotated(first, second, ious, mode_flag=mode, aligned=aligned)
    return ious if aligned else ious.view(len(first), len(second))


def _expected(first, second, mode=IOU):
    rows = [[_overlap(a, b, mode) for b in second.tolist()] for a in first.tolist()]
    return torch.tensor(rows, dtype=torch.float64)


def _boxes(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.rand(count, 5, generator=generator, dtype=torch.float64)
    return numbers * torch.tensor([40, 30, 30, 12, 7]) + torch.tensor([0, 0, 0.5, 0.5, -3])


coordinates = st.integers(-6, 6).map(lambda n: n / 2)
sides = st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.0, 1e-3, 50.0])
boxes = st.lists(st.tuples(coordinates, coordinates, sides, sides, st.sampled_from(ANGLES)), min_size=1, max_size=5)


@given(boxes, boxes, st.sampled_from([IOU, IOF]))
def test_overlaps_of_boxes_that_share_edges_and_corners(first, second, mode):
    first, second = (torch.tensor(numbers, dtype=torch.float64) for numbers in (first, second))
    found = _box_iou_rotated(first, second, mode)
    torch.testing.assert_close(found, _expected(first, second, mode), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mode", [IOU, IOF])
def test_overlaps_of_any_boxes(mode):
    first, second = _boxes(14), _boxes(11, seed=1)
    expected = _expected(first, second, mode)
    assert (expected > 0).double().mean() > 0.2
    torch.testing.assert_close(_box_iou_rotated(first, second, mode), expected, rtol=1e-12, atol=1e-12)
    pairs = _box_iou_rotated(first[:11], second, mode, aligned=True)
    torch.testing.assert_close(pairs, expected[:11].diagonal(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("mode", [IOU, IOF])
def test_precision_far_from_the_origin(mode, dtype, tolerance):
    first, second = _boxes(12).to(dtype), _boxes(12, seed=1).to(dtype)
    if dtype == torch.float32:
        first[:, :2] += 1000
        second[:, :2] += 1000
    expected = _expected(first.double(), second.double(), mode)
    found = _box_iou_rotated(first, second, mode)
    assert found.dtype == dtype
    assert (found - expected).abs().max() <= tolerance * expected.max()


def test_a_small_box_in_a_huge_one():
    small = torch.tensor([[100.0, 50, 1, 2, 0.3]])
    huge = torch.tensor([[110.0, 40, 3000, 2000, 1.1]])
    assert abs(_box_iou_rotated(small, huge, IOF).item() - 1) < 1e-4
    assert abs(_box_iou_rotated(huge, small, IOF).item() * 3e6 - 1) < 1.0001


def test_a_box_overlaps_itself_entirely_however_it_is_rotated():
    boxes = torch.tensor([[3.7, -2.1, 5.3, 1.9, angle] for angle in np.linspace(-7, 7, 50)])
    same = boxes.clone()
    same[:, 4] += math.pi
    rotated_boxes = torch.stack([boxes[:, 0], boxes[:, 1], boxes[:, 3], boxes[:, 2], boxes[:, 4] + math.pi / 2], 1)
    for other in (boxes, same, rotated_boxes):
        found = _box_iou_rotated(boxes, other, aligned=True)
        assert found.min() > 1 - 1e-5
        assert found.max() <= 1


def test_a_positive_angle_turns_from_x_to_y():
    # Their long sides lie on the diagonal (1, 1) of the picture, where y points down, and along it.
    box, along = torch.tensor([[0.0, 0, 10, 1, math.pi / 4]]), torch.tensor([[2.0, 2, 10, 1, math.pi / 4]])
    across = torch.tensor([[2.0, 2, 10, 1, -math.pi / 4]])
    assert _box_iou_rotated(box, along) > 0.5
    assert _box_iou_rotated(box, across) < 0.1


def test_what_is_not_a_number_overlaps_by_no_number():
    first = _boxes(4)
    for column in range(5):
        second = _boxes(4)
        second[1, column] = math.nan
        found = _box_iou_rotated(first, second)
        assert found[:, 1].isnan().all()
        assert not found[:, [0, 2, 3]].isnan().any()


def test_no_boxes_and_wrong_boxes():
    none = torch.zeros(0, 5)
    for first, second in itertools.product((none, torch.ones(2, 5)), repeat=2):
        if len(first) * len(second) == 0:
            assert _box_iou_rotated(first, second).shape == (len(first), len(second))
    assert _box_iou_rotated(none, none, aligned=True).shape == (0,)
    with pytest.raises(ValueError, match=r"^boxes2 must have shape \(N, 5\), .* got \(2, 4\)$"):
        _box_iou_rotated(none, torch.ones(2, 4))
    with pytest.raises(ValueError, match="as many"):
        _box_iou_rotated(none, torch.ones(2, 5), aligned=True)


@pytest.mark.parametrize("aligned", [False, True])
def test_boxes_come_in_steps_that_memory_allows(monkeypatch, aligned):
    first, second = _boxes(40), _boxes(40, seed=1)
    expected = _box_iou_rotated(first, second, aligned=aligned)
    for limit in (7, 100):
        monkeypatch.setattr(rotated, "_MAX_PAIRS", limit)
        assert _box_iou_rotated(first, second, aligned=aligned).equal(expected)


# Non-maximum suppression


def _nms_rotated(boxes, scores, threshold, labels=None):
    """As mmcv's Python calls it."""
    order = scores.sort(descending=True, stable=True).indices
    dets = boxes if labels is None else torch.cat([boxes, labels.unsqueeze(1)], 1)
    group_labels = scores.new_empty(0, dtype=torch.int) if labels is None else labels
    return mmcv_ext.nms_rotated(dets, scores, order, dets[order], group_labels, threshold, labels is not None)


@pytest.mark.parametrize("block", [1, 5, 256])
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("threshold", [0.1, 0.4])
def test_nms_rotated(monkeypatch, threshold, labelled, block):
    monkeypatch.setattr(rotated, "_BLOCK", block)
    boxes = _boxes(30)
    boxes[:, :2] /= 2
    scores = torch.rand(30, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    labels = torch.arange(30) % 3 if labelled else None
    overlaps = _expected(boxes, boxes)
    kept = []
    for i in scores.sort(descending=True).indices.tolist():
        if all(overlaps[i, j] <= threshold or (labelled and (i - j) % 3) for j in kept):
            kept.append(i)
    assert 3 < len(kept) < 30
    assert _nms_rotated(boxes, scores, threshold, labels).tolist() == kept
    assert _nms_rotated(boxes.float(), scores.float(), threshold, labels).tolist() == kept


def test_nms_rotated_keeps_what_overlaps_by_the_threshold():
    boxes = torch.tensor([[0.0, 0, 4, 4, 0], [0, 1, 4, 2, 0], [0, 0, 4, 4, 0]])
    assert _nms_rotated(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.5).tolist() == [0, 1]
    assert _nms_rotated(boxes[:0], torch.zeros(0), 0.5).tolist() == []


def test_nms_refuses_boxes_that_are_not_numbers():
    boxes = _boxes(4).float()
    boxes[2, 1] = math.nan
    scores = torch.rand(4)
    with pytest.raises(ValueError, match=r"^dets must be numbers, got NaN"):
        _nms_rotated(boxes, scores, 0.5)
    pytest.importorskip("torchvision")
    with pytest.raises(ValueError, match=r"^boxes must be numbers, got NaN"):
        mmcv_ext.nms(boxes[:, :4], scores, 0.5, 0)
    with pytest.raises(ValueError, match=r"^boxes must be numbers, got NaN"):
        mmcv_ext.softnms(boxes[:, :4], scores, torch.zeros(4, 5), 0.5, 0.5, 0.1, 1, 0)
    with pytest.raises(ValueError, match=r"^dets must be numbers, got NaN"):
        mmcv_ext.nms_match(torch.cat([boxes[:, :4], scores[:, None]], 1), 0.5)


# The real mmcv-lite


def test_mmcvs_functions_of_rotated_boxes(mmcv):
    first, second = _boxes(9), _boxes(9, seed=1)
    for clockwise in (True, False):
        copies = [tensor.clone() for tensor in (first, second)]
        if not clockwise:
            for tensor in copies:
                tensor[:, 4] *= -1
        for mode, number in (("iou", IOU), ("iof", IOF)):
            expected = _expected(first, second, number)
            found = mmcv.box_iou_rotated(*copies, mode, clockwise=clockwise)
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
            pairs = mmcv.box_iou_rotated(*copies, mode, True, clockwise)
            torch.testing.assert_close(pairs, expected.diagonal(), rtol=1e-12, atol=1e-12)
        scores, labels = torch.rand(9, dtype=torch.float64), torch.arange(9) % 2
        for labelled in (None, labels):
            dets, kept = mmcv.nms_rotated(copies[0], scores, 0.1, labelled, clockwise)
            assert kept.tolist() == _nms_rotated(first, scores, 0.1, labelled).tolist()
            assert dets.equal(torch.cat([copies[0], scores[:, None]], 1)[kept])
