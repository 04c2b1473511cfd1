"""CARAFE in ONNX: a matrix product for each row of the kernel; ``omniops.ops.carafe`` has the formula.

With the features' channels last, row u of the kernel is at each centre a product of the s*s results' masks and the k
features beside each other, (s*s, k) x (k, c), and a copy of the features for each column of the kernel is all that is
kept. (A sum over the k*k taps of products of whole maps takes onnxruntime a third longer, and one product for all taps
k times the memory.) The letters are those of the reference kernel: n batch, g group, c channel of the group, y and x
centres.
"""

from __future__ import annotations

from typing import Any

from omniops.onnx._graph import END, accumulated, finish, ints, op


def carafe(features: Any, masks: Any, kernel_size: int, group_size: int, scale_factor: int, stride: int) -> Any:
    """(N, C, H, W), (N, G*k*k, H*s/t, W*s/t) -> (N, C, H*s/t, W*s/t)."""
    k, g, s = kernel_size, group_size, scale_factor
    weights, columns = _weights(accumulated(masks), k, g, s), _columns(accumulated(features), k, g, stride)
    out = None
    for u in range(k):
        row = op.MatMul(op.Gather(weights, u, axis=0), _seen(columns, u, k, stride, axis=1))
        out = row if out is None else op.Add(out, row)
    blocks = op.Reshape(out, [0, 0, 0, g, s, s, -1])
    shape = op.Concat(op.Shape(features, start=0, end=2), op.Shape(masks, start=2, end=4), axis=0)
    # (n, y, x, g, s, s, c) -> (n, g, c, y, s, x, s)
    return finish(op.Reshape(op.Transpose(blocks, perm=[0, 3, 6, 1, 4, 2, 5]), shape), features)


def _weights(masks: Any, k: int, g: int, s: int) -> Any:
    """(N, G*k*k, y*s, x*s) -> (k, n, y, x, g, s*s, k), the rows of the kernel first."""
    phases = op.SpaceToDepth(masks, blocksize=s) if s > 1 else masks
    split = op.Reshape(op.Transpose(phases, perm=[0, 2, 3, 1]), [0, 0, 0, s * s, g, k, k])
    return op.Transpose(split, perm=[5, 0, 1, 2, 4, 3, 6])


def _columns(features: Any, k: int, g: int, stride: int) -> Any:
    """(N, C, H, W) -> (n, H + 2p, x, g, k, c), what the columns of the kernel see of each row."""
    p = k // 2
    padded = op.Transpose(op.Pad(features, [0, 0, p, p, 0, 0, p, p]), perm=[0, 2, 3, 1])
    split = op.Reshape(padded, [0, 0, 0, g, 1, -1])
    seen = [_seen(split, v, k, stride, axis=2) for v in range(k)]
    return op.Concat(*seen, axis=4) if k > 1 else seen[0]


def _seen(padded: Any, tap: int, k: int, stride: int, axis: int) -> Any:
    """What a tap of the kernel sees along an axis, from every ``stride``-th pixel."""
    if k == 1 and stride == 1:
        return padded
    return op.Slice(padded, ints([tap]), ints([tap + 1 - k if tap + 1 < k else END]), ints([axis]), ints([stride]))
