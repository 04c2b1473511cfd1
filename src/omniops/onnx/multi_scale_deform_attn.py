"""Multi-scale deformable attention in ONNX: a ``GridSample`` for each level.

``omniops.ops.multi_scale_deform_attn`` has the formula. The letters are those of the reference kernel: N batch, S
pixels of all levels, Q queries, M heads, D channels of a head, K points of all levels, P those of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from onnxscript import ir

from omniops.onnx._graph import accumulated, finish, grid_sample, ints, known_size, number, op, product_of, size, sum_of


def multi_scale_deform_attn(
    value: Any,
    spatial_shapes: Sequence[Any],
    sampling_locations: Any,
    attention_weights: Any,
    points_per_level: Sequence[Any],
    discrete: bool,
) -> Any:
    """(N, S, M, D), (N, Q, M, K, 2), (N, Q, M, K) -> (N, Q, M * D), where K may be two axes, L and P."""
    m, d = known_size("value", value, 2), known_size("value", value, 3)
    queries = size(attention_weights, 1)
    maps = op.Transpose(accumulated(value), perm=[0, 2, 3, 1])
    # (N, M, Q, K, 2) and (N, M, Q, K)
    locations = op.Transpose(op.Reshape(accumulated(sampling_locations), [0, 0, 0, -1, 2]), perm=[0, 2, 1, 3, 4])
    weights = op.Transpose(op.Reshape(accumulated(attention_weights), [0, 0, 0, -1]), perm=[0, 2, 1, 3])
    out, pixel, point = None, 0, 0
    for height, width, points in zip(spatial_shapes[::2], spatial_shapes[1::2], points_per_level, strict=True):
        last_pixel, last_point = sum_of(pixel, product_of(height, width)), sum_of(point, points)
        if 0 not in [number for number in (height, width, points) if isinstance(number, int)]:
            pixels, positions = _between(maps, pixel, last_pixel, 3), _between(locations, point, last_point, 3)
            sample = _nearest if discrete else _bilinear
            samples = sample(pixels, d, height, width, positions, queries, points)
            factors = op.Reshape(_between(weights, point, last_point, 3), ints([-1, 1, queries, points]))
            level = op.ReduceSum(op.Mul(samples, factors), [3], keepdims=0)
            out = level if out is None else op.Add(out, level)
        pixel, point = last_pixel, last_point
    if out is None:
        out = op.Expand(number(0, weights), ints([size(value, 0), m * d, queries]))
    out = op.Transpose(op.Reshape(out, ints([size(value, 0), m * d, queries])), perm=[0, 2, 1])
    return finish(out, value)


def _bilinear(pixels: Any, d: int, height: Any, width: Any, positions: Any, queries: Any, points: Any) -> Any:
    """(N, M, D, H*W), (N, M, Q, P, 2) -> (N*M, D, Q, P)."""
    grid = op.Sub(op.Mul(positions, number(2, positions)), number(1, positions))
    return grid_sample(
        op.Reshape(pixels, ints([-1, d, height, width])), op.Reshape(grid, ints([-1, queries, points, 2]))
    )


def _nearest(pixels: Any, d: int, height: Any, width: Any, positions: Any, queries: Any, points: Any) -> Any:
    """(N, M, D, H*W), (N, M, Q, P, 2) -> (N*M, D, Q, P), of the pixel that RT-DETRv2's method "discrete" takes."""
    extent = op.CastLike(ints([width, height]), positions)
    zero = number(0, positions)
    position = op.Add(op.Mul(positions, extent), number(0.5, positions))
    position = op.Where(op.IsNaN(position), zero, position)
    position = op.Max(op.Min(position, op.Sub(extent, number(1, positions))), zero)
    column, row = (op.Gather(op.Cast(position, to=ir.DataType.INT64), axis, axis=4) for axis in (0, 1))
    index = op.Add(op.Mul(row, ints([width])), column)
    # Of each map the same pixel in all channels: (N*M, D, H*W), (N*M, Q*P) -> (N*M, Q*P, D)
    rows = op.Reshape(op.Transpose(pixels, perm=[0, 1, 3, 2]), ints([-1, product_of(height, width), d]))
    found = op.GatherND(rows, op.Reshape(index, ints([-1, product_of(queries, points), 1])), batch_dims=1)
    return op.Reshape(op.Transpose(found, perm=[0, 2, 1]), ints([-1, d, queries, points]))


def _between(value: Any, start: Any, end: Any, axis: int) -> Any:
    return op.Slice(value, ints([start]), ints([end]), ints([axis]))
