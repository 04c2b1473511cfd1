"""mmcv's pooling of regions of interest against loops over bins and samples."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from dropin.mmcv_inputs import ROIS, SCALE, SIZE, assert_near, bilinear, random_tensor
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from omniops.dropin import mmcv_ext
from omniops.dropin.mmcv_ext import roi


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
                bilinear(
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


@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("mode", ["avg", "max"])
def test_roi_align(mode, aligned, ratio):
    if mode == "avg":
        pytest.importorskip("torchvision")
    input = random_tensor(2, 3, 8, 9).requires_grad_()
    expected = _align(input, ROIS, ratio, mode, aligned)
    grad = random_tensor(*expected.shape, seed=1)
    (by_input,) = torch.autograd.grad(expected, input, grad)
    for actual, wanted in zip(
        _roi_align(input.detach(), ROIS, grad, ratio, mode, aligned), (expected, by_input), strict=True
    ):
        assert_near(actual, wanted)


def test_roi_align_of_no_samples_is_mmcvs():
    output, by_input = _roi_align(random_tensor(2, 3, 8, 9), ROIS[4:], torch.ones(1, 3, *SIZE).double(), 0, "max", True)
    assert (output == torch.finfo(torch.float32).min).all()
    assert not by_input.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    pytest.importorskip("torchvision")
    input = random_tensor(2, 3, 8, 9).to(dtype)
    grad = random_tensor(len(ROIS), 3, *SIZE, seed=1).to(dtype)
    rois = ROIS.to(dtype)
    wide = _roi_align(input.double(), rois.double(), grad.double(), 2, "avg", True)
    for actual, wanted in zip(_roi_align(input, rois, grad, 2, "avg", True), wide, strict=True):
        assert actual.dtype == dtype
        assert_near(actual, wanted, torch.finfo(dtype).eps)


def test_roi_pool():
    input = random_tensor(2, 3, 8, 9).relu().requires_grad_()  # many pixels are equal
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
    grad = random_tensor(*expected.shape, seed=1)
    (wanted,) = torch.autograd.grad(expected, input, grad)

    output, argmax = torch.ones_like(expected), torch.zeros(expected.shape, dtype=torch.int)
    by_input = torch.zeros_like(input)
    mmcv_ext.roi_pool_forward(input, ROIS, output, argmax, *SIZE, SCALE)
    mmcv_ext.roi_pool_backward(grad, ROIS, argmax, by_input, *SIZE, SCALE)
    assert_near(output, expected)
    assert_near(by_input, wanted)


def test_roi_pool_of_a_region_without_width_is_zero_and_has_no_gradient():
    input, grad = torch.ones(2, 3, 8, 9).double(), torch.ones(2, 3, *SIZE).double()
    rois = torch.tensor([[0, 4.0, 2, 3, 9], [1, 4, 9, 8, 2]], dtype=torch.float64)
    output, by_input = _pooled("roi_pool", input, rois, grad)
    assert not output.any()
    assert not by_input.any()


@pytest.mark.parametrize("name", ["roi_align", "roi_pool"])
def test_the_largest_of_what_is_not_a_number_is_none(name):
    input = random_tensor(2, 3, 8, 9)
    input[0, 1, 4, 3] = math.nan
    output, _ = _pooled(name, input, torch.tensor([[0, 0, 0, 17.0, 15.0]]).double(), torch.ones(1, 3, *SIZE).double())
    assert output[0, 1].isnan().any()
    assert not output[0, [0, 2]].isnan().any()


@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("moved", [True, False])
def test_deform_roi_pool(moved, ratio):
    input = random_tensor(2, 3, 8, 9).requires_grad_()
    offset = random_tensor(len(ROIS), 2, *SIZE, seed=1).requires_grad_() if moved else None
    gamma = 0.7
    expected = _align(input, ROIS, ratio, "avg", offset=offset, gamma=gamma)
    grad = random_tensor(*expected.shape, seed=2)
    wanted = torch.autograd.grad(expected, (input, offset) if moved else (input,), grad)

    offset_or_empty = offset.detach() if moved else input.new_zeros(0)
    output = torch.empty_like(expected)
    grads = torch.zeros_like(input), torch.zeros_like(offset_or_empty)
    mmcv_ext.deform_roi_pool_forward(input, ROIS, offset_or_empty, output, *SIZE, SCALE, ratio, gamma)
    mmcv_ext.deform_roi_pool_backward(grad, input, ROIS, offset_or_empty, *grads, *SIZE, SCALE, ratio, gamma)
    assert_near(output, expected)
    for actual, one in zip(grads, wanted, strict=False):
        assert_near(actual, one)


def test_regions_come_in_steps_that_memory_allows(monkeypatch):
    input, offset = random_tensor(2, 3, 8, 9), random_tensor(len(ROIS), 2, *SIZE, seed=1)
    outputs = []
    for limit in (2**24, 100):
        monkeypatch.setattr(roi, "_MAX_SAMPLES", limit)
        outputs.append(torch.empty(len(ROIS), 3, *SIZE, dtype=torch.float64))
        mmcv_ext.deform_roi_pool_forward(input, ROIS, offset, outputs[-1], *SIZE, SCALE, 2, 0.7)
    assert outputs[0].equal(outputs[1])


@pytest.mark.parametrize("name", ["roi_align", "roi_pool", "deform_roi_pool"])
def test_a_large_region_comes_in_batches_that_memory_allows(monkeypatch, name):
    # Samples on pixels that are equal, and off the map: which of them is the first tells the gradient.
    input = random_tensor(2, 3, 8, 9).relu()
    rois = torch.tensor([[1, -130.0, -155, 70, 145], [0, 1, 1, 201, 301], [1, -190, -295, 10, 5]], dtype=torch.float64)
    grad = random_tensor(3, 3, *SIZE, seed=1)
    # 50 samples for each bin's 50 pixels, down and across: as many as without a ratio, and none of them left out.
    expected = _pooled(name, input, rois, grad, 50)
    monkeypatch.setattr(roi, "_MAX_SAMPLES", 2000)
    with _Largest() as largest:
        actual = _pooled(name, input, rois, grad)
    assert largest.elements <= 4 * 2000  # a pixel number for each of the four around a sample
    for one, wanted in zip(actual, expected, strict=True):
        assert_near(one, wanted, 1e-12)
    if name == "roi_align":  # as many batches as a ratio of the caller's makes
        for one, wanted in zip(_pooled(name, input, rois, grad, 50), expected, strict=True):
            assert one.equal(wanted)


@pytest.mark.parametrize("name", ["roi_align", "roi_pool", "deform_roi_pool"])
def test_of_a_huge_region_what_is_on_the_map_is_sampled(name):
    input = random_tensor(2, 3, 8, 9)
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
    assert_near(output, wanted)
    assert_near(by_input, x.grad)


@pytest.mark.parametrize("image", [2, -1, -0.5, math.nan])
@pytest.mark.parametrize("name", ["roi_align", "roi_align avg", "roi_pool", "deform_roi_pool"])
def test_regions_of_an_image_that_is_not_there(name, image):
    if name == "roi_align avg":
        pytest.importorskip("torchvision")
    input, rois = random_tensor(2, 3, 8, 9), ROIS.clone()
    rois[1, 0] = image
    grad = random_tensor(len(rois), 3, *SIZE)
    expected = f"rois must have .* from 0 to 1 as input has batch size 2, got {image:g} in row 1$"
    with pytest.raises(ValueError, match=expected):
        _roi_align(input, rois, grad, 2, "avg", True) if "avg" in name else _pooled(name, input, rois, grad, 2)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("column", [1, 4])
@pytest.mark.parametrize("name", ["roi_align", "roi_align avg", "roi_pool", "deform_roi_pool"])
def test_regions_that_are_not_finite(name, column, number):
    if name == "roi_align avg":
        pytest.importorskip("torchvision")
    input, rois = random_tensor(2, 3, 8, 9), ROIS.clone()
    rois[1, column] = number
    grad = random_tensor(len(rois), 3, *SIZE)
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
    input, rois, output = random_tensor(2, 3, 8, 9), torch.zeros(0, 5).double(), torch.zeros(0, 3, *SIZE).double()
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
