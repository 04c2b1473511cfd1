"""CARAFE in ONNX: a matrix product for each tile of T centres beside each other, as in ``omniops.decomposed.carafe``.

A tile sees k rows of L pixels. The letters are the reference kernel's:

    (n, y, tiles, g, c, k*L) x (n, y, tiles, g, k*L, s*T*s) -> (n, y, tiles, g, c, s*T*s)
"""

from __future__ import annotations

from typing import Any

from omniops.decomposed.carafe import Tile
from omniops.onnx._graph import END, accumulated, finish, ints, known_size, op, product_of, quotient_of, size, sum_of


def carafe(features: Any, masks: Any, kernel_size: int, group_size: int, scale_factor: int, stride: int) -> Any:
    """(N, C, H, W), (N, G*k*k, H*s/t, W*s/t) -> (N, C, H*s/t, W*s/t)."""
    k, g, s, c = kernel_size, group_size, scale_factor, known_size("features", features, 1)
    tile = Tile(k, s, stride)
    y, x = (quotient_of(size(masks, axis), s) for axis in (2, 3))
    tiles = quotient_of(sum_of(x, tile.centres - 1), tile.centres)
    seen = _seen(accumulated(features), tile, size(features, 3), tiles)
    split = op.Reshape(seen, ints([0, 0, 0, g, c // g, k * tile.length]))
    results = op.MatMul(split, _weights(accumulated(masks), tile, g, y, x, tiles))
    # (n, y, tiles, C, s, T*s) -> (n, C, y, s, tiles, T*s)
    results = op.Transpose(op.Reshape(results, ints([0, 0, 0, c, s, tile.width])), perm=[0, 3, 1, 4, 2, 5])
    rows = op.Reshape(results, ints([0, c, size(masks, 2), product_of(tiles, tile.width)]))
    return finish(op.Slice(rows, ints([0]), ints([size(masks, 3)]), ints([3])), features)


def _seen(features: Any, tile: Tile, width: Any, tiles: Any) -> Any:
    """(N, C, H, W) -> (n, y, tiles, C, k*L)."""
    k, pad = tile.kernel_size, tile.kernel_size // 2
    after = sum_of(product_of(sum_of(tiles, 1), tile.pitch), product_of(sum_of(width, pad), -1))
    padded = op.Pad(features, ints([0, 0, pad, pad, 0, 0, pad, after]))
    split = op.Reshape(padded, ints([0, 0, 0, sum_of(tiles, 1), tile.pitch]))
    windows = op.Slice(split, ints([0, 0]), ints([-1, tile.length]), ints([3, 4]))
    if tile.length > tile.pitch:
        beyond = op.Slice(split, ints([1, 0]), ints([END, tile.length - tile.pitch]), ints([3, 4]))
        windows = op.Concat(windows, beyond, axis=4)
    windows = op.Transpose(windows, perm=[0, 2, 3, 1, 4])
    rows = [
        op.Slice(windows, ints([u]), ints([u + 1 - k if u + 1 < k else END]), ints([1]), ints([tile.stride]))
        for u in range(k)
    ]
    return op.Concat(*rows, axis=4) if k > 1 else rows[0]


def _weights(masks: Any, tile: Tile, g: int, y: Any, x: Any, tiles: Any) -> Any:
    """(N, G*k*k, y*s, x*s) -> (n, y, tiles, g, k*L, s*T*s)."""
    k, s = tile.kernel_size, tile.scale_factor
    after = sum_of(product_of(tiles, tile.width), product_of(x, -s))
    split = op.Reshape(op.Pad(masks, ints([0, 0, 0, 0, 0, 0, 0, after])), ints([0, 0, y, s, tiles, tile.width]))
    by_tile = op.Transpose(split, perm=[0, 2, 4, 1, 3, 5])
    taps = op.Reshape(by_tile, ints([0, 0, 0, g * k, k * tile.results]))
    weights = op.Gather(op.Pad(taps, [0, 0, 0, 0, 0, 0, 0, 0, 0, 1]), ints(tile.band().tolist()), axis=4)
    return op.Reshape(weights, ints([0, 0, 0, g, k * tile.length, tile.results]))
