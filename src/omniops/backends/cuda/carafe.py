"""CARAFE in Triton: chooses and launches the kernels; ``omniops.ops.carafe`` has the formula.

What bounds CARAFE on these GPUs is less the bytes of the device's memory than the loads through the L1 cache: with
k = 5 and s = 2 every feature takes part in a hundred products. So each kernel keeps its results in registers, walks the
k*k taps (or the channels), and shares a loaded value among as many products as the registers allow. A result belongs to
one program, whose order of summation is fixed: no atomics, the same bits every run.

``_carafe_any`` holds the kernels for every case, ``_carafe_pairs`` the faster ones of the common case. The sizes of
tiles and the limits on registers below were measured on an H200: docs/benchmarks.md.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from omniops.backends import empty
from omniops.backends.cuda import _carafe_any, _carafe_pairs
from omniops.backends.cuda._grid import cdiv, next_power_of_2


def carafe(
    features: Tensor, masks: Tensor, kernel_size: int, group_size: int, scale_factor: int, stride: int
) -> Tensor:
    """(N, C, H, W), (N, G*k*k, H*s/t, W*s/t) -> (N, C, H*s/t, W*s/t)."""
    n, c, height, width = features.shape
    out = empty((n, c, *masks.shape[2:]), like=features)
    channels, rows, columns = c // group_size, masks.shape[2] // scale_factor, masks.shape[3] // scale_factor
    if _in_pairs(kernel_size, scale_factor, stride, fine=(features,), coarse=(masks, out)):
        tile_y, tile_x = _tile(height, width // 2, 32)
        warps, block_c = 2, 8
        chunk = 2 * warps * block_c
        programs = n * group_size * cdiv(height, tile_y) * cdiv(width, 2 * tile_x)
        with torch.cuda.device_of(features):
            _carafe_pairs.forward[(programs * cdiv(channels, chunk),)](
                features, masks, out, group_size, channels, height, width // 2, (kernel_size // 2 + 1) // 2, 0,
                *_divided(features, 2), *_divided(masks, 4), *_divided(out, 4),
                K=kernel_size, WARPS=warps, CHUNK=chunk, BLOCK_C=block_c, TILE_Y=tile_y, TILE_X=tile_x,
                EVEN_C=channels % (warps * block_c) == 0, WIDE=_wide(features, masks, out), num_warps=warps,
                maxnreg=168,
            )  # fmt: skip
        return out
    features, masks = _addressable(features), _addressable(masks)
    lines = scale_factor if scale_factor <= 4 else 1
    by_channel = out.stride(1) == 1  # channels_last
    warps, lanes, sums = (4, 4, 16) if by_channel else (2, 32, 32)
    tile_y, tile_x = _tile(rows, columns, lanes)
    block_c = _block(channels, sums * 32 * warps // (lanes * next_power_of_2(lines * scale_factor)))
    chunk = block_c if by_channel else 8 * block_c
    parts = cdiv(channels, chunk) * (scale_factor // lines)
    programs = n * group_size * cdiv(rows, tile_y) * cdiv(columns, tile_x) * parts
    with torch.cuda.device_of(features):
        _carafe_any.forward[(programs,)](
            features, masks, out, group_size, channels, height, width, rows, columns, kernel_size // 2,
            *features.stride(), *masks.stride(), *out.stride(),
            K=kernel_size, S=scale_factor, T=stride, ROWS=lines, CHUNK=chunk, BLOCK_C=block_c,
            TILE_Y=tile_y, TILE_X=tile_x, EVEN_C=channels % block_c == 0,
            PAIRS=scale_factor == 2 and out.stride(3) == 1, WIDE=_wide(features, masks, out), num_warps=warps,
        )  # fmt: skip
    return out


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
    """The gradients of features, where ``masks`` is given, and of masks, where ``features`` is; else no elements."""
    sizes = kernel_size, group_size, scale_factor, stride
    return (
        grad.new_empty(0) if masks is None else carafe_backward_features(grad, masks, height, width, *sizes),
        grad.new_empty(0) if features is None else carafe_backward_masks(grad, features, *sizes),
    )


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
    r = 2
    if _in_pairs(kernel_size, scale_factor, stride, fine=(out,), coarse=(grad, masks)):
        tile_y, tile_x = _tile(cdiv(height, r), width // 2, 32)
        warps, block_c = 4, 8
        programs = n * group_size * cdiv(height, tile_y * r) * cdiv(width, 2 * tile_x)
        with torch.cuda.device_of(grad):
            _carafe_pairs.backward_features[(programs * cdiv(channels, warps * block_c),)](
                grad, masks, out, group_size, channels, height, width // 2, 0,
                *_divided(grad, 4), *_divided(masks, 4), *_divided(out, 2),
                K=kernel_size, R=r, WARPS=warps, BLOCK_C=block_c, TILE_Y=tile_y, TILE_X=tile_x,
                EVEN_C=channels % (warps * block_c) == 0, WIDE=_wide(grad, masks, out), num_warps=warps, maxnreg=168,
            )  # fmt: skip
        return out
    grad, masks = _addressable(grad), _addressable(masks)
    sp = next_power_of_2(scale_factor)
    by_channel = out.stride(1) == 1
    warps, lanes = (2, 4) if by_channel else (4, 64)
    tile_y, tile_x = _tile(cdiv(height, r), width, max(1, lanes // sp))
    block_c = _block(channels, 128 if by_channel else 16)
    chunk = block_c if by_channel else 4 * block_c
    programs = n * group_size * cdiv(height, tile_y * r) * cdiv(width, tile_x)
    with torch.cuda.device_of(grad):
        _carafe_any.backward_features[(programs * cdiv(channels, chunk),)](
            grad, masks, out, group_size, channels, height, width, rows, columns, kernel_size // 2,
            *grad.stride(), *masks.stride(), *out.stride(),
            K=kernel_size, S=scale_factor, T=stride, SP=sp, R=r, CHUNK=chunk, BLOCK_C=block_c,
            TILE_Y=tile_y, TILE_X=tile_x, EVEN_C=channels % block_c == 0, WIDE=_wide(grad, masks, out), num_warps=warps,
        )  # fmt: skip
    return out


def carafe_backward_masks(
    grad: Tensor, features: Tensor, kernel_size: int, group_size: int, scale_factor: int, stride: int
) -> Tensor:
    """(N, C, H*s/t, W*s/t), (N, C, H, W) -> (N, G*k*k, H*s/t, W*s/t)."""
    n, c, height, width = features.shape
    out = empty((n, group_size * kernel_size**2, *grad.shape[2:]), like=grad)
    channels, rows, columns = c // group_size, grad.shape[2] // scale_factor, grad.shape[3] // scale_factor
    if _in_pairs(kernel_size, scale_factor, stride, fine=(features,), coarse=(grad, out)):
        tile_y, tile_x = _tile(height, width // 2, 32)
        warps = 2
        units = n * group_size * cdiv(height, tile_y) * cdiv(width, 2 * tile_x) * 2 * kernel_size
        with torch.cuda.device_of(grad):
            _carafe_pairs.backward_masks[(cdiv(units, warps),)](
                grad, features, out, n, group_size, channels, height, width // 2, (kernel_size // 2 + 1) // 2, 0,
                *_divided(grad, 4), *_divided(features, 2), *_divided(out, 4),
                K=kernel_size, WARPS=warps, BLOCK_C=math.gcd(channels, 8), TILE_Y=tile_y, TILE_X=tile_x,
                WIDE=_wide(grad, features, out), num_warps=warps, maxnreg=128,
            )  # fmt: skip
        return out
    grad, features = _addressable(grad), _addressable(features)
    lines = scale_factor if scale_factor <= 4 else 1
    taps = min(kernel_size**2, max(1, 10 // lines))
    by_channel = grad.stride(1) == 1
    tile_y, tile_j = _tile(rows, columns * scale_factor, 4 if by_channel else 32)
    block_c = _block(channels, 32) if by_channel else 1
    parts = cdiv(kernel_size**2, taps) * (scale_factor // lines)
    programs = n * group_size * cdiv(rows, tile_y) * cdiv(columns * scale_factor, tile_j) * parts
    with torch.cuda.device_of(grad):
        _carafe_any.backward_masks[(programs,)](
            grad, features, out, group_size, channels, height, width, rows, columns, kernel_size // 2,
            *grad.stride(), *features.stride(), *out.stride(),
            K=kernel_size, S=scale_factor, T=stride, ROWS=lines, TAPS=taps, BLOCK_C=block_c,
            TILE_Y=tile_y, TILE_J=tile_j, EVEN_C=channels % block_c == 0, WIDE=_wide(grad, features, out), num_warps=1,
        )  # fmt: skip
    return out


def _in_pairs(
    kernel_size: int, scale_factor: int, stride: int, fine: tuple[Tensor, ...], coarse: tuple[Tensor, ...]
) -> bool:
    """Whether ``_carafe_pairs`` serves: twofold upsampling, pairs of pixels and quads of results aligned in memory."""
    return (
        (kernel_size <= 7 and scale_factor == 2 and stride == 1)
        and all(_aligned(tensor, 2) for tensor in fine)
        and all(_aligned(tensor, 4) for tensor in coarse)
    )


def _aligned(tensor: Tensor, count: int) -> bool:
    *strides, last = tensor.stride()
    return (
        last == 1
        and tensor.shape[3] % count == 0
        and all(stride % count == 0 for stride in strides)
        and tensor.data_ptr() % (count * tensor.element_size()) == 0
    )


def _divided(tensor: Tensor, by: int) -> tuple[int, ...]:
    """The strides of N, C and H, divided by what they are known to be multiples of."""
    return tuple(stride // by for stride in tensor.stride()[:3])


def _wide(*tensors: Tensor) -> bool:
    """Whether offsets need 64 bits within an image too; in 32 the kernels are faster."""
    return any(
        sum((size - 1) * step for size, step in zip(tensor.shape[1:], tensor.stride()[1:], strict=True)) >= 2**31
        for tensor in tensors
    )


def _addressable(tensor: Tensor) -> Tensor:
    """The tensor, copied if a row of it spans more than the kernels' 32-bit columns reach."""
    return tensor if tensor.shape[3] * tensor.stride(3) < 2**31 else tensor.contiguous()


def _tile(rows: int, columns: int, size: int) -> tuple[int, int]:
    """Rows and columns of a tile of ``size`` lanes: 16 wide where the map is, as a square tile reads fewer borders."""
    tile_x = min(16 if rows > 1 else 32, size, next_power_of_2(columns))
    return size // tile_x, tile_x


def _block(channels: int, most: int) -> int:
    """The channels of a tile: a power of two, no more than there are."""
    return max(1, min(most, next_power_of_2(channels)))
