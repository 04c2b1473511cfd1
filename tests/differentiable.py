"""The operators that have derivatives in small problems, for tests of what PyTorch does with any of them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import omniops
from omniops.backends.reference import carafe as reference_carafe
from omniops.backends.reference import deform_conv2d as reference_deform_conv2d
from omniops.backends.reference import multi_scale_deform_attn as reference_multi_scale_deform_attn

DEVICES = [
    "cpu",
    *(["cuda"] if torch.cuda.is_available() else []),
    *(["mps"] if torch.backends.mps.is_available() else []),
]


@dataclass
class Problem:
    """An operator with all its tensors, which are leaves, and a cotangent of its result."""

    name: str
    function: Callable[..., Tensor]
    """Of the tensors alone."""
    oracle: Callable[..., Tensor]
    tensors: list[Tensor]
    grad: Tensor
    flops: int
    """Of a call, in what the operator itself is defined by."""

    def to(self, *args: Any, **kwargs: Any) -> "Problem":
        """With the tensors on another device, of another dtype or in another layout."""

        def moved(x: Tensor) -> Tensor:
            if "memory_format" in kwargs and x.dim() != 4:
                return x.detach().clone()
            return x.detach().to(*args, **kwargs)

        leaves = [moved(x).requires_grad_() for x in self.tensors]
        return Problem(self.name, self.function, self.oracle, leaves, moved(self.grad), self.flops)

    def gradients(self, function: Callable[..., Tensor] | None = None) -> list[Tensor]:
        """The result of a function, or of the operator's, and by each tensor what its product with grad changes."""
        result = (function or self.function)(*self.tensors)
        return [result.detach(), *torch.autograd.grad(result, self.tensors, self.grad)]

    def expected(self) -> list[Tensor]:
        """``gradients`` of the oracle in float64."""
        wide = self.to("cpu", torch.float64)
        return wide.gradients(self.oracle)


def carafe(dtype: torch.dtype = torch.float32) -> Problem:
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 4, 3, 5), (2, 18, 6, 10), (2, 4, 6, 10)
    *tensors, grad = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
    return Problem(
        "carafe",
        lambda features, masks: omniops.carafe(features, masks, 3, 2, 2),
        lambda features, masks: reference_carafe.carafe(features, masks, 3, 2, 2, 1),
        [x.requires_grad_() for x in tensors],
        grad,
        2 * grad.numel() * 9,
    )


def deform_conv2d(dtype: torch.dtype = torch.float32) -> Problem:
    """Offsets are odd sixteenths, so that no sample lies on a pixel, where there is no derivative."""
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 4, 5, 6), (2, 24, 2, 6), (6, 2, 3, 2), (6,), (2, 12, 2, 6), (2, 6, 2, 6)
    *tensors, grad = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
    tensors[1] = (2 * torch.randint(-24, 24, shapes[1], generator=generator) + 1).to(dtype) / 16
    numbers = (2, 1), (0, 1), (1, 2)
    return Problem(
        "deform_conv2d",
        lambda input, offset, weight, bias, mask: omniops.deform_conv2d(input, offset, weight, bias, *numbers, mask),
        lambda *tensors: reference_deform_conv2d.deform_conv2d(*tensors, *numbers),
        [x.requires_grad_() for x in tensors],
        grad,
        2 * grad.numel() * 2 * 3 * 2,
    )


def multi_scale_deform_attn(dtype: torch.dtype = torch.float32) -> Problem:
    """Locations are between the pixels of both levels, some outside of the map."""
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 26, 2, 4), (2, 3, 2, 2, 2, 2), (2, 3, 2, 2, 2), (2, 3, 8)
    *tensors, grad = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
    positions = torch.randint(-3, 27, shapes[1], generator=generator).to(dtype)
    tensors[1] = (positions + 0.5) / 24
    sizes = (4, 5), (3, 2)

    def oracle(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return reference_multi_scale_deform_attn.multi_scale_deform_attn(
            value, [4, 5, 3, 2], locations.flatten(3, 4), weights.flatten(3, 4), [2, 2], False
        )

    return Problem(
        "multi_scale_deform_attn",
        lambda value, *points: omniops.multi_scale_deform_attn(value, sizes, *points),
        oracle,
        [x.requires_grad_() for x in tensors],
        grad,
        2 * grad.numel() * 4,
    )


PROBLEMS = (carafe, deform_conv2d, multi_scale_deform_attn)
NODES = {
    "carafe": "CARAFEFunctionBackward",
    "deform_conv2d": "DeformConv2dFunctionBackward",
    "multi_scale_deform_attn": "MultiScaleDeformableAttnFunctionBackward",
}


def assert_close(found: Iterable[Tensor], expected: Iterable[Tensor]) -> None:
    """To 1e-5 of the largest number."""
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert (one.detach().cpu().double() - other.detach().cpu().double()).abs().max() <= 1e-5 * other.abs().max()


def assert_same(found: Iterable[Tensor], expected: Iterable[Tensor]) -> None:
    """Bit for bit, but on GPUs, which may add the gradients of a pixel in any order."""
    for one, other in zip(found, expected, strict=True):
        if one.is_cpu:
            assert torch.equal(one, other)
        else:
            assert_close([one], [other])
