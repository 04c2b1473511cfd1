"""mmcv's compiled functions against plain formulas and loops, and what stands in their place when."""

import importlib
import itertools
import math
import pkgutil
import re
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from omniops.dropin import mmcv_ext
from omniops.dropin._mmcv import mmcv as _mmcv
from omniops.dropin.mmcv_ext import roi

EMPTY = torch.empty(0)


def _random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def _close(actual: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=tolerance, atol=tolerance)


# CARAFE


def _carafe(features: Tensor, masks: Tensor, k: int, groups: int, scale: int) -> Tensor:
    n, c, h, w = features.shape
    windows = F.unfold(features, k, padding=k // 2).view(n, c * k * k, h, w)
    windows = windows.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    windows = windows.view(n, groups, c // groups, k * k, h * scale, w * scale)
    return (windows * masks.view(n, groups, 1, k * k, h * scale, w * scale)).sum(3).flatten(1, 2)


@pytest.mark.parametrize("naive", [False, True])
def test_carafe(naive):
    sizes = (3, 2, 2)
    features, masks = _random(2, 4, 3, 5).requires_grad_(), _random(2, 18, 6, 10, seed=1).requires_grad_()
    expected = _carafe(features, masks, *sizes)
    grad = _random(*expected.shape, seed=2)
    by_features, by_masks = torch.autograd.grad(expected, (features, masks), grad)

    output, again = torch.zeros_like(expected), torch.zeros_like(features)
    grads = torch.zeros_like(features), torch.zeros_like(masks)
    if naive:
        mmcv_ext.carafe_naive_forward(features, masks, output, *sizes)
        mmcv_ext.carafe_naive_backward(grad, features, masks, *grads, *sizes)
    else:
        mmcv_ext.carafe_forward(features, masks, again, EMPTY, EMPTY, output, *sizes)
        mmcv_ext.carafe_backward(grad, again, masks, *(EMPTY,) * 4, *grads, *sizes)
    _close(output, expected)
    _close(grads[0], by_features)
    _close(grads[1], by_masks)


# Deformable convolution

GEOMETRY = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)}


def _deformable(modulated: bool) -> list[Tensor]:
    """input, offset, weight, bias, mask: 2 weight groups, 4 offset groups."""
    tensors = [
        _random(3, 8, 7, 6),
        _random(3, 4 * 2 * 6, 4, 8),
        _random(6, 4, 3, 2),
        _random(6),
        _random(3, 4 * 6, 4, 8),
    ]
    return [tensor.requires_grad_() for tensor in (tensors if modulated else tensors[:3])]


def test_deform_conv():
    tv = pytest.importorskip("torchvision").ops
    input, offset, weight = _deformable(modulated=False)
    expected = tv.deform_conv2d(input, offset, weight, **GEOMETRY)
    grad = _random(*expected.shape, seed=2)
    by_input, by_offset, by_weight = torch.autograd.grad(expected, (input, offset, weight), grad)

    numbers = {"kW": 2, "kH": 3, "dW": 1, "dH": 2, "padW": 2, "padH": 1, "dilationW": 2, "dilationH": 1}
    numbers |= {"group": 2, "deformable_group": 4, "im2col_step": 1}
    output, grads = torch.empty_like(expected), [torch.zeros_like(tensor) for tensor in (input, offset, weight)]
    mmcv_ext.deform_conv_forward(input, weight, offset, output, EMPTY, EMPTY, **numbers)
    mmcv_ext.deform_conv_backward_input(input, offset, grad, *grads[:2], weight, EMPTY, **numbers)
    for _ in range(2):  # it adds
        mmcv_ext.deform_conv_backward_parameters(input, offset, grad, grads[2], EMPTY, EMPTY, **numbers, scale=0.5)
    for actual, wanted in zip((output, *grads), (expected, by_input, by_offset, by_weight), strict=True):
        _close(actual, wanted)


@pytest.mark.parametrize("with_bias", [True, False])
def test_modulated_deform_conv(with_bias):
    tv = pytest.importorskip("torchvision").ops
    input, offset, weight, bias, mask = tensors = _deformable(modulated=True)
    expected = tv.deform_conv2d(input, offset, weight, bias if with_bias else None, mask=mask, **GEOMETRY)
    grad = _random(*expected.shape, seed=2)
    computed = torch.autograd.grad(expected, tensors, grad, allow_unused=True, materialize_grads=True)

    numbers = {"kernel_h": 3, "kernel_w": 2, "stride_h": 2, "stride_w": 1, "pad_h": 1, "pad_w": 2}
    numbers |= {"dilation_h": 1, "dilation_w": 2, "group": 2, "deformable_group": 4, "with_bias": with_bias}
    output = torch.empty_like(expected)
    by_input, by_offset, by_weight, by_bias, by_mask = grads = [torch.zeros_like(tensor) for tensor in tensors]
    mmcv_ext.modulated_deform_conv_forward(input, weight, bias, EMPTY, offset, mask, output, EMPTY, **numbers)
    given = (input, weight, bias, EMPTY, offset, mask, EMPTY)
    mmcv_ext.modulated_deform_conv_backward(*given, by_input, by_weight, by_bias, by_offset, by_mask, grad, **numbers)
    for actual, wanted in zip((output, *grads), (expected, *computed), strict=True):
        _close(actual, wanted)


# Boxes


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
    _close(ious.flatten(), expected, 1e-6)


@pytest.mark.parametrize("mode", [0, 1])
def test_bbox_overlaps_of_boxes_whose_corners_are_swapped_divide_by_the_offset_at_least(mode):
    # The first is half a pixel wide with the offset's pixel, and lies in the second.
    first, second = torch.tensor([[2.5, 0, 2, 0]]), torch.tensor([[0.0, 0, 3, 0]])
    ious = torch.zeros(1, 1)
    mmcv_ext.bbox_overlaps(first, second, ious, mode, False, 1)
    assert ious == (0.5 / 4 if mode == 0 else 0.5 / 1)
    mmcv_ext.bbox_overlaps(first, first, ious, mode, False, 1)
    assert ious == 0.5


# Regions of interest

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


def _bilinear(image: Tensor, y: Tensor, x: Tensor) -> Tensor:
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


def _align(input, rois, ratio, mode, aligned=True, offset=None, gamma=0.0):
    """RoIAlign and deformable RoI pooling, bin by bin and sample by sample."""
    results = []
    for k, (batch, *box) in enumerate(rois):
        x1, y1, x2, y2 = (coordinate * SCALE - (0.5 if aligned else 0) for coordinate in box)
        width, height = (x2 - x1, y2 - y1) if aligned else ((x2 - x1).clamp(min=1), (y2 - y1).clamp(min=1))
        down, across = (ratio, ratio) if ratio else (math.ceil(height / SIZE[0]), math.ceil(width / SIZE[1]))
        for i, j in itertools.product(*map(range, SIZE)):
            top, left = y1 + i * height / SIZE[0], x1 + j * width / SIZE[1]
            if offset is not None:
                left, top = left + gamma * width * offset[k, 0, i, j], top + gamma * height * offset[k, 1, i, j]
            samples = [
                _bilinear(
                    input[int(batch)],
                    top + (u + 0.5) * height / SIZE[0] / down,
                    left + (v + 0.5) * width / SIZE[1] / across,
                )
                for u, v in itertools.product(range(down), range(across))
            ]
            if not samples:
                none = torch.finfo(torch.float32).min if mode == "max" else 0.0
                results.append(torch.full_like(input[0, :, 0, 0], none))
            else:
                stacked = torch.stack(samples)
                results.append(stacked.amax(0) if mode == "max" else stacked.mean(0))
    return torch.stack(results).view(len(rois), *SIZE, -1).permute(0, 3, 1, 2)


def _roi_align(input, rois, grad, ratio, mode, aligned):
    numbers = (*SIZE, SCALE, ratio, 0 if mode == "max" else 1, aligned)
    output, by_input = torch.zeros_like(grad), torch.zeros_like(input)
    argmax = [torch.zeros_like(grad) if mode == "max" else input.new_zeros(0) for _ in range(2)]
    mmcv_ext.roi_align_forward(input, rois, output, *argmax, *numbers)
    mmcv_ext.roi_align_backward(grad, rois, *argmax, by_input, *numbers)
    return output, by_input


@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("mode", ["avg", "max"])
def test_roi_align(mode, aligned, ratio):
    if mode == "avg":
        pytest.importorskip("torchvision")
    input = _random(2, 3, 8, 9).requires_grad_()
    expected = _align(input, ROIS, ratio, mode, aligned)
    grad = _random(*expected.shape, seed=1)
    (by_input,) = torch.autograd.grad(expected, input, grad)
    for actual, wanted in zip(
        _roi_align(input.detach(), ROIS, grad, ratio, mode, aligned), (expected, by_input), strict=True
    ):
        _close(actual, wanted)


def test_roi_align_of_no_samples_is_mmcvs():
    output, by_input = _roi_align(_random(2, 3, 8, 9), ROIS[4:], torch.ones(1, 3, *SIZE).double(), 0, "max", True)
    assert (output == torch.finfo(torch.float32).min).all()
    assert not by_input.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    pytest.importorskip("torchvision")
    input = _random(2, 3, 8, 9).to(dtype)
    grad = _random(len(ROIS), 3, *SIZE, seed=1).to(dtype)
    rois = ROIS.to(dtype)
    wide = _roi_align(input.double(), rois.double(), grad.double(), 2, "avg", True)
    for actual, wanted in zip(_roi_align(input, rois, grad, 2, "avg", True), wide, strict=True):
        assert actual.dtype == dtype
        _close(actual, wanted, torch.finfo(dtype).eps)


def test_roi_pool():
    input = _random(2, 3, 8, 9).relu().requires_grad_()  # many pixels are equal
    results = []
    for batch, x1, y1, x2, y2 in ROIS.tolist():
        top, left, bottom, right = y1 * SCALE, x1 * SCALE, (y2 + 1) * SCALE, (x2 + 1) * SCALE
        step_y, step_x = (bottom - top) / SIZE[0], (right - left) / SIZE[1]
        for i, j in itertools.product(*map(range, SIZE)):
            rows = range(max(math.floor(top + i * step_y), 0), min(math.ceil(top + (i + 1) * step_y), 8))
            columns = range(max(math.floor(left + j * step_x), 0), min(math.ceil(left + (j + 1) * step_x), 9))
            pixels = [input[int(batch), :, y, x] for y in rows for x in columns]
            # of equal pixels the first: what max along a dimension returns the gradient of
            results.append(torch.stack(pixels).max(0).values if pixels else input.new_zeros(3))
    expected = torch.stack(results).view(len(ROIS), *SIZE, 3).permute(0, 3, 1, 2)
    grad = _random(*expected.shape, seed=1)
    (wanted,) = torch.autograd.grad(expected, input, grad)

    output, argmax = torch.ones_like(expected), torch.zeros(expected.shape, dtype=torch.int)
    by_input = torch.zeros_like(input)
    mmcv_ext.roi_pool_forward(input, ROIS, output, argmax, *SIZE, SCALE)
    mmcv_ext.roi_pool_backward(grad, ROIS, argmax, by_input, *SIZE, SCALE)
    _close(output, expected)
    _close(by_input, wanted)


def test_roi_pool_of_a_region_without_width_is_zero_and_has_no_gradient():
    input, grad = torch.ones(2, 3, 8, 9).double(), torch.ones(2, 3, *SIZE).double()
    rois = torch.tensor([[0, 4.0, 2, 3, 9], [1, 4, 9, 8, 2]], dtype=torch.float64)
    output, by_input = _pooled("roi_pool", input, rois, grad)
    assert not output.any()
    assert not by_input.any()


@pytest.mark.parametrize("name", ["roi_align", "roi_pool"])
def test_the_largest_of_what_is_not_a_number_is_none(name):
    input = _random(2, 3, 8, 9)
    input[0, 1, 4, 3] = math.nan
    output, _ = _pooled(name, input, torch.tensor([[0, 0, 0, 17.0, 15.0]]).double(), torch.ones(1, 3, *SIZE).double())
    assert output[0, 1].isnan().any()
    assert not output[0, [0, 2]].isnan().any()


@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("moved", [True, False])
def test_deform_roi_pool(moved, ratio):
    input = _random(2, 3, 8, 9).requires_grad_()
    offset = _random(len(ROIS), 2, *SIZE, seed=1).requires_grad_() if moved else None
    gamma = 0.7
    expected = _align(input, ROIS, ratio, "avg", offset=offset, gamma=gamma)
    grad = _random(*expected.shape, seed=2)
    wanted = torch.autograd.grad(expected, (input, offset) if moved else (input,), grad)

    given_offset = offset.detach() if moved else input.new_zeros(0)
    output = torch.empty_like(expected)
    grads = torch.zeros_like(input), torch.zeros_like(given_offset)
    mmcv_ext.deform_roi_pool_forward(input, ROIS, given_offset, output, *SIZE, SCALE, ratio, gamma)
    mmcv_ext.deform_roi_pool_backward(grad, input, ROIS, given_offset, *grads, *SIZE, SCALE, ratio, gamma)
    _close(output, expected)
    for actual, one in zip(grads, wanted, strict=False):
        _close(actual, one)


def test_regions_come_in_steps_that_memory_allows(monkeypatch):
    input, offset = _random(2, 3, 8, 9), _random(len(ROIS), 2, *SIZE, seed=1)
    outputs = []
    for most in (2**24, 100):
        monkeypatch.setattr(roi, "_MOST_SAMPLES", most)
        outputs.append(torch.empty(len(ROIS), 3, *SIZE, dtype=torch.float64))
        mmcv_ext.deform_roi_pool_forward(input, ROIS, offset, outputs[-1], *SIZE, SCALE, 2, 0.7)
    assert outputs[0].equal(outputs[1])


class _Largest(TorchDispatchMode):
    """How many elements the largest tensor has that an operator returns."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def _pooled(name, input, rois, grad, ratio=0):
    """Forward and backward of one of the functions that sample in PyTorch."""
    if name == "roi_align":
        return _roi_align(input, rois, grad, ratio, "max", True)
    output, by_input = torch.ones_like(grad), torch.ones_like(input)
    if name == "roi_pool":
        argmax = torch.zeros(grad.shape, dtype=torch.int)
        mmcv_ext.roi_pool_forward(input, rois, output, argmax, *SIZE, SCALE)
        mmcv_ext.roi_pool_backward(grad, rois, argmax, by_input, *SIZE, SCALE)
        return output, by_input
    offset = torch.zeros(len(rois), 2, *SIZE).double()
    by_offset = torch.zeros_like(offset)
    mmcv_ext.deform_roi_pool_forward(input, rois, offset, output, *SIZE, SCALE, ratio, 0.3)
    mmcv_ext.deform_roi_pool_backward(grad, input, rois, offset, by_input, by_offset, *SIZE, SCALE, ratio, 0.3)
    return output, by_input, by_offset


@pytest.mark.parametrize("name", ["roi_align", "roi_pool", "deform_roi_pool"])
def test_a_large_region_comes_in_parts_that_memory_allows(monkeypatch, name):
    # Samples on pixels that are equal, and off the map: which of them is the first tells the gradient.
    input = _random(2, 3, 8, 9).relu()
    rois = torch.tensor([[1, -260.0, -310, 140, 290], [0, 1, 1, 401, 601], [1, -390, -595, 10, 5]], dtype=torch.float64)
    grad = _random(3, 3, *SIZE, seed=1)
    # 100 samples for each bin's 100 pixels, down and across: as many as without a ratio, and none of them left out.
    expected = _pooled(name, input, rois, grad, 100)
    monkeypatch.setattr(roi, "_MOST_SAMPLES", 2000)
    with _Largest() as largest:
        actual = _pooled(name, input, rois, grad)
    assert largest.elements <= 4 * 2000  # a pixel number for each of the four around a sample
    for one, wanted in zip(actual, expected, strict=True):
        _close(one, wanted, 1e-12)
    if name == "roi_align":  # as many parts as a ratio of the caller's makes
        for one, wanted in zip(_pooled(name, input, rois, grad, 100), expected, strict=True):
            assert one.equal(wanted)


@pytest.mark.parametrize("name", ["roi_align", "roi_pool", "deform_roi_pool"])
def test_of_a_huge_region_what_is_on_the_map_is_sampled(name):
    input = _random(2, 3, 8, 9)
    # Bins of 200000 x 200000 pixels, with the map in the second down and first across, and samples on its pixels.
    rois = torch.tensor([[1, -200000, -600000, 600000, 600000]], dtype=torch.float64)
    grad = torch.ones(1, 3, *SIZE, dtype=torch.float64)
    with _Largest() as largest:
        output, by_input, *_ = _pooled(name, input, rois, grad)
    assert largest.elements < 2**17
    wanted, x = torch.zeros_like(grad), input.clone().requires_grad_()
    if name == "deform_roi_pool":  # the samples a pixel beside the map are the border's
        output, by_input = output * 4e10, by_input * 4e10
        value = F.pad(x[1], (1, 1, 1, 1), mode="replicate").sum((1, 2))
    else:
        value = x[1].amax((1, 2))
    value.sum().backward()
    wanted[0, :, 1, 0] = value.detach()
    _close(output, wanted)
    _close(by_input, x.grad)


@pytest.mark.parametrize("image", [2, -1, -0.5, math.nan])
@pytest.mark.parametrize("name", ["roi_align", "roi_align avg", "roi_pool", "deform_roi_pool"])
def test_regions_of_an_image_that_is_not_there(name, image):
    if name == "roi_align avg":
        pytest.importorskip("torchvision")
    input, rois = _random(2, 3, 8, 9), ROIS.clone()
    rois[1, 0] = image
    grad = _random(len(rois), 3, *SIZE)
    expected = f"rois must have .* from 0 to 1 as input has batch size 2, got {image:g} in row 1$"
    with pytest.raises(ValueError, match=expected):
        _roi_align(input, rois, grad, 2, "avg", True) if "avg" in name else _pooled(name, input, rois, grad, 2)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("column", [1, 4])
@pytest.mark.parametrize("name", ["roi_align", "roi_align avg", "roi_pool", "deform_roi_pool"])
def test_regions_that_are_not_finite(name, column, number):
    if name == "roi_align avg":
        pytest.importorskip("torchvision")
    input, rois = _random(2, 3, 8, 9), ROIS.clone()
    rois[1, column] = number
    grad = _random(len(rois), 3, *SIZE)
    for ratio in (0, 2):
        with pytest.raises(ValueError, match=r"^rois must be finite, got NaN or infinity"):
            _roi_align(input, rois, grad, ratio, "avg", True) if "avg" in name else _pooled(
                name, input, rois, grad, ratio
            )


def test_pixels_of_a_map_too_large_for_float32_to_count():
    y, x = torch.tensor([2.0]), torch.tensor([1.0])
    pixels, weights = roi._neighbours(y, x, 3, 2**23 + 1)
    assert pixels[0].item() == 2 * (2**23 + 1) + 1
    assert weights[0].item() == 1


@pytest.mark.parametrize("name", ["roi_align", "roi_pool", "deform_roi_pool"])
def test_no_regions(name):
    if name == "roi_align":
        pytest.importorskip("torchvision")
    input, rois, output = _random(2, 3, 8, 9), torch.zeros(0, 5).double(), torch.zeros(0, 3, *SIZE).double()
    by_input = torch.ones_like(input)
    if name == "roi_align":
        _, by_input = _roi_align(input, rois, output, 0, "avg", True)
    elif name == "roi_pool":
        argmax = torch.zeros(0, 3, *SIZE, dtype=torch.int)
        mmcv_ext.roi_pool_forward(input, rois, output, argmax, *SIZE, SCALE)
        mmcv_ext.roi_pool_backward(output, rois, argmax, by_input, *SIZE, SCALE)
    else:
        offset = torch.zeros(0, 2, *SIZE).double()
        mmcv_ext.deform_roi_pool_forward(input, rois, offset, output, *SIZE, SCALE, 0, 0.1)
        mmcv_ext.deform_roi_pool_backward(output, input, rois, offset, by_input, offset.clone(), *SIZE, SCALE, 0, 0.1)
    assert (by_input == 0).all()


# Focal loss

ALPHA, GAMMA = 0.3, 1.7


@pytest.mark.parametrize("weighted", [False, True])
def test_sigmoid_focal_loss(weighted):
    logits, target = (3 * _random(6, 4)).requires_grad_(), torch.tensor([0, 3, 4, 1, 1, 4])  # 4: background
    weight = torch.tensor([0.5, 2, 1, 3], dtype=torch.float64) if weighted else EMPTY.double()
    truth = F.one_hot(target, 5)[:, :4].double()
    p = logits.sigmoid()
    balance = (ALPHA * truth + (1 - ALPHA) * (1 - truth)) * (truth * (1 - p) + (1 - truth) * p) ** GAMMA
    expected = balance * F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    if weighted:  # that of the row's class, for every column; the background has none
        expected = expected * torch.cat([weight, weight.new_ones(1)])[target][:, None]
    (wanted,) = torch.autograd.grad(expected.sum(), logits)

    output, by_input = torch.zeros_like(logits), torch.zeros_like(logits)
    mmcv_ext.sigmoid_focal_loss_forward(logits, target, weight, output, GAMMA, ALPHA)
    mmcv_ext.sigmoid_focal_loss_backward(logits, target, weight, by_input, GAMMA, ALPHA)
    _close(output, expected)
    _close(by_input, wanted)


def test_sigmoid_focal_loss_of_extreme_logits_is_finite():
    logits, target = torch.tensor([[-200.0, 200.0], [200.0, -200.0]]), torch.tensor([0, 0])
    output, by_input = torch.zeros(2, 2), torch.zeros(2, 2)
    mmcv_ext.sigmoid_focal_loss_forward(logits, target, EMPTY, output, 2.0, 0.25)
    mmcv_ext.sigmoid_focal_loss_backward(logits, target, EMPTY, by_input, 2.0, 0.25)
    least = -math.log(torch.finfo(torch.float32).tiny)
    _close(output, torch.tensor([[0.25 * least, 0.75 * least], [0, 0]]), 1e-5)
    _close(by_input, torch.tensor([[-0.25, 0.75], [0, 0]]), 1e-5)


@pytest.mark.parametrize("weighted", [False, True])
def test_softmax_focal_loss(weighted):
    logits, target = _random(6, 4).requires_grad_(), torch.tensor([0, 3, -1, 1, 1, 2])
    weight = torch.tensor([0.5, 2, 1, 3], dtype=torch.float64) if weighted else EMPTY.double()
    p = logits.softmax(1)
    picked = p[range(6), target.clamp(min=0)]
    expected = -ALPHA * (1 - picked) ** GAMMA * picked.log() * (target >= 0)
    if weighted:
        expected = expected * weight[target]
    (wanted,) = torch.autograd.grad(expected.sum(), logits)

    output, buffer, by_input = torch.zeros(6).double(), torch.zeros(6).double(), torch.zeros_like(logits)
    mmcv_ext.softmax_focal_loss_forward(p, target, weight, output, GAMMA, ALPHA)
    mmcv_ext.softmax_focal_loss_backward(p, target, weight, buffer, by_input, GAMMA, ALPHA)
    _close(output, expected)
    _close(by_input, wanted)


# The rest


@pytest.mark.parametrize("padding", [(1, 2), (0, 0)])
def test_masked_convolution(padding):
    input, weight = _random(1, 3, 6, 7), _random(4, 3, 3, 5)
    expected = F.conv2d(input, weight, padding=padding)
    mask = torch.rand(expected.shape[2:], generator=torch.Generator().manual_seed(0)) > 0.5
    y, x = mask.nonzero(as_tuple=True)
    columns, output = torch.full((45, len(y)), torch.nan).double(), torch.zeros_like(expected)
    mmcv_ext.masked_im2col_forward(input, y, x, columns, 3, 5, *padding)
    mmcv_ext.masked_col2im_forward(weight.flatten(1) @ columns, y, x, output, *mask.shape, 4)
    _close(output, expected * mask)


def test_multi_scale_deformable_attention():
    shapes = torch.tensor([[4, 5], [2, 3]])
    value, weights = _random(2, 26, 3, 4).requires_grad_(), _random(2, 7, 3, 2, 2, seed=1).requires_grad_()
    locations = (_random(2, 7, 3, 2, 2, 2, seed=2) * 0.4 + 0.5).requires_grad_()
    rows = []
    for n, q, m in itertools.product(range(2), range(7), range(3)):
        row = value.new_zeros(4)
        for level, (first, (h, w)) in enumerate(zip((0, 20), shapes.tolist(), strict=True)):
            # a border of zeros, so that samples fade out to a pixel beyond the map
            padded = F.pad(value[n, first : first + h * w, m].T.view(4, h, w), (2, 2, 2, 2))
            for point in range(2):
                x, y = locations[n, q, m, level, point] * torch.tensor([w, h]) - 0.5
                row = row + weights[n, q, m, level, point] * _bilinear(padded, y + 2, x + 2)
        rows.append(row)
    expected = torch.stack(rows).view(2, 7, 12)
    grad = _random(2, 7, 12, seed=3)
    wanted = torch.autograd.grad(expected, (value, locations, weights), grad)

    given_tensors = (value, shapes, torch.tensor([0, 20]), locations, weights)
    _close(mmcv_ext.ms_deform_attn_forward(*given_tensors, im2col_step=64), expected)
    grads = [torch.zeros_like(tensor) for tensor in (value, locations, weights)]
    mmcv_ext.ms_deform_attn_backward(*given_tensors, grad, *grads, im2col_step=64)
    for actual, one in zip(grads, wanted, strict=True):
        _close(actual, one)


@pytest.mark.parametrize("place", [-1.0, -1.25, 4.0, 6.0])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_location_a_pixel_or_more_off_the_map_has_no_gradient(axis, place):
    value, weights = torch.ones(1, 16, 1, 2), torch.ones(1, 1, 1, 1, 2)
    locations = torch.full((1, 1, 1, 1, 2, 2), 0.3)
    locations[..., 0, axis] = (place + 0.5) / 4
    shapes, first = torch.tensor([[4, 4]]), torch.tensor([0])
    grads = [torch.full_like(each, torch.nan) for each in (value, locations, weights)]
    value[:, ::3] = 3
    grad = torch.ones(1, 1, 2)
    mmcv_ext.ms_deform_attn_backward(value, shapes, first, locations, weights, grad, *grads, im2col_step=64)
    assert grads[1][..., 0, :].tolist() == [[[[[0, 0]]]]]
    assert (grads[1][..., 1, :] != 0).all()
    assert grads[2].flatten()[0] == 0
    assert grads[2].flatten()[1] > 0


def test_autocast_leaves_the_kernels_alone():
    features, masks = _random(1, 4, 3, 3).float(), _random(1, 9, 6, 6).float()
    output = torch.zeros(1, 4, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        mmcv_ext.carafe_naive_forward(features, masks, output, 3, 1, 2)
    _close(output, _carafe(features, masks, 3, 1, 2), 1e-5)


def test_torchvision_is_asked_for_by_what_needs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ImportError, match=r"mmcv's nms needs torchvision here: pip install torchvision"):
        mmcv_ext.nms(torch.zeros(1, 4), torch.zeros(1), 0.5, 0)


# What stands in for mmcv._ext, and when: on packages that look like mmcv


LITE = {
    "__init__.py": "",
    "ops/__init__.py": "from . import bbox, carafe, knn",
    "ops/bbox.py": "from mmcv import _ext as ext_module",
    "ops/knn.py": "from mmcv import _ext as ext_module",
    "ops/carafe.py": """
import torch
from mmcv import _ext as ext_module

class CARAFENaiveFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, masks, kernel_size, group_size, scale_factor):
        ctx.kernel_size, ctx.group_size, ctx.scale_factor = kernel_size, group_size, scale_factor
        n, c, h, w = features.shape
        output = features.new_zeros(n, c, h * scale_factor, w * scale_factor)
        ext_module.carafe_naive_forward(features, masks, output, kernel_size, group_size, scale_factor)
        ctx.save_for_backward(features, masks)
        return output

    @staticmethod
    def backward(ctx, grad_output):
        assert grad_output.is_cuda
""",
}
COMPILED = """
def bbox_overlaps(bboxes1, bboxes2, ious, mode, aligned, offset):
    if bboxes1.device.type != "meta":
        raise RuntimeError("bbox_overlaps_impl: implementation for device %s:0 not found." % bboxes1.device.type)
    if len(bboxes1) == 0:
        raise RuntimeError("its own error")
    calls.append("theirs")

def carafe_naive_forward(*arguments):
    raise RuntimeError("CarafeNaive is not compiled with GPU support")

def knn_forward():
    return "theirs"

calls = []
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Makes a package called mmcv; the modules of the real one, if imported, come back after the test."""
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "mmcv"}
    was = _mmcv.enabled()
    _mmcv.disable()

    def make(**more: str) -> None:
        for name, text in {**LITE, **{f"{name}.py": text for name, text in more.items()}}.items():
            file = tmp_path / "mmcv" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        monkeypatch.syspath_prepend(tmp_path)

    yield make
    _mmcv.disable()
    for name in [name for name in sys.modules if name.split(".")[0] == "mmcv"]:
        del sys.modules[name]
    sys.modules.update(before)
    if was:
        _mmcv.enable(None)


def _overlap(extension, device="cpu"):
    boxes, ious = torch.tensor([[0.0, 0, 2, 2]], device=device), torch.zeros(1, 1, device=device)
    extension.bbox_overlaps(boxes, boxes, ious, mode=0, aligned=False, offset=0)
    return ious


@pytest.mark.parametrize("imported_before", [False, True])
def test_lite_is_served(package, imported_before):
    package()
    if imported_before:
        importlib.import_module("mmcv")
        with pytest.raises(ImportError):
            importlib.import_module("mmcv.ops")
    assert _mmcv.installed()
    assert _mmcv.serving()["mps"].startswith("omniops")
    assert not _mmcv.enabled()
    _mmcv.enable(None)
    _mmcv.enable(("cpu",))
    assert _mmcv.enabled()

    ops = importlib.import_module("mmcv.ops")
    assert _overlap(ops.bbox.ext_module) == 1
    assert find_spec("mmcv._ext") is sys.modules["mmcv._ext"].__spec__  # what pkgutil.find_loader asks
    assert all(hasattr(ops.bbox.ext_module, name) for name in ("nms", "knn_forward", "anything"))
    assert not hasattr(ops.bbox.ext_module, "__file__")
    with pytest.raises(NotImplementedError, match=r"omniops has no knn_forward for mmcv: .*pip install mmcv"):
        ops.bbox.ext_module.knn_forward(torch.zeros(1))


def test_lite_is_no_longer_served_once_disabled(package):
    package()
    _mmcv.enable(None)
    ops = importlib.import_module("mmcv.ops")
    _mmcv.disable()
    assert not _mmcv.enabled()
    assert find_spec("mmcv._ext") is None
    with pytest.raises(AttributeError, match=r"'bbox_overlaps': omniops was told .* omniops\.enable\('mmcv'\)"):
        _overlap(ops.bbox.ext_module)
    _mmcv.enable(None)
    assert _overlap(ops.bbox.ext_module) == 1
    assert _overlap(importlib.import_module("mmcv._ext")) == 1


def test_an_mmcv_that_was_compiled_for_another_pytorch_is_as_mmcv_lite(package):
    package(_ext="raise ImportError('undefined symbol: _ZN3c10')")
    _mmcv.enable(None)
    assert _overlap(importlib.import_module("mmcv.ops").bbox.ext_module) == 1


@pytest.mark.parametrize("imported_before", [False, True])
def test_the_backward_of_carafe_naive_runs_everywhere(package, imported_before):
    package()
    _mmcv.enable(None)
    if imported_before:
        importlib.import_module("mmcv.ops.carafe")
        _mmcv.disable()
        _mmcv.enable(None)
    function = importlib.import_module("mmcv.ops.carafe").CARAFENaiveFunction
    tensors = _random(1, 2, 3, 3).requires_grad_(), _random(1, 9, 6, 6).requires_grad_()
    torch.autograd.gradcheck(lambda *args: function.apply(*args, 3, 1, 2), tensors)
    _mmcv.disable()
    with pytest.raises(AssertionError):
        function.backward(None, torch.zeros(1))


@pytest.mark.parametrize("imported_before", [False, True])
@pytest.mark.parametrize("devices", [None, ("meta",)])
def test_a_compiled_mmcv_keeps_its_own_functions(package, imported_before, devices):
    package(_ext=COMPILED)
    if imported_before:
        importlib.import_module("mmcv.ops")
    assert _mmcv.serving()["mps"].startswith("mmcv's compiled functions, omniops")
    _mmcv.enable(devices)
    ops = importlib.import_module("mmcv.ops")
    extension = ops.bbox.ext_module
    assert _overlap(extension) == 1  # it has no CPU function
    assert _overlap(extension) == 1
    _overlap(extension, "meta")
    assert _mmcv.serving()["mps"].startswith("mmcv's compiled functions, omniops")
    assert extension.calls == (["theirs"] if devices is None else [])
    if devices is None:
        with pytest.raises(RuntimeError, match="its own error"):
            extension.bbox_overlaps(torch.zeros(0, 4, device="meta"), *(torch.zeros(0, 4),) * 2, 0, False, 0)
    output = torch.zeros(1, 1, 1, 1)
    extension.carafe_naive_forward(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1), output, 1, 1, 1)
    assert output == 1
    assert extension.knn_forward() == "theirs"
    assert not hasattr(extension, "nms")

    _mmcv.disable()
    with pytest.raises(RuntimeError, match="implementation for device cpu:0 not found"):
        _overlap(extension)


def test_mmengine_finds_the_extension_on_python_without_find_loader(package, monkeypatch):
    package()
    monkeypatch.delattr(pkgutil, "find_loader", raising=False)
    _mmcv.enable(None)
    assert pkgutil.find_loader("mmcv._ext") is not None
    assert pkgutil.find_loader("mmcv._no") is None
    _mmcv.disable()
    assert not hasattr(pkgutil, "find_loader")


def test_the_documentation_counts_the_functions():
    text = (Path(__file__).parents[2] / "docs/mmcv.md").read_text(encoding="utf-8")
    assert f"Of its functions {len(mmcv_ext.__all__)} are" in text


# The real mmcv-lite


def test_mmcv_finds_all_that_it_asks_for(mmcv):
    extension = importlib.import_module("mmcv._ext")
    asked = set()
    for file in Path(mmcv.__file__).parent.glob("*.py"):
        for call in re.findall(r"load_ext\((.*?)\)", file.read_text(encoding="utf-8"), re.DOTALL):
            asked.update(re.findall(r"'(\w+)'", call))
    asked -= {"_ext"}
    assert len(asked) > 100
    assert all(hasattr(extension, name) for name in asked)
    assert set(mmcv_ext.__all__) <= asked


def _functions(ops):
    """Differentiable functions of mmcv.ops, each with its float64 inputs."""
    rois = ROIS[:4]
    input, target = _random(2, 4, 8, 9), torch.tensor([0, 2, 1])
    offset, mask, weight = _random(2, 36, 4, 4), _random(2, 18, 4, 4), _random(4, 2, 3, 3)
    bins = _random(4, 2, *SIZE)
    return {
        "carafe": (lambda x, m: ops.carafe(x, m, 3, 2, 2), _random(1, 4, 3, 3), _random(1, 18, 6, 6)),
        "carafe_naive": (lambda x, m: ops.carafe_naive(x, m, 3, 2, 2), _random(1, 4, 3, 3), _random(1, 18, 6, 6)),
        "deform_conv2d": (lambda x, o, w: ops.deform_conv2d(x, o, w, 2, 1, 1, 2, 2), input[..., :8], offset, weight),
        "modulated_deform_conv2d": (
            lambda x, o, m, w, b: ops.modulated_deform_conv2d(x, o, m, w, b, 2, 1, 1, 2, 2),
            input[..., :8],
            offset,
            mask,
            weight,
            _random(4),
        ),
        "roi_align": (lambda x: ops.roi_align(x, rois, SIZE, SCALE, 0, "avg", True), input),
        "roi_align max": (lambda x: ops.roi_align(x, rois, SIZE, SCALE, 0, "max", True), input),
        "roi_pool": (lambda x: ops.roi_pool(x, rois, SIZE, SCALE), input),
        "deform_roi_pool": (lambda x, o: ops.deform_roi_pool(x, rois, o, SIZE, SCALE, 0, 0.3), input, bins),
        "sigmoid_focal_loss": (lambda x: ops.sigmoid_focal_loss(x, target, 2.0, 0.25, None, "mean"), _random(3, 2)),
        "softmax_focal_loss": (lambda x: ops.softmax_focal_loss(x, target, 2.0, 0.25, None, "sum"), _random(3, 3)),
    }


@pytest.mark.parametrize(
    "name",
    [
        "carafe",
        "carafe_naive",
        "deform_conv2d",
        "modulated_deform_conv2d",
        "roi_align",
        "roi_align max",
        "roi_pool",
        "deform_roi_pool",
        "sigmoid_focal_loss",
        "softmax_focal_loss",
    ],
)
def test_mmcvs_functions_pass_gradcheck(mmcv, name):
    function, *inputs = _functions(mmcv)[name]
    torch.autograd.gradcheck(function, [tensor.clone().requires_grad_() for tensor in inputs], fast_mode=True)


def test_mmcvs_other_functions_work(mmcv):
    boxes = np.array([[0, 0, 4, 4], [0, 0, 4, 3.9], [8, 8, 9, 9]], dtype=np.float32)
    scores = np.array([0.5, 0.9, 0.7], dtype=np.float32)
    assert mmcv.nms(boxes, scores, 0.5)[1].tolist() == [1, 2]
    assert mmcv.nms(boxes, scores, 0.5, max_num=1)[1].tolist() == [1]
    assert mmcv.nms(boxes, scores, 0.99, score_threshold=0.6)[1].tolist() == [1, 2]
    assert mmcv.soft_nms(boxes, scores, 0.5, method="linear")[1].tolist() == [1, 2, 0]
    assert [group.tolist() for group in mmcv.nms_match(np.c_[boxes, scores], 0.5)] == [[1, 0], [2]]
    assert mmcv.bbox_overlaps(torch.tensor(boxes), torch.tensor(boxes)).diagonal().eq(1).all()
    assert "omniops" in mmcv.get_compiler_version()
    assert "omniops" in mmcv.get_compiling_cuda_version()
    layer = mmcv.MaskedConv2d(2, 3, 3, padding=1)
    x = torch.randn(1, 2, 5, 6)
    mask = torch.rand(1, 5, 6) > 0.5
    _close(layer(x, mask.float()), layer(x) * mask, 1e-5)
    with pytest.raises(NotImplementedError, match="omniops has no nms_quadri"):
        mmcv.nms_quadri(torch.zeros(1, 8), torch.zeros(1), 0.5)
