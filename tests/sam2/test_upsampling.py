"""Guided upsampling against the formula pixel by pixel, on edges that it should follow, and with wrong arguments."""

from __future__ import annotations

import itertools
import math
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from omniops.sam2 import upsampling
from omniops.sam2.upsampling import guided


def formula(logits, guide, size, k, sigma_space, sigma_colour):
    """Pixel by pixel, from the module's description."""
    (b, m, h, w), (height, width) = logits.shape, size
    s = max(math.ceil(height / h), math.ceil(width / w))

    def middle_in(count, of):
        return [math.floor((i + 0.5) / count * of) for i in range(count)]

    of_rows, of_columns = middle_in(h * s, guide.shape[2]), middle_in(w * s, guide.shape[3])
    colours = guide[:, :, of_rows][..., of_columns]
    means = F.avg_pool2d(colours, s)
    result = logits.new_zeros((b, m, height, width))
    for n, (i, row), (j, column) in itertools.product(
        range(b), enumerate(middle_in(height, h * s)), enumerate(middle_in(width, w * s))
    ):
        y, x = (i + 0.5) * h / height - 0.5, (j + 0.5) * w / width - 0.5
        picture = n if len(guide) > 1 else 0
        total = 0.0
        for u, v in itertools.product(range(-(k // 2), k // 2 + 1), repeat=2):
            near_y, near_x = row // s + u, column // s + v
            if not (0 <= near_y < h and 0 <= near_x < w):
                continue
            difference = colours[picture, :, row, column] - means[picture, :, near_y, near_x]
            weight = math.exp(
                -((y - near_y) ** 2 + (x - near_x) ** 2) / (2 * sigma_space**2)
                - difference.pow(2).sum().item() / (2 * sigma_colour**2)
            )
            total += weight
            result[n, :, i, j] += weight * logits[n, :, near_y, near_x]
        result[n, :, i, j] /= total
    return result


SIZES = {
    "no whole number": ((5, 6), (11, 13), None),
    "a whole number": ((4, 3), (16, 12), None),
    "wide": ((5, 4), (3, 18), None),
    "high": ((3, 7), (19, 9), None),
    "smaller": ((5, 5), (3, 4), None),
    "as large": ((4, 5), (4, 5), None),
    "a pixel": ((3, 3), (1, 1), None),
    "from a pixel": ((1, 1), (3, 5), None),
    "a larger guide": ((4, 4), (9, 10), (21, 17)),
    "a smaller guide": ((4, 4), (9, 10), (5, 3)),
}


@pytest.mark.parametrize("strip", [1, 2**25])
@pytest.mark.parametrize("case", SIZES)
def test_formula(case, strip, monkeypatch):
    """In one strip, and in as many as can be."""
    monkeypatch.setattr(upsampling, "STRIP_BYTES", strip)
    low, size, of_guide = SIZES[case]
    torch.manual_seed(0)
    logits = torch.randn(2, 3, *low, dtype=torch.float64)
    for guides, channels, k in ((1, 3, 3), (2, 1, 5)):
        guide = torch.rand(guides, channels, *(of_guide or size), dtype=torch.float64)
        expected = formula(logits, guide, size, k, 0.7, 0.2)
        assert_close(guided(logits, guide, size, kernel_size=k, sigma_space=0.7, sigma_colour=0.2), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(dtype):
    torch.manual_seed(0)
    logits, guide = torch.randn(1, 2, 6, 7).to(dtype), torch.rand(1, 3, 20, 23).to(dtype)
    found = guided(logits, guide, (20, 23))
    assert found.dtype == dtype
    expected = guided(logits.double(), guide.double(), (20, 23))
    scale = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    assert_close(found.double(), expected, rtol=0, atol=scale * expected.abs().max().item())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(guided(logits, guide, (20, 23)), found)


def test_guide_of_one_colour_makes_a_gaussian_blur():
    """The same as no regard for colours; the weights of a pixel are those of the two axes, multiplied."""
    torch.manual_seed(0)
    logits = torch.randn(1, 1, 6, 5, dtype=torch.float64)
    found = guided(logits, torch.full((1, 3, 24, 20), 0.3), (24, 20), kernel_size=3, sigma_space=0.9)
    blurred = guided(logits, torch.rand(1, 3, 24, 20), (24, 20), kernel_size=3, sigma_space=0.9, sigma_colour=math.inf)
    assert_close(found, blurred)

    def axis(low):
        position = (torch.arange(low * 4, dtype=torch.float64) + 0.5) / 4 - 0.5
        away = position[:, None] - torch.arange(low)
        centre = torch.arange(low * 4)[:, None] // 4 - torch.arange(low)
        weights = torch.exp(-(away**2) / (2 * 0.9**2)) * (centre.abs() <= 1)
        return weights / weights.sum(1, keepdim=True)

    assert_close(found[0, 0], axis(6) @ logits[0, 0] @ axis(5).T)


def test_one_value_stays():
    """The weights of each pixel add up to 1, at the borders too, and however different the colours."""
    guide = torch.rand(1, 3, 37, 50, generator=torch.Generator().manual_seed(0)) * 1e3
    assert_close(guided(torch.full((1, 1, 8, 9), -3.5), guide, (37, 50)), torch.full((1, 1, 37, 50), -3.5))


def test_edges_of_the_guide_are_followed():
    """A disc of one colour on another, its logits from the exact mask: bilinear gets 0.94 of the border, guided all."""
    y, x = torch.meshgrid(torch.arange(192), torch.arange(256), indexing="ij")
    away = ((x - 120) ** 2 + (y - 90) ** 2).float().sqrt()
    mask = away < 60.3
    guide = torch.where(
        mask, torch.tensor([0.8, 0.3, 0.2])[:, None, None], torch.tensor([0.2, 0.3, 0.6])[:, None, None]
    )
    logits = F.avg_pool2d(mask[None, None].float(), 8).clamp(0.01, 0.99).logit()
    near = (away - 60.3).abs() < 4

    def iou(found):
        return (((found[0, 0] > 0) & mask & near).sum() / (((found[0, 0] > 0) | mask) & near).sum()).item()

    bilinear = iou(F.interpolate(logits, (192, 256), mode="bilinear"))
    blurred = iou(guided(logits, guide[None], (192, 256), sigma_colour=math.inf))
    found = iou(guided(logits, guide[None], (192, 256)))
    assert bilinear < 0.95
    assert found > max(bilinear, blurred) + 0.05


def test_masks_share_the_kernels(monkeypatch):
    """As channels, so that one mask more costs no kernels more; the result is that of one alone."""
    torch.manual_seed(0)
    logits, guide = torch.randn(4, 3, 8, 8), torch.rand(1, 3, 30, 30)
    calls = []
    carafe = upsampling.carafe
    monkeypatch.setattr(upsampling, "carafe", lambda *args: calls.append(args) or carafe(*args))
    found = guided(logits, guide, (30, 30))
    assert [(features.shape, kernels.shape) for features, kernels, *_ in calls] == [((1, 12, 8, 8), (1, 25, 32, 32))]
    for i, j in itertools.product(range(4), range(3)):
        assert_close(found[i, j], guided(logits[i : i + 1, j : j + 1], guide, (30, 30))[0, 0])


class Memory(TorchDispatchMode):
    """The peak of the bytes that tensors took within it."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in filter(torch.is_tensor, result if isinstance(result, (list, tuple)) else [result]):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.alive:
                self.alive[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, storage._cdata)
        self.peak = max(self.peak, sum(self.alive.values()))
        return result


@pytest.mark.parametrize("masks", [1, 40])
def test_memory_is_bounded(monkeypatch, masks):
    """By strips of all that grows with them: the kernels of the whole would take more."""
    logits, guide = torch.randn(masks, 1, 64, 64), torch.rand(1, 3, 256, 256)
    strip, kernels, result = 2**20, 25 * 256 * 256 * 4, masks * 256 * 256 * 4
    monkeypatch.setattr(upsampling, "STRIP_BYTES", strip)
    with Memory() as memory:
        guided(logits, guide, (256, 256))
    # The result and the strips that it is made of, the means of the guide, and a strip.
    assert 2 * result < memory.peak < 2 * result + 3 * strip < kernels + 2 * result


def test_gradient_reaches_the_logits():
    torch.manual_seed(0)
    logits = torch.randn(2, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    guide = torch.rand(2, 3, 7, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: guided(x, guide, (7, 9), kernel_size=3), logits)
    guided(logits, guide, (7, 9)).sum().backward()
    assert_close(logits.grad.sum(), torch.tensor(2.0 * 2 * 7 * 9, dtype=torch.float64))  # the weights of a pixel are 1
    assert guide.grad is None


def test_nothing_to_upsample():
    assert guided(torch.zeros(0, 2, 4, 4), torch.rand(1, 3, 9, 9), (9, 9)).shape == (0, 2, 9, 9)
    assert guided(torch.zeros(2, 0, 4, 4), torch.rand(2, 3, 9, 9), (9, 9)).shape == (2, 0, 9, 9)


@pytest.mark.parametrize("kind", [np.int64, np.uint8, np.array, torch.tensor])
def test_sizes_may_be_numpys_integers(kind):
    """Also those of 8 bits, in which the numbers that follow from them have no place."""
    logits, guide = torch.randn(1, 2, 4, 5), torch.rand(1, 3, 16, 20)
    found = guided(logits, guide, (kind(17), kind(200)), kernel_size=kind(3))
    assert torch.equal(found, guided(logits, guide, (17, 200), kernel_size=3))


LOGITS, GUIDE = torch.zeros(2, 1, 4, 4), torch.zeros(1, 3, 8, 8)
BAD = {
    "a list": ({"logits": [1.0]}, TypeError, "logits must be a torch.Tensor, got list"),
    "no batch": (
        {"logits": LOGITS[0]},
        ValueError,
        r"logits must have 4 dimensions .* got shape \(1, 4, 4\)",
    ),
    "no picture": ({"guide": GUIDE[0]}, ValueError, "guide must have 4 dimensions"),
    "a mask": ({"logits": LOGITS > 0}, TypeError, "logits must be float64, .* got bool"),
    "bytes": ({"guide": GUIDE.byte()}, TypeError, "guide must be float64, .* got uint8"),
    "a device": (
        {"guide": GUIDE.to("meta")},
        ValueError,
        "guide must be on the device of logits, cpu, got meta",
    ),
    "pictures": ({"guide": GUIDE.expand(3, -1, -1, -1)}, ValueError, r"with B = 2 of logits, got \(3, 3, 8, 8\)"),
    "no pixels": ({"guide": GUIDE[..., :0]}, ValueError, r"guide must be .* got \(1, 3, 8, 0\)"),
    "no map": ({"logits": LOGITS[..., :0]}, ValueError, r"logits must not be empty maps, got \(2, 1, 4, 0\)"),
    "a number": ({"size": 8}, TypeError, r"size must be \(height, width\), got 8"),
    "three numbers": ({"size": (1, 8, 8)}, TypeError, r"size must be \(height, width\), got \(1, 8, 8\)"),
    "no height": ({"size": (0, 8)}, ValueError, "height must be at least 1, got 0"),
    "an even kernel": ({"kernel_size": 4}, ValueError, "kernel_size must be odd, got 4"),
    "half a kernel": ({"kernel_size": 2.5}, TypeError, "kernel_size must be an int, got float"),
    "no space": ({"sigma_space": 0}, ValueError, "sigma_space must be above 0, got 0"),
    "a NaN": ({"sigma_colour": math.nan}, ValueError, "sigma_colour must be above 0, got nan"),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_arguments(case):
    arguments, error, message = BAD[case]
    with pytest.raises(error, match=message):
        guided(**{"logits": LOGITS, "guide": GUIDE, "size": (8, 8), **arguments})
