"""CARAFE in Triton; ``omniops.ops.carafe`` has the formula.

What bounds these kernels is less the bytes of the device's memory than the loads through the L1 cache: with k = 5 and
s = 2 every feature takes part in a hundred products. So each keeps a tile of results in registers, walks the k*k taps
(or the channels), and shares a loaded value among as many products as the registers allow. A result belongs to one
program, whose order of summation is fixed: no atomics, the same bits every run.

Tensors come with their strides, so any memory layout is read and written in place; Triton specialises a stride of 1 and
lays the threads along that axis. ``pad`` = k // 2 comes as an unspecialised number for the opposite reason: were some
taps known to be better aligned than others, each would be loaded in a layout of its own and then be rearranged.

Dimensions of the tiles: A and B, row and column of a result in its centre's s x s block (SP is s padded to a power of
two); C, channels of one group; TILE, the TILE_Y x TILE_X centres or pixels, which are the threads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from omniops.backends import empty

# Taps are unrolled at compile time up to this kernel size.
_UNROLLED = tl.constexpr(7)


@triton.jit
def _load(pointers, inside, has_channel, WHOLE: tl.constexpr, EVEN_C: tl.constexpr):
    """Load with zero outside; WHOLE says that nothing is outside, EVEN_C that every channel of the tile exists."""
    if WHOLE and EVEN_C:
        return tl.load(pointers)
    if WHOLE:
        return tl.load(pointers, mask=has_channel, other=0.0)
    if EVEN_C:
        return tl.load(pointers, mask=inside, other=0.0)
    return tl.load(pointers, mask=inside & has_channel, other=0.0)


@triton.jit
def _accumulator(dtype: tl.constexpr):
    return tl.float64 if dtype == tl.float64 else tl.float32


@triton.jit
def _decode(groups, channels, rows, columns, CHUNK: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr):
    """The chunk of channels, tile row, tile column, group and batch of this program; chunks are neighbours, for L2."""
    program = tl.program_id(0)
    chunks = tl.cdiv(channels, CHUNK)
    tiles_x = tl.cdiv(columns, TILE_X)
    tiles_y = tl.cdiv(rows, TILE_Y)
    tile = program // chunks
    batch = tile // tiles_x // tiles_y
    return program % chunks, tile // tiles_x % tiles_y, tile % tiles_x, batch % groups, (batch // groups).to(tl.int64)


@triton.jit
def _forward_tap(
    acc, features, masks, u, v, y, x, height, width, has_channel, has_result, f_sh, f_sw, m_sc,
    K: tl.constexpr, WHOLE: tl.constexpr, EVEN_C: tl.constexpr,
):  # fmt: skip
    weight = tl.load(masks + (u * K + v) * m_sc, mask=has_result, other=0.0)
    inside = (y + u >= 0) & (y + u < height) & (x + v >= 0) & (x + v < width)
    feature = _load(features + (u * f_sh + v * f_sw), inside, has_channel, WHOLE, EVEN_C)
    return acc + feature.to(acc.dtype) * weight.to(acc.dtype)


@triton.jit
def _forward_taps(
    acc, features, masks, y, x, height, width, has_channel, has_result, f_sh, f_sw, m_sc,
    K: tl.constexpr, WHOLE: tl.constexpr, EVEN_C: tl.constexpr,
):  # fmt: skip
    if K <= _UNROLLED:
        for u in tl.static_range(K):
            for v in tl.static_range(K):
                acc = _forward_tap(
                    acc, features, masks, u, v, y, x, height, width, has_channel, has_result, f_sh, f_sw, m_sc,
                    K, WHOLE, EVEN_C,
                )  # fmt: skip
    else:
        for u in range(K):
            for v in range(K):
                acc = _forward_tap(
                    acc, features, masks, u, v, y, x, height, width, has_channel, has_result, f_sh, f_sw, m_sc,
                    K, WHOLE, EVEN_C,
                )  # fmt: skip
    return acc


@triton.jit(do_not_specialize=["pad"])
def _forward(
    features, masks, out, groups, channels, height, width, rows, columns, pad,
    f_sn, f_sc, f_sh, f_sw, m_sn, m_sc, m_sh, m_sw, o_sn, o_sc, o_sh, o_sw,
    K: tl.constexpr, S: tl.constexpr, T: tl.constexpr, SP: tl.constexpr, CHUNK: tl.constexpr, BLOCK_C: tl.constexpr,
    TILE_Y: tl.constexpr, TILE_X: tl.constexpr, EVEN_C: tl.constexpr,
):  # fmt: skip
    """A program: CHUNK channels of a group at TILE centres, BLOCK_C at a time; tile (A, C, TILE, B).

    A feature is loaded once for its centre's s*s results, a weight once for the thread's channels.
    """
    chunk, tile_y, tile_x, group, n = _decode(groups, channels, rows, columns, CHUNK, TILE_Y, TILE_X)
    a = tl.arange(0, SP)[:, None, None, None]
    b = tl.arange(0, SP)[None, None, None, :]
    lane = tl.arange(0, TILE_Y * TILE_X)[None, None, :, None]
    y = tile_y * TILE_Y + lane // TILE_X
    x = tile_x * TILE_X + lane % TILE_X
    has_result = (y < rows) & (x < columns) & (a < S) & (b < S)
    i = (y * S + a).to(tl.int64)
    j = x * S + b
    y = y * T - pad  # the feature under tap (0, 0)
    x = x * T - pad
    masks += n * m_sn + (group * K * K).to(tl.int64) * m_sc + (i * m_sh + j * m_sw)
    features += n * f_sn + (group * channels).to(tl.int64) * f_sc + (y.to(tl.int64) * f_sh + x * f_sw)
    out += n * o_sn + (group * channels).to(tl.int64) * o_sc + (i * o_sh + j * o_sw)

    first_y = tile_y * TILE_Y * T - pad
    first_x = tile_x * TILE_X * T - pad
    bottom = first_y + (TILE_Y - 1) * T + K
    right = first_x + (TILE_X - 1) * T + K
    whole = (first_y >= 0) & (first_x >= 0) & (bottom <= height) & (right <= width)
    for start in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, channels), BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)[None, :, None, None]
        has_channel = c < channels
        pointers = features + c.to(tl.int64) * f_sc
        acc = tl.zeros((SP, BLOCK_C, TILE_Y * TILE_X, SP), _accumulator(features.dtype.element_ty))
        if whole:
            acc = _forward_taps(
                acc, pointers, masks, y, x, height, width, has_channel, has_result, f_sh, f_sw, m_sc, K, True, EVEN_C
            )
        else:
            acc = _forward_taps(
                acc, pointers, masks, y, x, height, width, has_channel, has_result, f_sh, f_sw, m_sc, K, False, EVEN_C
            )
        tl.store(out + c.to(tl.int64) * o_sc, acc.to(out.dtype.element_ty), mask=has_result & has_channel)


@triton.jit
def _features_tap(
    acc, grad, masks, d, v, y, x, r, a, b, rows, columns, has_channel, g_sh, g_sw, m_sc, m_sh, m_sw,
    K: tl.constexpr, S: tl.constexpr, T: tl.constexpr, SP: tl.constexpr, EVEN_C: tl.constexpr,
):  # fmt: skip
    # The centre that sees row y + r through tap row u = d + r is the same for every r.
    centre_y = y - d
    centre_x = x - v
    inside = (centre_y >= 0) & (centre_x >= 0) & (b < S)
    if T > 1:
        inside &= (centre_y % T == 0) & (centre_x % T == 0)
        centre_y = centre_y // T
        centre_x = centre_x // T
    inside &= (centre_y < rows) & (centre_x < columns)
    i = (centre_y * S + a).to(tl.int64)
    j = centre_x * S + b
    u = d + r
    value = _load(grad + (i * g_sh + j * g_sw), inside, has_channel, False, EVEN_C)
    weight = tl.load(masks + ((u * K + v) * m_sc + i * m_sh + j * m_sw), mask=inside & (u >= 0) & (u < K), other=0.0)
    return acc + value.to(acc.dtype) * weight.to(acc.dtype)


@triton.jit(do_not_specialize=["pad"])
def _backward_features(
    grad, masks, out, groups, channels, height, width, rows, columns, pad,
    g_sn, g_sc, g_sh, g_sw, m_sn, m_sc, m_sh, m_sw, o_sn, o_sc, o_sh, o_sw,
    K: tl.constexpr, S: tl.constexpr, T: tl.constexpr, SP: tl.constexpr, R: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_C: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr, EVEN_C: tl.constexpr,
):  # fmt: skip
    """A program: CHUNK channels of a group at TILE x R pixels, BLOCK_C at a time; tile (R, C, TILE, B).

    A thread owns R pixels above each other, which share what they gather: a gradient is loaded once for the R of them,
    a weight once for the thread's channels. B is summed at the end.
    """
    chunk, tile_y, tile_x, group, n = _decode(groups, channels, tl.cdiv(height, R), width, CHUNK, TILE_Y, TILE_X)
    r = tl.arange(0, R)[:, None, None, None]
    b = tl.arange(0, SP)[None, None, None, :]
    lane = tl.arange(0, TILE_Y * TILE_X)[None, None, :, None]
    y = (tile_y * TILE_Y + lane // TILE_X) * R
    x = tile_x * TILE_X + lane % TILE_X
    masks += n * m_sn + (group * K * K).to(tl.int64) * m_sc
    grad += n * g_sn + (group * channels).to(tl.int64) * g_sc
    out += n * o_sn + (group * channels).to(tl.int64) * o_sc
    for start in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, channels), BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)[None, :, None, None]
        has_channel = c < channels
        pointers = grad + c.to(tl.int64) * g_sc
        acc = tl.zeros((R, BLOCK_C, TILE_Y * TILE_X, SP), _accumulator(grad.dtype.element_ty))
        for d in range(1 - R, K):
            for a in range(S):
                if K <= _UNROLLED:
                    for v in tl.static_range(K):
                        acc = _features_tap(
                            acc, pointers, masks, d, v, y + pad, x + pad, r, a, b, rows, columns, has_channel,
                            g_sh, g_sw, m_sc, m_sh, m_sw, K, S, T, SP, EVEN_C,
                        )  # fmt: skip
                else:
                    for v in range(K):
                        acc = _features_tap(
                            acc, pointers, masks, d, v, y + pad, x + pad, r, a, b, rows, columns, has_channel,
                            g_sh, g_sw, m_sc, m_sh, m_sw, K, S, T, SP, EVEN_C,
                        )  # fmt: skip
        result = tl.sum(acc, axis=3)
        row = y + r
        inside = (row < height) & (x < width) & has_channel
        target = out + (c.to(tl.int64) * o_sc + row.to(tl.int64) * o_sh + x * o_sw)
        tl.store(target, result.to(out.dtype.element_ty)[:, :, :, None], mask=inside)


@triton.jit
def _masks_channel(
    acc, grad, features, c, channels, g_sc, f_sc, taps, inside, has_result, WHOLE: tl.constexpr, EVEN_C: tl.constexpr
):
    has_channel = c < channels
    value = _load(grad + c.to(tl.int64) * g_sc, has_result, has_channel, False, EVEN_C)
    feature = _load(features + c.to(tl.int64) * f_sc + taps, inside, has_channel, WHOLE, EVEN_C)
    return acc + feature.to(acc.dtype) * value.to(acc.dtype)


@triton.jit(do_not_specialize=["pad"])
def _backward_masks(
    grad, features, out, groups, channels, height, width, rows, columns, pad,
    g_sn, g_sc, g_sh, g_sw, f_sn, f_sc, f_sh, f_sw, o_sn, o_sc, o_sh, o_sw,
    K: tl.constexpr, S: tl.constexpr, T: tl.constexpr, SP: tl.constexpr, TAPS: tl.constexpr, BLOCK_C: tl.constexpr,
    TILE_Y: tl.constexpr, TILE_X: tl.constexpr, EVEN_C: tl.constexpr,
):  # fmt: skip
    """A program: TAPS taps at TILE centres, over all channels of a group; tile (TAPS, A, C, TILE, B).

    A gradient is loaded once for the taps, a feature once for its centre's s*s results. BLOCK_C warps share the
    channels, and their sums are added at the end.
    """
    chunk, tile_y, tile_x, group, n = _decode(groups, K * K, rows, columns, TAPS, TILE_Y, TILE_X)
    tap = chunk * TAPS + tl.arange(0, TAPS)[:, None, None, None, None]
    a = tl.arange(0, SP)[None, :, None, None, None]
    lane = tl.arange(0, TILE_Y * TILE_X)[None, None, None, :, None]
    b = tl.arange(0, SP)[None, None, None, None, :]
    y = tile_y * TILE_Y + lane // TILE_X
    x = tile_x * TILE_X + lane % TILE_X
    has_result = (y < rows) & (x < columns) & (a < S) & (b < S)
    i = (y * S + a).to(tl.int64)
    j = x * S + b
    y = y * T - pad  # the feature under tap (0, 0)
    x = x * T - pad
    u = tap // K
    v = tap % K
    inside = (tap < K * K) & (y + u >= 0) & (y + u < height) & (x + v >= 0) & (x + v < width)
    taps = u * f_sh + v * f_sw
    grad += n * g_sn + (group * channels).to(tl.int64) * g_sc + (i * g_sh + j * g_sw)
    features += n * f_sn + (group * channels).to(tl.int64) * f_sc + (y.to(tl.int64) * f_sh + x * f_sw)
    acc = tl.zeros((TAPS, SP, BLOCK_C, TILE_Y * TILE_X, SP), _accumulator(grad.dtype.element_ty))
    for start in range(0, channels, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)[None, None, :, None, None]
        acc = _masks_channel(acc, grad, features, c, channels, g_sc, f_sc, taps, inside, has_result, False, EVEN_C)
    result = tl.sum(acc, axis=2)
    tap = chunk * TAPS + tl.arange(0, TAPS)[:, None, None, None]
    a = tl.arange(0, SP)[None, :, None, None]
    lane = tl.arange(0, TILE_Y * TILE_X)[None, None, :, None]
    b = tl.arange(0, SP)[None, None, None, :]
    y = tile_y * TILE_Y + lane // TILE_X
    x = tile_x * TILE_X + lane % TILE_X
    target = out + (n * o_sn + (group * K * K + tap).to(tl.int64) * o_sc)
    target += (y * S + a).to(tl.int64) * o_sh + (x * S + b) * o_sw
    stored = (tap < K * K) & (y < rows) & (x < columns) & (a < S) & (b < S)
    tl.store(target, result.to(out.dtype.element_ty), mask=stored)


def carafe(
    features: Tensor, masks: Tensor, kernel_size: int, group_size: int, scale_factor: int, stride: int
) -> Tensor:
    """(N, C, H, W), (N, G*k*k, H*s/t, W*s/t) -> (N, C, H*s/t, W*s/t)."""
    n, c, height, width = features.shape
    out = empty((n, c, *masks.shape[2:]), like=features)
    channels, rows, columns = c // group_size, masks.shape[2] // scale_factor, masks.shape[3] // scale_factor
    sp = triton.next_power_of_2(scale_factor)
    tile_y, tile_x = _tile(rows, columns, 128)
    block_c = _block(channels, max(1, 16 * 4 // sp**2))
    chunk = block_c * 4
    programs = n * group_size * triton.cdiv(rows, tile_y) * triton.cdiv(columns, tile_x) * triton.cdiv(channels, chunk)
    with torch.cuda.device_of(features):
        _forward[(programs,)](
            features, masks, out, group_size, channels, height, width, rows, columns, kernel_size // 2,
            *features.stride(), *masks.stride(), *out.stride(),
            K=kernel_size, S=scale_factor, T=stride, SP=sp, CHUNK=chunk, BLOCK_C=block_c, TILE_Y=tile_y, TILE_X=tile_x,
            EVEN_C=channels % block_c == 0, num_warps=4,
        )  # fmt: skip
    return out


def carafe_backward_features(
    grad: Tensor,
    masks: Tensor,
    height: int,
    width: int,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
    stride: int,
) -> Tensor:
    """(N, C, H*s/t, W*s/t), (N, G*k*k, H*s/t, W*s/t) -> (N, C, H, W)."""
    n, c = grad.shape[:2]
    out = empty((n, c, height, width), like=grad)
    channels, rows, columns = c // group_size, grad.shape[2] // scale_factor, grad.shape[3] // scale_factor
    sp = triton.next_power_of_2(scale_factor)
    r = 4
    tile_y, tile_x = _tile(triton.cdiv(height, r), width, 128)
    block_c = _block(channels, max(1, 8 * 2 // sp))
    chunk = block_c * 4
    programs = n * group_size * triton.cdiv(triton.cdiv(height, r), tile_y) * triton.cdiv(width, tile_x)
    with torch.cuda.device_of(grad):
        _backward_features[(programs * triton.cdiv(channels, chunk),)](
            grad, masks, out, group_size, channels, height, width, rows, columns, kernel_size // 2,
            *grad.stride(), *masks.stride(), *out.stride(),
            K=kernel_size, S=scale_factor, T=stride, SP=sp, R=r, CHUNK=chunk, BLOCK_C=block_c,
            TILE_Y=tile_y, TILE_X=tile_x, EVEN_C=channels % block_c == 0, num_warps=4,
        )  # fmt: skip
    return out


def carafe_backward_masks(
    grad: Tensor, features: Tensor, kernel_size: int, group_size: int, scale_factor: int, stride: int
) -> Tensor:
    """(N, C, H*s/t, W*s/t), (N, C, H, W) -> (N, G*k*k, H*s/t, W*s/t)."""
    n, c, height, width = features.shape
    taps = kernel_size**2
    out = empty((n, group_size * taps, *grad.shape[2:]), like=grad)
    channels, rows, columns = c // group_size, grad.shape[2] // scale_factor, grad.shape[3] // scale_factor
    sp = triton.next_power_of_2(scale_factor)
    tile_y, tile_x = _tile(rows, columns, 32)
    block_taps = min(triton.next_power_of_2(taps), max(1, 32 * 4 // sp**2))
    block_c = 4
    programs = n * group_size * triton.cdiv(rows, tile_y) * triton.cdiv(columns, tile_x) * triton.cdiv(taps, block_taps)
    with torch.cuda.device_of(grad):
        _backward_masks[(programs,)](
            grad, features, out, group_size, channels, height, width, rows, columns, kernel_size // 2,
            *grad.stride(), *features.stride(), *out.stride(),
            K=kernel_size, S=scale_factor, T=stride, SP=sp, TAPS=block_taps, BLOCK_C=block_c,
            TILE_Y=tile_y, TILE_X=tile_x, EVEN_C=channels % block_c == 0, num_warps=4,
        )  # fmt: skip
    return out


def _tile(rows: int, columns: int, size: int) -> tuple[int, int]:
    """A tile of ``size`` threads: a warp wide where the map is, and never much wider than the map."""
    tile_x = min(32, size, triton.next_power_of_2(columns))
    return size // tile_x, tile_x


def _block(channels: int, most: int) -> int:
    """The channels a thread holds: a power of two, no more than there are."""
    return min(most, triton.next_power_of_2(channels))
