# mypy: ignore-errors
# (Triton's language, not Python's)
"""Multi-scale deformable attention in Triton: what the kernels share, the levels and where the samples lie.

Names: N batch, S pixels of all levels, Q queries, M heads, D channels of a head, L levels, K points of all levels. All
tensors are contiguous: value (N, S, M, D), locations (N, Q, M, K, 2), weights (N, Q, M, K), out and grad (N, Q, M * D).
A *row* is a query's head, (n * Q + q) * M + m. ``POINTS`` are the points of each level, 16 bits for one.

A kernel knows up to eight levels by their heights and widths as numbers. These, Q and S are not specialised, so that no
map of another size is compiled for.

Positions are computed once more in each thread that holds channels of a sample: handing them from thread to thread was
measured to be slower.
"""

from __future__ import annotations

import triton
import triton.language as tl

SIZES = tuple(f"{side}{level}" for level in range(8) for side in "hw")
"""The names of the parameters that hold the sizes of the levels."""


@triton.jit
def load_pairs(locations, index, exists, DTYPE: tl.constexpr):
    """x and y of samples, loaded at once; far outside of the maps where there is none."""
    if locations.dtype.element_ty == tl.float64:
        x = tl.load(locations + 2 * index, mask=exists, other=-2.0)
        y = tl.load(locations + 2 * index + 1, mask=exists, other=-2.0)
    elif locations.dtype.element_ty == tl.float32:
        # The bits of -2 and -2.
        bits = tl.load(locations.to(tl.pointer_type(tl.int64)) + index, mask=exists, other=-0x3FFFFFFF40000000)
        x = bits.to(tl.int32).to(tl.float32, bitcast=True)
        y = (bits >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    else:
        bits = tl.load(locations.to(tl.pointer_type(tl.int32)) + index, mask=exists, other=-0x3FFF4000)
        x = bits.to(tl.int16).to(locations.dtype.element_ty, bitcast=True)
        y = (bits >> 16).to(tl.int16).to(locations.dtype.element_ty, bitcast=True)
    return x.to(DTYPE), y.to(DTYPE)


@triton.jit
def upper_left_of(x, y, height, width, DTYPE: tl.constexpr):
    """Of samples: row and column of the upper left pixel, how far below and right of it they lie (ly, lx).

    All corners of a sample that is outside are, and those of one that is nowhere: its ly or lx is not a number.
    """
    # The maximum keeps the product from being rounded together with the difference.
    x = tl.maximum(x * width.to(DTYPE), -2.0, propagate_nan=tl.PropagateNan.ALL) - 0.5
    y = tl.maximum(y * height.to(DTYPE), -2.0, propagate_nan=tl.PropagateNan.ALL) - 0.5
    outside = (y <= -1) | (y >= height.to(DTYPE)) | (x <= -1) | (x >= width.to(DTYPE))
    x = tl.where(outside, -2.0, x)
    y = tl.where(outside, -2.0, y)
    left = tl.floor(x)
    upper = tl.floor(y)
    # The maximum with a number is one, also of what is not a number.
    row = tl.maximum(upper, -2.0).to(tl.int32)
    column = tl.maximum(left, -2.0).to(tl.int32)
    return row, column, y - upper, x - left


@triton.jit
def nearest_index(position, size, DTYPE: tl.constexpr):
    """The row or column of samples for the method "discrete", the first for what is not a number."""
    position = tl.minimum(tl.maximum(position * size.to(DTYPE), -1.0), size.to(DTYPE))
    return tl.minimum(tl.maximum((position + 0.5).to(tl.int32), 0), size - 1)


@triton.jit
def is_inside(index, size):
    """Whether rows or columns are of the map."""
    return (index >= 0) & (index < size)
