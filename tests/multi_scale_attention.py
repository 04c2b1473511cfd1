"""Arguments for the kernels of multi_scale_deform_attn, and what they have to give: the reference's results in float64
for the rounded arguments."""

from importlib import import_module
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from backend_cases import TOLERANCES, assert_near, map_tensors, shifted, sliced

from omniops.backends.reference import multi_scale_deform_attn as reference

GRADIENTS = ("by_value", "by_locations", "by_weights")
DISCRETE = pytest.mark.parametrize("discrete", [False, True], ids=["bilinear", "discrete"])


def kernels(backend):
    return import_module(f"omniops.backends.{backend}.multi_scale_deform_attn")


class Case(NamedTuple):
    n: int
    queries: int
    heads: int
    channels: int
    shapes: tuple[tuple[int, int], ...]
    points: tuple[int, ...]
    discrete: bool = False

    @property
    def pixels(self):
        return sum(height * width for height, width in self.shapes)

    @property
    def sizes(self):
        return [side for shape in self.shapes for side in shape]

    def level_sizes(self):
        """(K, 2), for each point width and height of its level."""
        sizes = [(w, h) for (h, w), points in zip(self.shapes, self.points, strict=True) for _ in range(points)]
        return torch.tensor(sizes, dtype=torch.float64).view(-1, 2)


def problem(case, dtype, of_locations=None, of_weights=None, seed=0):
    """The tensors of a case. Samples lie an odd number of eighths from a pixel, before rounding, and up to three pixels
    outside the map: none is so near to a pixel that the last digit of its position would decide on its derivative."""
    generator = torch.Generator().manual_seed(seed)
    queries = (case.n, case.queries, case.heads, sum(case.points))

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    sizes = case.level_sizes()
    eighths = torch.rand((*queries, 2), generator=generator, dtype=torch.float64) * (sizes + 6) * 4
    positions = (2 * eighths.floor() + 1) / 8 - 3
    return SimpleNamespace(
        value=normal(case.n, case.pixels, case.heads, case.channels),
        locations=(positions / sizes.clamp(min=1)).to(of_locations or dtype),
        weights=torch.randn(queries, generator=generator).to(of_weights or dtype),
        grad=normal(case.n, case.queries, case.heads * case.channels),
    )


def forward(module, case, x):
    return module.multi_scale_deform_attn(x.value, case.sizes, x.locations, x.weights, list(case.points), case.discrete)


def backward(module, case, x, output_mask=(True, True, True)):
    return module.multi_scale_deform_attn_backward(
        x.grad, x.value, case.sizes, x.locations, x.weights, list(case.points), case.discrete, list(output_mask)
    )


def results(module, case, x):
    """What both operators of a backend return."""
    return {"out": forward(module, case, x), **dict(zip(GRADIENTS, backward(module, case, x), strict=True))}


def assert_right(module, device, case, tensors, layout=lambda tensor: tensor):
    """Returns the results. Errors are relative to the scale of the result, which leaves out what is not finite: that
    must be the same."""
    tolerance = TOLERANCES[tensors.value.dtype]
    expected = results(reference, case, map_tensors(torch.Tensor.double, tensors))
    found = results(module, case, map_tensors(lambda tensor: layout(tensor.to(device)), tensors))
    like = {"out": tensors.value, "by_value": tensors.value, "by_locations": tensors.locations}
    for name, wanted in expected.items():
        result = found[name]
        assert result.dtype == like.get(name, tensors.weights).dtype, name
        assert result.stride() == torch.empty(wanted.shape, device="meta").stride(), name
        assert_near(name, result, wanted, tolerance)
    return found


def amid_nan(tensor):
    """The same values between so many that are NaN that a kernel which reads a vector beside them meets one."""
    return shifted(tensor, 101)


LAYOUTS = {
    "contiguous": lambda tensor: tensor.contiguous(),
    "amid_nan": amid_nan,
    "sliced": sliced,
    "transposed": lambda tensor: tensor.transpose(1, 2).contiguous().transpose(1, 2),
}

# Levels of different points, one of a single pixel; points that fill no block.
UNEVEN = Case(2, 7, 3, 13, ((6, 7), (3, 5), (1, 1)), (4, 2, 5))
