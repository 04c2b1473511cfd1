"""Deformable convolution in ONNX: ``DeformConv``, and ``GridSample`` for opset 18, which comes before it.

``omniops.ops.deform_conv2d`` has the formula. The letters are N batch, D offset groups, G weight groups, K taps and P
positions of the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

from onnxscript import evaluator

from omniops._torch_private import opset_of
from omniops.onnx._graph import (
    accumulated,
    finish,
    grid_sample,
    ints,
    known_size,
    number,
    op,
    opset19,
    product_of,
    size,
)

_OPSETS = range(19, 26)
"""Those with ``DeformConv``, up to the newest that onnxscript converts to: of a newer one PyTorch makes 18."""


def deform_conv2d(
    input: Any,
    offset: Any,
    weight: Any,
    bias: Any,
    mask: Any,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Any:
    """(N, C, H, W) -> (N, C_out, H_out, W_out)."""
    if opset_of(evaluator.default()) not in _OPSETS:
        return _by_grid_sample(input, offset, weight, bias, mask, stride, padding, dilation)
    kernel_size = [known_size("weight", weight, axis) for axis in (2, 3)]
    result = opset19.DeformConv(
        accumulated(input),
        accumulated(weight),
        accumulated(offset),
        None if bias is None else accumulated(bias),
        None if mask is None else accumulated(mask),
        dilations=list(dilation),
        group=known_size("input", input, 1) // known_size("weight", weight, 1),
        kernel_shape=kernel_size,
        offset_group=known_size("offset", offset, 1) // (2 * kernel_size[0] * kernel_size[1]),
        pads=[*padding, *padding],
        strides=list(stride),
    )
    return finish(result, input)


def _by_grid_sample(
    input: Any,
    offset: Any,
    weight: Any,
    bias: Any,
    mask: Any,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Any:
    c = known_size("input", input, 1)
    c_out, per_group, *kernel_size = (known_size("weight", weight, axis) for axis in range(4))
    taps = kernel_size[0] * kernel_size[1]
    d, g = known_size("offset", offset, 1) // (2 * taps), c // per_group
    positions = product_of(size(offset, 2), size(offset, 3))
    grid = _grid(input, offset, kernel_size, stride, padding, dilation)
    maps = op.Reshape(accumulated(input), ints([-1, c // d, size(input, 2), size(input, 3)]))
    columns = grid_sample(maps, grid)
    if mask is not None:
        columns = op.Mul(columns, op.Reshape(accumulated(mask), ints([-1, 1, taps, positions])))
    columns = op.Reshape(columns, ints([-1, g, per_group * taps, positions]))
    kernels = op.Reshape(accumulated(weight), ints([g, c_out // g, per_group * taps]))
    out = op.Reshape(op.MatMul(kernels, columns), ints([-1, c_out, size(offset, 2), size(offset, 3)]))
    if bias is not None:
        out = op.Add(out, op.Reshape(accumulated(bias), ints([1, c_out, 1, 1])))
    return finish(out, input)


def _grid(
    input: Any,
    offset: Any,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Any:
    """(N*D, K, P, 2), x and y from -1 to 1 between the edges of the map."""
    taps = kernel_size[0] * kernel_size[1]
    moves = op.Reshape(accumulated(offset), ints([-1, taps, 2, size(offset, 2), size(offset, 3)]))
    coordinates = []
    for axis in (1, 0):
        position = op.Gather(moves, axis, axis=2)
        starts = op.Mul(op.Range(0, _scalar(size(offset, 2 + axis)), 1), stride[axis])
        starts = op.Reshape(starts, [-1, 1] if axis == 0 else [1, -1])
        indices = product(range(kernel_size[0]), range(kernel_size[1]))
        of_tap = op.Constant(value_ints=[index[axis] * dilation[axis] - padding[axis] for index in indices])
        fixed = op.Add(starts, op.Reshape(of_tap, [taps, 1, 1]))
        position = op.Add(position, op.CastLike(fixed, position))
        doubled = op.Add(op.Mul(position, number(2, position)), number(1, position))
        extent = op.CastLike(_scalar(size(input, 2 + axis)), position)
        coordinates.append(op.Unsqueeze(op.Sub(op.Div(doubled, extent), number(1, position)), [-1]))
    return op.Reshape(op.Concat(*coordinates, axis=-1), [0, 0, -1, 2])


def _scalar(number: Any) -> Any:
    return number if isinstance(number, int) else op.Squeeze(number)
