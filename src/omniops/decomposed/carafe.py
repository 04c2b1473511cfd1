"""CARAFE in core ATen; ``omniops.ops.carafe`` has the formula.

A tap sees one pixel of the padded features from each centre, ``_enlarged`` to the centre's block of s x s results. The
gradient of the features goes the other way: the sums over the blocks, set apart by the stride, where the tap lies.
"""

from __future__ import annotations

from functools import reduce
from operator import add

import torch
import torch.nn.functional as F
from torch import Tensor

from omniops.backends import accumulated


def carafe(
    features: Tensor, masks: Tensor, kernel_size: int, group_size: int, scale_factor: int, stride: int
) -> Tensor:
    """(N, C, H, W), (N, G*k*k, H*s/t, W*s/t) -> (N, C, H*s/t, W*s/t)."""
    weights = _by_group(accumulated(masks), group_size)
    taps = _taps(features, kernel_size, scale_factor, stride, *masks.shape[2:])
    products = [_by_group(seen, group_size) * weights[:, :, tap : tap + 1] for tap, seen in enumerate(taps)]
    return reduce(add, products).reshape(*features.shape[:2], *masks.shape[2:]).to(features.dtype)


def carafe_backward(
    grad: Tensor,
    features: Tensor | None,
    masks: Tensor | None,
    height: int,
    width: int,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
    stride: int,
) -> tuple[Tensor, Tensor]:
    """The gradients of features, where there are masks, and of masks, where there are features."""
    grads = _by_group(accumulated(grad), group_size)
    by_features, by_masks = grad.new_empty(0), grad.new_empty(0)
    if masks is not None:
        weights = _by_group(accumulated(masks), group_size)
        shares = [
            _block_sums((grads * weights[:, :, tap : tap + 1]).reshape(grad.shape), scale_factor)
            for tap in range(kernel_size**2)
        ]
        padded = [_placed(share, tap, kernel_size, stride, height, width) for tap, share in enumerate(shares)]
        pad = kernel_size // 2
        by_features = reduce(add, padded)[..., pad : pad + height, pad : pad + width].to(grad.dtype)
    if features is not None:
        taps = _taps(features, kernel_size, scale_factor, stride, *grad.shape[2:])
        sums = [(grads * _by_group(seen, group_size)).sum(2, keepdim=True) for seen in taps]
        by_masks = torch.cat(sums, 2).reshape(grad.shape[0], -1, *grad.shape[2:]).to(grad.dtype)
    return by_features, by_masks


def _by_group(tensor: Tensor, group_size: int) -> Tensor:
    """(N, G*c, Y, X) -> (N, G, c, Y, X)."""
    n, channels, height, width = tensor.shape
    return tensor.reshape(n, group_size, channels // group_size, height, width)


def _taps(features: Tensor, kernel_size: int, scale_factor: int, stride: int, height: int, width: int) -> list[Tensor]:
    """For each tap the feature that each of the height x width results sees, (N, C, H*s/t, W*s/t)."""
    pad, s = kernel_size // 2, scale_factor
    padded = F.pad(accumulated(features), (pad, pad, pad, pad))
    taps = [(u, v) for u in range(kernel_size) for v in range(kernel_size)]
    if stride == 1:  # enlarged once for all
        padded = _enlarged(padded, s)
        return [padded[:, :, u * s : u * s + height, v * s : v * s + width] for u, v in taps]
    # One centre every stride pixels, of all that lie in the map.
    h, w = features.shape[2:]
    return [_enlarged(padded[:, :, u : u + h : stride, v : v + w : stride], s) for u, v in taps]


def _enlarged(tensor: Tensor, scale_factor: int) -> Tensor:
    """(N, C, Y, X) -> (N, C, Y*s, X*s), each pixel a block of s x s."""
    if scale_factor == 1:
        return tensor
    n, c, height, width = tensor.shape
    rows = tensor[:, :, :, None].expand(-1, -1, -1, scale_factor, -1).reshape(n, c, height * scale_factor, width)
    columns = rows[..., None].expand(-1, -1, -1, -1, scale_factor)
    return columns.reshape(n, c, height * scale_factor, width * scale_factor)


def _block_sums(tensor: Tensor, scale_factor: int) -> Tensor:
    """(N, C, Y*s, X*s) -> (N, C, Y, X)."""
    if scale_factor == 1:
        return tensor
    n, c, height, width = (
        size // by for size, by in zip(tensor.shape, (1, 1, scale_factor, scale_factor), strict=True)
    )
    rows = tensor.reshape(n, c, height, scale_factor, width * scale_factor).sum(3)
    return rows.reshape(n, c, height, width, scale_factor).sum(4)


def _placed(share: Tensor, tap: int, kernel_size: int, stride: int, height: int, width: int) -> Tensor:
    """What a tap adds to the gradient of the padded features: (N, C, Y, X) -> (N, C, H + 2p, W + 2p)."""
    n, c, y, x = share.shape
    if stride > 1:
        share = F.pad(share[..., None], (0, stride - 1)).reshape(n, c, y, x * stride)
        share = F.pad(share[:, :, :, None], (0, 0, 0, stride - 1)).reshape(n, c, y * stride, x * stride)
        # The zeros behind the last centre may reach beyond the map.
        y, x = (y - 1) * stride + 1, (x - 1) * stride + 1
        share = share[:, :, :y, :x]
    u, v, padding = tap // kernel_size, tap % kernel_size, 2 * (kernel_size // 2)
    return F.pad(share, (v, width + padding - v - x, u, height + padding - u - y))
