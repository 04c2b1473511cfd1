"""CARAFE in core ATen; ``omniops.ops.carafe`` has the formula.

Forward, the results of T centres beside each other, a tile, are one matrix product. With stride t a tile sees k rows of
L = (T - 1) * t + k pixels, and a pixel has zero weight in the results of those of its centres that do not see it. The
other letters are the reference kernel's:

    (n*y*tiles*g, c, k*L) x (n*y*tiles*g, k*L, s*T*s) -> (n*y*tiles*g, c, s*T*s)

That is L / k times the products that are needed (2.4 for k 5 and t 1), in the operation that every runtime is fastest
at: a sum of k*k products of maps takes 2.5 to 5 times as long in AOTInductor, ExecuTorch and OpenVINO. No tensor has
more than five axes, which is Core ML's limit. A pixel that is infinite or NaN makes NaN of all results of its tile.

Backward, a tap sees one pixel of the padded features from each centre, ``_enlarged`` to the centre's block of s x s
results. The gradient of the features goes the other way: the sums over the blocks, set apart by the stride, where the
tap lies.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from omniops.backends import accumulated


@dataclass(frozen=True)
class Tile:
    """Centres beside each other, and what they see of a row of pixels."""

    kernel_size: int
    scale_factor: int
    stride: int

    @property
    def centres(self) -> int:
        """T: 8, as 16 take the same time, or k where that is more, so that two pitches hold what a tile sees."""
        return max(8, self.kernel_size)

    @property
    def pitch(self) -> int:
        """From the first pixel that a tile sees to that of the next."""
        return self.centres * self.stride

    @property
    def length(self) -> int:
        """L, the pixels that it sees of a row."""
        return (self.centres - 1) * self.stride + self.kernel_size

    @property
    def width(self) -> int:
        """T*s, the results in a row."""
        return self.centres * self.scale_factor

    @property
    def results(self) -> int:
        """s*T*s."""
        return self.scale_factor * self.width

    def band(self, device: torch.device | None = None) -> Tensor:
        """(L*s*T*s): of the weight of each pixel in each result the index in (k, s, T, s), flattened.

        For a pixel that the centre does not see it is k*s*T*s, where a zero is.
        """
        pixels, centres = torch.arange(self.length, device=device), torch.arange(self.centres, device=device)
        columns = (pixels[:, None] - self.stride * centres)[:, None, :, None]  # v = pixel - stride * centre
        results = torch.arange(self.results, device=device).reshape(self.scale_factor, self.centres, self.scale_factor)
        is_seen = (columns >= 0) & (columns < self.kernel_size)
        return torch.where(is_seen, columns * self.results + results, self.kernel_size * self.results).flatten()


def carafe(
    features: Tensor, masks: Tensor, kernel_size: int, group_size: int, scale_factor: int, stride: int
) -> Tensor:
    """(N, C, H, W), (N, G*k*k, H*s/t, W*s/t) -> (N, C, H*s/t, W*s/t)."""
    (n, c, *_), s, tile = features.shape, scale_factor, Tile(kernel_size, scale_factor, stride)
    y, x = ((size - 1) // stride + 1 for size in features.shape[2:])
    rows: Any = y
    tiles: Any = (x + tile.centres - 1) // tile.centres
    if isinstance(rows, torch.SymInt) or isinstance(tiles, torch.SymInt):
        # Empty ones behind the last, so that there is never one: of a size that is 1 in the example torch.export makes
        # a constant.
        rows, tiles = rows + 1, tiles + 1
    seen = _seen(accumulated(features), tile, rows, tiles)
    weights = _weights(accumulated(masks), tile, group_size, rows, tiles)
    results = torch.bmm(seen.reshape(weights.shape[0], c // group_size, weights.shape[1]), weights)
    # (n, y, tiles, C, s, T*s) -> (n, C, y, s, tiles, T*s), in two steps
    split = results.reshape(n * rows, tiles, c, s, tile.width).permute(0, 2, 3, 1, 4)
    maps = split.reshape(n, rows, c, s * tiles * tile.width).transpose(1, 2)
    return maps.reshape(n, c, rows * s, tiles * tile.width)[:, :, : y * s, : x * s].to(features.dtype)


def _seen(features: Tensor, tile: Tile, rows: int, tiles: int) -> Tensor:
    """(N, C, H, W) -> (n, y, tiles, C, k*L)."""
    (n, c, height, width), k = features.shape, tile.kernel_size
    pad, height_seen = k // 2, rows * tile.stride + k - 1
    after = (tiles + 1) * tile.pitch - width - pad, height_seen - height - pad
    split = F.pad(features, (pad, after[0], pad, after[1])).reshape(n * c, height_seen, tiles + 1, tile.pitch)
    windows = split[:, :, :-1, : tile.length]
    if tile.length > tile.pitch:
        windows = torch.cat([windows, split[:, :, 1:, : tile.length - tile.pitch]], 3)
    windows = windows.reshape(n, c, height_seen * tiles, tile.length).transpose(1, 2)
    windows = windows.reshape(n, height_seen, tiles, c, tile.length)
    return torch.cat([windows[:, u : u + rows * tile.stride : tile.stride] for u in range(k)], 4)


def _weights(masks: Tensor, tile: Tile, group_size: int, rows: int, tiles: int) -> Tensor:
    """(N, G*k*k, y*s, x*s) -> (n*y*tiles*g, k*L, s*T*s)."""
    (n, channels, height, width), k, s = masks.shape, tile.kernel_size, tile.scale_factor
    padded = F.pad(masks, (0, tiles * tile.width - width, 0, rows * s - height))
    # (n, G*k*k, y, s, tiles, T*s) -> (n, y, tiles, G*k*k, s, T*s), in two steps
    split = padded.reshape(n * channels * rows, s, tiles, tile.width).transpose(1, 2)
    by_tile = split.reshape(n, channels, rows * tiles, tile.results).transpose(1, 2)
    taps = by_tile.reshape(n * rows * tiles * group_size, k, k * tile.results)
    weights = F.pad(taps, (0, 1)).index_select(2, tile.band(masks.device))
    return weights.reshape(n * rows * tiles * group_size, k * tile.length, tile.results)


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
