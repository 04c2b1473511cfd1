"""CARAFE in core ATen; ``omniops.ops.carafe`` has the formula.

Forward, all that T centres beside each other give is one matrix product: they see k rows of L = (T - 1) * t + k pixels,
and a pixel has zero weight in the results of those centres that do not see it. The letters are the reference kernel's,
with tiles of T centres:

    (n, y*tile*g, c, k*L) x (n, y*tile*g, k*L, s*T*s) -> (n, y*tile*g, c, s*T*s)

That is some two times the products that are needed (k 5, T 8), in the operation that every runtime is fastest at. A sum
of k*k products of maps takes 2.5 to 5 times as long in AOTInductor, ExecuTorch and OpenVINO. No tensor has more than
five axes, which is Core ML's limit.

Backward, a tap sees one pixel of the padded features from each centre, ``_enlarged`` to the centre's block of s x s
results. The gradient of the features goes the other way: the sums over the blocks, set apart by the stride, where the
tap lies.
"""

from __future__ import annotations

from functools import reduce
from operator import add
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from omniops.backends import accumulated

TILE = 8
"""Of centres, at least. Twice as many take as long: the products are fewer and larger, and more of them zero."""


def carafe(
    features: Tensor, masks: Tensor, kernel_size: int, group_size: int, scale_factor: int, stride: int
) -> Tensor:
    """(N, C, H, W), (N, G*k*k, H*s/t, W*s/t) -> (N, C, H*s/t, W*s/t)."""
    (n, c, *_), s = features.shape, scale_factor
    y, x = ((size - 1) // stride + 1 for size in features.shape[2:])
    tile = max(TILE, kernel_size)  # so that a tile sees pixels of its own and of the next tile alone
    tiles: Any = (x + tile - 1) // tile
    if isinstance(tiles, torch.SymInt):
        tiles = tiles + 1  # torch.export takes a size of 1 in the example for a size that is always 1
    seen = _seen(accumulated(features), kernel_size, stride, tile, tiles)
    weights = _weights(accumulated(masks), kernel_size, group_size, s, stride, tile, tiles, y)
    results = torch.bmm(seen.reshape(weights.shape[0], c // group_size, weights.shape[1]), weights)
    # (n, y, tiles, C, s, T*s) -> (n, C, y, s, tiles, T*s), in two steps
    rows = results.reshape(n * y, tiles, c, s, tile * s).permute(0, 2, 3, 1, 4)
    maps = rows.reshape(n, y, c, s * tiles * tile * s).transpose(1, 2).reshape(n, c, y * s, tiles * tile * s)
    return maps[..., : x * s].to(features.dtype)


def _seen(features: Tensor, k: int, stride: int, tile: int, tiles: int) -> Tensor:
    """(N, C, H, W) -> (n, y, tiles, C, k*L)."""
    n, c, height, width = features.shape
    pad, pitch, length = k // 2, tile * stride, (tile - 1) * stride + k
    padded = F.pad(features, (pad, (tiles + 1) * pitch - width - pad, pad, pad))
    split = padded.reshape(n * c, height + 2 * pad, tiles + 1, pitch)
    if length > pitch:
        windows = torch.cat([split[:, :, :-1], split[:, :, 1:, : length - pitch]], 3)
    else:
        windows = split[:, :, :-1, :length]
    windows = windows.reshape(n, c, (height + 2 * pad) * tiles, length).transpose(1, 2)
    windows = windows.reshape(n, height + 2 * pad, tiles, c, length)
    return torch.cat([windows[:, u : u + height : stride] for u in range(k)], 4)


def _weights(masks: Tensor, k: int, group_size: int, s: int, stride: int, tile: int, tiles: int, y: int) -> Tensor:
    """(N, G*k*k, y*s, x*s) -> (n*y*tiles*g, k*L, s*T*s)."""
    n, channels = masks.shape[:2]
    padded = F.pad(masks, (0, tiles * tile * s - masks.shape[3]))
    # (n, G*k*k, y, s, tiles, T*s) -> (n, y, tiles, G*k*k, s, T*s), in two steps
    split = padded.reshape(n * channels * y, s, tiles, tile * s).transpose(1, 2)
    by_tile = split.reshape(n, channels, y * tiles, s * tile * s).transpose(1, 2)
    rows = by_tile.reshape(n * y * tiles * group_size, k, k * s * tile * s)
    weights = F.pad(rows, (0, 1)).index_select(2, band(k, s, stride, tile, masks.device))
    return weights.reshape(n * y * tiles * group_size, k * ((tile - 1) * stride + k), s * tile * s)


def band(k: int, s: int, stride: int, tile: int, device: torch.device) -> Tensor:
    """(L*s*T*s): of each pixel of a row and each result the index of its weight among (k, s*T*s), k*s*T*s for zero."""
    pixels, centres = torch.arange((tile - 1) * stride + k, device=device), torch.arange(tile, device=device)
    columns = (pixels[:, None] - stride * centres)[:, None, :, None]  # of the kernel by which a centre sees a pixel
    results = torch.arange(s * tile * s, device=device).reshape(s, tile, s)
    inside = (columns >= 0) & (columns < k)
    return torch.where(inside, columns * (s * tile * s) + results, k * s * tile * s).flatten()


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
