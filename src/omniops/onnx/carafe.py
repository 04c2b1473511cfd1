"""CARAFE in ONNX: a matrix product for each tile of T centres beside each other, as in ``omniops.decomposed.carafe``.

A tile sees k rows of L = (T - 1) * t + k pixels. The letters are the reference kernel's:

    (n, y, tiles, g, c, k*L) x (n, y, tiles, g, k*L, s*T*s) -> (n, y, tiles, g, c, s*T*s)
"""

from __future__ import annotations

from typing import Any

import torch

from omniops.decomposed.carafe import TILE, band
from omniops.onnx._graph import END, accumulated, finish, ints, known_size, op, product_of, quotient_of, size, sum_of


def carafe(features: Any, masks: Any, kernel_size: int, group_size: int, scale_factor: int, stride: int) -> Any:
    """(N, C, H, W), (N, G*k*k, H*s/t, W*s/t) -> (N, C, H*s/t, W*s/t)."""
    k, g, s, c = kernel_size, group_size, scale_factor, known_size("features", features, 1)
    tile = max(TILE, k)  # so that a tile sees pixels of its own and of the next tile alone
    y, x = (quotient_of(size(masks, axis), s) for axis in (2, 3))
    tiles = quotient_of(sum_of(x, tile - 1), tile)
    seen = _seen(accumulated(features), size(features, 3), k, stride, tile, tiles)
    split = op.Reshape(seen, ints([0, 0, 0, g, c // g, k * ((tile - 1) * stride + k)]))
    results = op.MatMul(split, _weights(accumulated(masks), y, x, k, g, s, stride, tile, tiles))
    # (n, y, tiles, C, s, T*s) -> (n, C, y, s, tiles, T*s)
    results = op.Transpose(op.Reshape(results, ints([0, 0, 0, c, s, tile * s])), perm=[0, 3, 1, 4, 2, 5])
    rows = op.Reshape(results, ints([0, c, size(masks, 2), product_of(tiles, tile * s)]))
    return finish(op.Slice(rows, ints([0]), ints([size(masks, 3)]), ints([3])), features)


def _seen(features: Any, width: Any, k: int, stride: int, tile: int, tiles: Any) -> Any:
    """(N, C, H, W) -> (n, y, tiles, C, k*L)."""
    p, pitch, length = k // 2, tile * stride, (tile - 1) * stride + k
    after = sum_of(product_of(sum_of(tiles, 1), pitch), product_of(sum_of(width, p), -1))
    padded = op.Pad(features, ints([0, 0, p, p, 0, 0, p, after]))
    split = op.Reshape(padded, ints([0, 0, 0, sum_of(tiles, 1), pitch]))
    windows = op.Slice(split, ints([0, 0]), ints([-1, length]), ints([3, 4]))
    if length > pitch:
        beyond = op.Slice(split, ints([1, 0]), ints([END, length - pitch]), ints([3, 4]))
        windows = op.Concat(windows, beyond, axis=4)
    windows = op.Transpose(windows, perm=[0, 2, 3, 1, 4])
    rows = [
        op.Slice(windows, ints([u]), ints([u + 1 - k if u + 1 < k else END]), ints([1]), ints([stride]))
        for u in range(k)
    ]
    return op.Concat(*rows, axis=4) if k > 1 else rows[0]


def _weights(masks: Any, y: Any, x: Any, k: int, g: int, s: int, stride: int, tile: int, tiles: Any) -> Any:
    """(N, G*k*k, y*s, x*s) -> (n, y, tiles, g, k*L, s*T*s)."""
    after = sum_of(product_of(tiles, tile * s), product_of(x, -s))
    split = op.Reshape(op.Pad(masks, ints([0, 0, 0, 0, 0, 0, 0, after])), ints([0, 0, y, s, tiles, tile * s]))
    by_tile = op.Reshape(op.Transpose(split, perm=[0, 2, 4, 1, 3, 5]), ints([0, 0, 0, g * k, k * s * tile * s]))
    rows = op.Pad(by_tile, [0, 0, 0, 0, 0, 0, 0, 0, 0, 1])  # a zero behind each row of the kernel
    indices = band(k, s, stride, tile, torch.device("cpu")).tolist()
    weights = op.Gather(rows, ints(indices), axis=4)
    return op.Reshape(weights, ints([0, 0, 0, g, k * ((tile - 1) * stride + k), s * tile * s]))
