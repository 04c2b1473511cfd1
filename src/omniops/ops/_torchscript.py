"""What TorchScript compiles where Python reads and checks the arguments of the public functions.

It knows one type for each variable, no ``**arguments``, no names of a module's numbers and no ``super()``. An error
that an operator's own checks raise is left to them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.jit import TracerWarning, script_if_tracing  # type: ignore[attr-defined]
from torch.jit import is_scripting as is_scripting  # type: ignore[attr-defined]
from torch.jit import is_tracing as is_tracing  # type: ignore[attr-defined]

if TYPE_CHECKING:
    Pairs = Sequence[Sequence[int]]
    Numbers = Sequence[int]
else:  # as TorchScript knows them
    Pairs = list[tuple[int, int]]
    Numbers = list[int]


def shape_of(value: Tensor) -> str:
    """The shape as errors have it; TorchScript writes a list."""
    if is_scripting():
        return f"{value.shape}"
    return f"{tuple(value.shape)}"


def sizes(value: Tensor) -> list[int]:
    """The shape as numbers, in a trace too, which keeps them for good: of what no call changes, as a kernel's size."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TracerWarning)
        return [int(size) for size in value.shape]


def pair(number: int | tuple[int, int]) -> list[int]:
    """A number or two as two."""
    if isinstance(number, int):
        return [number, number]
    return [number[0], number[1]]


def padded(
    input: Tensor, weight: Tensor, padding: int | tuple[int, int] | str, stride: list[int], dilation: list[int]
) -> tuple[Tensor, list[int]]:
    """The padding of ``deform_conv2d`` as a number for each axis, and the input with the zeros of one side alone."""
    if not isinstance(padding, str):
        return input, pair(padding)
    if padding != "valid" and padding != "same":
        raise ValueError(f"padding must be 'valid', 'same', an int or two, got '{padding}'")
    if padding == "valid" or weight.dim() != 4:
        return input, [0, 0]
    if stride != [1, 1]:
        raise ValueError(f"stride must be 1 with padding='same', got {stride}")
    height, width = dilation[0] * (weight.shape[2] - 1), dilation[1] * (weight.shape[3] - 1)
    if height % 2 != 0 or width % 2 != 0:
        input = F.pad(input, [0, width % 2, 0, height % 2])
    return input, [height // 2, width // 2]


def convolve(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | tuple[int, int],
    padding: int | tuple[int, int] | str,
    dilation: int | tuple[int, int],
    mask: Tensor | None,
) -> Tensor:
    """``deform_conv2d``, called with two numbers for each."""
    strides, dilations = pair(stride), pair(dilation)
    input, paddings = padded(input, weight, padding, strides, dilations)
    result: Tensor = torch.ops.omniops.deform_conv2d(input, offset, weight, bias, mask, strides, paddings, dilations)
    return result


def check_four_dimensional(name: str, value: Tensor) -> None:
    """Raise ValueError for a tensor that is not (N, C, H, W)."""
    if value.dim() != 4:
        raise ValueError(f"{name} must have 4 dimensions (N, C, H, W), got shape {shape_of(value)}")


def check_area(name: str, area: int) -> None:
    """Raise ValueError for a number of pixels below 1."""
    if area < 1:
        raise ValueError(f"{name} must be at least 1, got {area}")


def check_floating(name: str, value: Tensor) -> None:
    """Raise TypeError for a tensor of no supported floating dtype."""
    if value.dtype not in [torch.float64, torch.float32, torch.float16, torch.bfloat16]:
        raise TypeError(f"{name} must be float64, float32, float16 or bfloat16")


def check_integers(name: str, value: Tensor) -> None:
    """Raise TypeError for a tensor of complex numbers, which no mask is."""
    if value.is_complex():
        raise TypeError(f"{name} must be bool or of an integer dtype of 8 to 64 bits")


def attend(
    value: Tensor,
    spatial_shapes: Tensor | Pairs,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    points_per_level: Numbers | None,
    method: str,
) -> Tensor:
    """``multi_scale_deform_attn``, called with the sizes as numbers, which of a tensor are read at each call."""
    if method != "default" and method != "discrete":
        raise ValueError(f"method must be 'default' or 'discrete', got '{method}'")
    sizes: list[int] = []
    if isinstance(spatial_shapes, Tensor):
        if spatial_shapes.dim() != 2 or spatial_shapes.shape[1] != 2:
            raise ValueError(f"spatial_shapes must have shape (L, 2), got {shape_of(spatial_shapes)}")
        if spatial_shapes.is_floating_point() or spatial_shapes.is_complex() or spatial_shapes.dtype == torch.bool:
            raise TypeError("spatial_shapes must be of integers")
        numbers: list[int] = spatial_shapes.to(torch.int64).flatten().tolist()
        sizes = numbers
    else:
        for height, width in spatial_shapes:
            sizes += [height, width]
    levels = len(sizes) // 2
    if points_per_level is not None:
        points: Numbers = points_per_level
    elif attention_weights.dim() == 5 and attention_weights.shape[3] == levels:
        points = [attention_weights.shape[4]] * levels
    else:
        raise ValueError(
            f"attention_weights must have shape (N, Q, M, L, P) with the {levels} levels of spatial_shapes, or "
            f"points_per_level be given, got {shape_of(attention_weights)}"
        )
    result: Tensor = torch.ops.omniops.multi_scale_deform_attn(
        value, sizes, sampling_locations, attention_weights, points, method == "discrete"
    )
    return result


def traced_sizes(spatial_shapes: Tensor | Pairs) -> Tensor:
    """(L, 2), in which a trace follows the sizes that were those of traced tensors, and so are tensors themselves."""
    if isinstance(spatial_shapes, Tensor):
        return spatial_shapes
    sides = [side for pair in spatial_shapes for side in pair]
    # Not torch.tensor, of which a trace warns that it is a constant.
    return torch.cat([torch.full((1,), side, dtype=torch.int64) for side in sides]).view(-1, 2)


_attend_if_tracing: Callable[..., Tensor] = script_if_tracing(attend)


def attend_traced(
    value: Tensor,
    spatial_shapes: Tensor | Pairs,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    points_per_level: Numbers | None,
    method: str,
) -> Tensor:
    """As ``attend`` is compiled, in a trace, which would keep the numbers that it sees for good."""
    sizes_of_levels = traced_sizes(spatial_shapes)
    return _attend_if_tracing(value, sizes_of_levels, sampling_locations, attention_weights, points_per_level, method)
