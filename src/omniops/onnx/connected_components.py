"""Connected components in ONNX: a ``Loop``, as the number of steps depends on the mask.

Every pixel points to a pixel of its component that does not come after it, at first to itself. A step points each
pixel, and the one that it points to, to the first that its neighbours point to, and then halves the distances twice.
When nothing changes all neighbours point to the same pixel, which points to itself: the first of the component. (As in
FastSV, arXiv:1910.05971; a spiral that fills 512 x 512 pixels takes 10 steps.)
"""

from __future__ import annotations

from typing import Any

from onnxscript import BOOL, INT64, ir, script

from omniops.onnx._graph import op


def connected_components(mask: Any, connectivity: int) -> Any:
    """(N, 1, H, W) -> labels and counts, (N, 1, H, W), int32."""
    foreground = op.Cast(mask, to=ir.DataType.BOOL)
    shape = op.Shape(mask)
    flat = op.Reshape(foreground, [-1])
    index = op.Range(0, op.Squeeze(op.Size(mask)), 1)
    first = _first_of_component(index, shape, foreground, op.Cast(int(connectivity == 8), to=ir.DataType.BOOL))
    pixels = op.Cast(flat, to=ir.DataType.INT64)
    areas = op.ScatterElements(op.Mul(index, 0), first, pixels, axis=0, reduction="add")
    of_map = op.Mul(op.Shape(mask, start=2, end=3), op.Shape(mask, start=3, end=4))
    labels = op.Mul(op.Add(op.Mod(first, of_map), 1), pixels)
    counts = op.Mul(op.Gather(areas, first), pixels)
    return tuple(op.Cast(op.Reshape(result, shape), to=ir.DataType.INT32) for result in (labels, counts))


Integers: Any = INT64[...]  # type: ignore[misc]
Bools: Any = BOOL[...]  # type: ignore[misc]
"""Tensors of any number of axes; without the dots they are scalars."""


@script(default_opset=op)
def _first_of_component(index: Integers, shape: Integers, inside: Bools, corners: Bools) -> Integers:
    """For each pixel of (N, 1, H, W), flattened, the first one of its component, for one of the background itself."""
    outside = op.Size(inside)
    everywhere = op.Reshape(inside, op.Constant(value_ints=[-1]))
    pointer = op.Identity(index)
    changed = op.Greater(outside, 0)
    while changed:
        pointers = op.Where(inside, op.Reshape(pointer, shape), outside)
        padded = op.Pad(pointers, op.Constant(value_ints=[0, 0, 0, 1, 0, 0, 0, 1]), outside)
        left = op.Slice(padded, op.Constant(value_ints=[0]), op.Constant(value_ints=[-2]), op.Constant(value_ints=[3]))
        right = op.Slice(padded, op.Constant(value_ints=[2]), op.Shape(padded, start=3), op.Constant(value_ints=[3]))
        beside = op.Min(left, pointers, right)
        # With the corners a pixel above or below stands for its own neighbours too.
        padded = op.Pad(op.Where(corners, beside, pointers), op.Constant(value_ints=[0, 0, 1, 0, 0, 0, 1, 0]), outside)
        above = op.Slice(padded, op.Constant(value_ints=[0]), op.Constant(value_ints=[-2]), op.Constant(value_ints=[2]))
        below = op.Slice(
            padded, op.Constant(value_ints=[2]), op.Shape(padded, start=2, end=3), op.Constant(value_ints=[2])
        )
        earliest = op.Reshape(op.Min(above, beside, below), op.Constant(value_ints=[-1]))
        earliest = op.Where(everywhere, earliest, pointer)
        moved = op.Min(op.ScatterElements(pointer, pointer, earliest, axis=0, reduction="min"), earliest)
        moved = op.Gather(moved, moved)
        moved = op.Gather(moved, moved)
        changed = op.Not(op.Equal(op.ReduceSum(op.Sub(pointer, moved)), 0))
        pointer = op.Identity(moved)
    return pointer
