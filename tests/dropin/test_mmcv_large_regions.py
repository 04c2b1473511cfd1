"""RoIAlign's average of large regions on the CPU: torchvision's results, and memory that the area does not make."""

import itertools
import subprocess
import sys

import pytest
import torch
from torch import Tensor

pytest.importorskip("torchvision", reason="torchvision is not installed", exc_type=ImportError)

from dropin.mmcv_inputs import random_tensor
from torchvision.ops import roi_align

from omniops.dropin import mmcv_ext
from omniops.dropin.mmcv_ext import _large_regions

SIZE = (3, 2)
# The image, and x1, y1, x2, y2: among them regions off the map, of little width, and of negative width.
ROIS = torch.tensor(
    [
        [0, 1, 2, 300, 500],
        [1, -700, -90, 400.5, 300],
        [0, 3, 4, 7, 9],
        [1, 500, 400, 900, 800],
        [0, -5000, 3, 5000, 5],
        [1, 4, -2000, 4.5, 3000],
        [0, 300, 10, 100, 400],
        [1, 2.25, 1.5, 42.75, 33.125],
    ],
    dtype=torch.float64,
)


def _forward_backward(input: Tensor, rois: Tensor, grad: Tensor, aligned: bool = True, scale: float = 0.5):
    output, by_input = torch.full_like(grad, torch.nan), torch.full_like(input, torch.nan)
    numbers = (*grad.shape[2:], scale, 0, 1, aligned)
    mmcv_ext.roi_align_forward(input, rois, output, input.new_zeros(0), input.new_zeros(0), *numbers)
    mmcv_ext.roi_align_backward(grad, rois, input.new_zeros(0), input.new_zeros(0), by_input, *numbers)
    return output, by_input


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("many", [1, 2000, 2**16])
def test_the_results_are_torchvisions(monkeypatch, many, aligned):
    monkeypatch.setattr(_large_regions, "MANY_SAMPLES", many)
    input, grad = random_tensor(2, 3, 18, 23).requires_grad_(), random_tensor(len(ROIS), 3, *SIZE, seed=1)
    if aligned:  # torchvision's kernel raises RuntimeError for the region of negative width, which has no samples
        kept = [k for k in range(len(ROIS)) if k != 6]
        expected = torch.zeros_like(grad)
        expected[kept] = roi_align(input, ROIS[kept], SIZE, 0.5, 0, aligned)
    else:
        expected = roi_align(input, ROIS, SIZE, 0.5, 0, aligned)
    (by_input,) = torch.autograd.grad(expected, input, grad)
    found = _forward_backward(input.detach(), ROIS, grad, aligned)
    for actual, wanted in zip(found, (expected.detach(), by_input), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_precision(dtype, tolerance):
    input, grad = random_tensor(2, 3, 18, 23).to(dtype), random_tensor(len(ROIS), 3, *SIZE, seed=1).to(dtype)
    rois = ROIS.to(dtype)
    expected = _forward_backward(input.double(), rois.double(), grad.double())
    for actual, wanted in zip(_forward_backward(input, rois, grad), expected, strict=True):
        assert actual.dtype == dtype
        assert (actual - wanted).abs().max() <= tolerance * wanted.abs().max()


def test_numbers_that_are_not_finite_stay_in_their_bins(monkeypatch):
    monkeypatch.setattr(_large_regions, "MANY_SAMPLES", 1)
    input, rois = torch.ones(1, 1, 12, 12).double(), torch.tensor([[0, 0.5, 0.5, 24.5, 24.5]], dtype=torch.float64)
    input[0, 0, 1, 1], input[0, 0, 1, 10] = torch.nan, torch.inf
    output, _ = _forward_backward(input, rois, torch.ones(1, 1, 4, 4).double())
    assert output[0, 0].isnan().nonzero().tolist() == [[0, 0]]
    assert output[0, 0].isinf().nonzero().tolist() == [[0, 3]]
    grad = torch.ones(1, 1, 4, 4).double()
    grad[0, 0, 3, 0] = torch.nan
    _, by_input = _forward_backward(torch.ones_like(input), rois, grad)
    rows, columns = by_input[0, 0].isnan().nonzero(as_tuple=True)
    assert rows.min() >= 8
    assert columns.max() <= 3


def test_a_region_of_a_million_pixels_is_sampled_where_the_map_is():
    input = random_tensor(1, 2, 8, 9)
    rois = torch.tensor([[0, -1e6, -1e6, 1e6, 1e6]], dtype=torch.float64)
    output, by_input = _forward_backward(input, rois, torch.ones(1, 2, 1, 1).double(), scale=1.0)
    # Each pixel inside has a sample's weight, and those of the border the pixel outside of them, too.
    weights = torch.ones(8, 9).double()
    for line in (weights[0], weights[-1], weights[:, 0], weights[:, -1]):
        line *= 2
    torch.testing.assert_close(output[0, :, 0, 0] * 4e12, (input[0] * weights).sum((1, 2)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(by_input[0] * 4e12, weights.expand(2, -1, -1), rtol=1e-5, atol=1e-5)


MEASURE = """
import resource, torch
from omniops.dropin import mmcv_ext
input = torch.randn(1, 4, 250, 250)
side, numbers = float({side}), (7, 7, 1.0, 0, 1, True)
none, by_input = torch.zeros(0), torch.zeros_like(input)
for extent in (30.0, side):  # the first loads what is loaded once
    rois, output = torch.tensor([[0, 0, 0, extent, extent]] * 3), torch.zeros(3, 4, 7, 7)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    mmcv_ext.roi_align_forward(input, rois, output, none, none, *numbers)
    mmcv_ext.roi_align_backward(torch.ones_like(output), rois, none, none, by_input, *numbers)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(after - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux alone")
@pytest.mark.parametrize("side", [200, 4000, 100_000])
def test_peak_memory(side):
    done = subprocess.run([sys.executable, "-c", MEASURE.format(side=side)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 16 * 1024  # KiB


def test_gradcheck(monkeypatch):
    monkeypatch.setattr(_large_regions, "MANY_SAMPLES", 1)
    input, grad = random_tensor(2, 2, 6, 5), random_tensor(len(ROIS), 2, *SIZE, seed=1)
    rois = ROIS / 20
    rois[:, 0] = ROIS[:, 0]
    _, by_input = _forward_backward(input, rois, grad)
    # The average is linear in its input, so that a difference of any length is its derivative.
    for index in itertools.islice(itertools.product(range(2), range(2), range(6), range(5)), 0, None, 7):
        moved = input.clone()
        moved[index] += 1
        change = (_forward_backward(moved, rois, grad)[0] - _forward_backward(input, rois, grad)[0]) * grad
        torch.testing.assert_close(change.sum(), by_input[index], rtol=1e-9, atol=1e-9)
