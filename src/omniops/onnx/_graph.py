"""What the translations share: operators, and sizes that may be known only when the file runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnxscript
from onnxscript import ir

# Their annotations know neither numbers nor lists, which become constants.
op: Any = onnxscript.opset18
opset19: Any = onnxscript.opset19

END = 2**63 - 1
"""What Slice takes for the end of an axis."""

_ACCUMULATORS = {ir.DataType.FLOAT16: ir.DataType.FLOAT, ir.DataType.BFLOAT16: ir.DataType.FLOAT}


def accumulated(argument: Any) -> Any:
    """An argument in the dtype of sums: float16 and bfloat16 in float32."""
    dtype = _ACCUMULATORS.get(argument.dtype)
    return argument if dtype is None else op.Cast(argument, to=dtype)


def finish(result: Any, like: Any) -> Any:
    """What was summed in the dtype of an argument."""
    return op.Cast(result, to=like.dtype) if like.dtype in _ACCUMULATORS else result


def number(value: float, like: Any) -> Any:
    """A number in the dtype of what was computed."""
    return op.CastLike(op.Constant(value_float=float(value)), like)


def size(argument: Any, axis: int) -> Any:
    """The size of an axis: a number, or a vector of one element where it is dynamic."""
    known = argument.shape[axis]
    return known if isinstance(known, int) else op.Shape(argument, start=axis, end=axis + 1)


def known_size(name: str, argument: Any, axis: int) -> int:
    """The size of an axis by which the graph is made; ValueError where it is dynamic."""
    known = argument.shape[axis]
    if not isinstance(known, int):
        raise ValueError(f"{name} must have a fixed size of axis {axis} in ONNX, got the dynamic {known}")
    return known


def ints(values: Sequence[Any]) -> Any:
    """Numbers, and values of one integer, as one vector."""
    if all(isinstance(value, int) for value in values):
        return op.Constant(value_ints=list(values))
    vectors = [op.Constant(value_ints=[v]) if isinstance(v, int) else op.Reshape(v, [-1]) for v in values]
    return op.Concat(*vectors, axis=0) if len(vectors) > 1 else vectors[0]


def sum_of(a: Any, b: Any) -> Any:
    """Of two numbers, or values of one integer."""
    return a + b if isinstance(a, int) and isinstance(b, int) else op.Add(ints([a]), ints([b]))


def product_of(a: Any, b: Any) -> Any:
    """Of two numbers, or values of one integer."""
    return a * b if isinstance(a, int) and isinstance(b, int) else op.Mul(ints([a]), ints([b]))


def quotient_of(a: Any, b: int) -> Any:
    """Of a number, or a value of one integer, rounded down; neither is negative."""
    return a // b if isinstance(a, int) else op.Div(ints([a]), ints([b]))


def grid_sample(maps: Any, grid: Any) -> Any:
    """Samples of maps, (B, C, H, W), at positions, (B, Y, X, 2), where -1 and 1 are the edges: (B, C, Y, X)."""
    # What is clipped lies outside of the map all the same; infinite positions become finite.
    clipped = op.Clip(grid, number(-3, grid), number(3, grid))
    return op.GridSample(maps, clipped, align_corners=0, mode="bilinear", padding_mode="zeros")
