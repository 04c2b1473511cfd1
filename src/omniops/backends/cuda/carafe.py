"""CARAFE in Triton: chooses and launches the kernels; ``omniops.ops.carafe`` has the formula.

What bounds CARAFE on these GPUs is less the bytes of the device's memory than the loads through the L1 cache: with
k = 5 and s = 2 every feature takes part in a hundred products. So each kernel keeps its results in registers, walks the
k*k taps (or the channels), and shares a loaded value among as many products as the registers allow. A result belongs to
one program, whose order of summation is fixed: no atomics, the same bits every run.

``_carafe_any`` holds the kernels for every case, ``_carafe_pairs`` the faster ones of the common case. The sizes of
tiles and the limits on registers below were measured on an H200: docs/benchmarks.md.

What a kernel is compiled for is the same for all sizes of map: dtypes, k, s and t, how tensors lie, whether they begin
at a multiple of 16 bytes, and what the channels of a group fill. Only beyond 2**31 elements of an image is it another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from omniops.backends import memory_format, prepared
from omniops.backends.cuda import _carafe_any, _carafe_pairs
from omniops.backends.cuda._grid import cdiv, next_power_of_2
from omniops.backends.cuda._launch import Launch, on_device


@prepared
def carafe(
    features: Tensor, masks: Tensor, kernel_size: int, group_size: int, scale_factor: int, stride: int
) -> Callable[..., Tensor]:
    """(N, C, H, W), (N, G*k*k, H*s/t, W*s/t) -> (N, C, H*s/t, W*s/t)."""
    numbers = kernel_size, group_size, scale_factor, stride
    if _is_copied(features) or _is_copied(masks):
        run_dense = carafe.prepare(_dense(features), _dense(masks), *numbers)
        return lambda features, masks, *_: run_dense(_dense(features), _dense(masks))
    out = _result((*features.shape[:2], *masks.shape[2:]), like=features)
    shape, strides = tuple(out.shape), out.stride()
    launch = _forward(features, masks, out, *numbers)

    def run(features: Tensor, masks: Tensor, *_: int) -> Tensor:
        out = features.new_empty_strided(shape, strides)
        with on_device(features) as stream:
            launch(stream, features, masks, out)
        return out

    return run


@prepared
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
) -> Callable[..., tuple[Tensor, Tensor]]:
    """The gradients of features, where ``masks`` is given, and of masks, where ``features`` is; else no elements."""
    numbers = kernel_size, group_size, scale_factor, stride
    if any(tensor is not None and _is_copied(tensor) for tensor in (grad, features, masks)):
        run_dense = carafe_backward.prepare(_dense(grad), _dense(features), _dense(masks), height, width, *numbers)
        return lambda grad, features, masks, *_: run_dense(_dense(grad), _dense(features), _dense(masks))
    n, c, *resolution = grad.shape
    by_features = _result((n, c, height, width), like=grad)
    by_masks = _result((n, group_size * kernel_size**2, *resolution), like=grad)
    of_features, of_masks = (tuple(by_features.shape), by_features.stride()), (tuple(by_masks.shape), by_masks.stride())
    to_features = None if masks is None else _backward_features(grad, masks, by_features, *numbers)
    to_masks = None if features is None else _backward_masks(grad, features, by_masks, *numbers)

    def run(grad: Tensor, features: Tensor | None, masks: Tensor | None, *_: int) -> tuple[Tensor, Tensor]:
        with on_device(grad) as stream:
            if masks is None or to_features is None:
                by_features = grad.new_empty(0)
            else:
                by_features = grad.new_empty_strided(*of_features)
                to_features(stream, grad, masks, by_features)
            if features is None or to_masks is None:
                by_masks = grad.new_empty(0)
            else:
                by_masks = grad.new_empty_strided(*of_masks)
                to_masks(stream, grad, features, by_masks)
        return by_features, by_masks

    return run


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
    result: Tensor = carafe_backward(grad, None, masks, height, width, kernel_size, group_size, scale_factor, stride)[0]
    return result


def carafe_backward_masks(
    grad: Tensor, features: Tensor, kernel_size: int, group_size: int, scale_factor: int, stride: int
) -> Tensor:
    """(N, C, H*s/t, W*s/t), (N, C, H, W) -> (N, G*k*k, H*s/t, W*s/t)."""
    height, width = features.shape[2:]
    result: Tensor = carafe_backward(
        grad, features, None, height, width, kernel_size, group_size, scale_factor, stride
    )[1]
    return result


def _forward(
    features: Tensor, masks: Tensor, out: Tensor, kernel_size: int, group_size: int, scale_factor: int, stride: int
) -> Launch:
    n, c, height, width = features.shape
    channels, rows, columns = c // group_size, masks.shape[2] // scale_factor, masks.shape[3] // scale_factor
    if _in_pairs(kernel_size, scale_factor, stride, fine=(features,), coarse=(masks, out)):
        warps, block_c = 2, 8 if features.dtype == torch.float64 else 16
        grid, shift = _grid(n * group_size * cdiv(channels, _carafe_pairs.BLOCKS.value * block_c), height, width)
        return Launch(
            _carafe_pairs.forward, grid, group_size, channels, height, width, shift,
            _in_vectors(fine=(features,), coarse=(masks, out)),
            *features.stride()[:3], *masks.stride()[:3], *out.stride()[:3],
            K=kernel_size, WARPS=warps, CHANNELS=block_c, TILE=_PAIRS, EVEN_C=channels % block_c == 0,
            WIDE=_wide(features, masks, out), num_warps=warps, maxnreg=168,
        )  # fmt: skip
    lines = scale_factor if scale_factor <= 4 else 1
    by_channel = _order(out) > 0
    warps, lanes, sums = (4, 4, 16) if by_channel else (2, 32, 32)
    tile_y, tile_x = _tile(lanes)
    block_c = _block(channels, sums * 32 * warps // (lanes * next_power_of_2(lines * scale_factor)))
    chunk = block_c if by_channel else 8 * block_c
    parts = cdiv(channels, chunk) * (scale_factor // lines)
    programs = n * group_size * cdiv(rows, tile_y) * cdiv(columns, tile_x) * parts
    return Launch(
        _carafe_any.forward, (programs,), group_size, channels, height, width, rows, columns, kernel_size // 2,
        *features.stride(), *masks.stride(), *out.stride(),
        K=kernel_size, S=scale_factor, T=stride, ROWS=lines, CHUNK=chunk, BLOCK_C=block_c,
        TILE_Y=tile_y, TILE_X=tile_x, EVEN_C=channels % block_c == 0, PAIRS=scale_factor == 2 and out.stride(3) == 1,
        F_ORDER=_order(features), M_ORDER=_order(masks), O_ORDER=_order(out),
        WIDE=_wide(features, masks, out), num_warps=warps,
    )  # fmt: skip


def _backward_features(
    grad: Tensor, masks: Tensor, out: Tensor, kernel_size: int, group_size: int, scale_factor: int, stride: int
) -> Launch:
    n, c, height, width = out.shape
    channels, rows, columns = c // group_size, grad.shape[2] // scale_factor, grad.shape[3] // scale_factor
    r = _carafe_pairs.ROWS.value
    if _in_pairs(kernel_size, scale_factor, stride, fine=(out,), coarse=(grad, masks)):
        warps, block_c = 4, 16 if grad.dtype == torch.float64 else 32
        grid, shift = _grid(n * group_size * cdiv(channels, block_c), cdiv(height, r), width)
        return Launch(
            _carafe_pairs.backward_features, grid, group_size, channels, height, width, shift,
            _in_vectors(fine=(out,), coarse=(grad, masks)),
            *grad.stride()[:3], *masks.stride()[:3], *out.stride()[:3],
            K=kernel_size, WARPS=warps, CHANNELS=block_c, TILE=_PAIRS, EVEN_C=channels % block_c == 0,
            WIDE=_wide(grad, masks, out), num_warps=warps,
            maxnreg=128 if grad.element_size() == 2 and kernel_size <= 5 else 168,
        )  # fmt: skip
    sp = next_power_of_2(scale_factor)
    by_channel = _order(out) > 0
    warps, lanes = (2, 4) if by_channel else (4, 64)
    tile_y, tile_x = _tile(max(1, lanes // sp))
    block_c = _block(channels, 128 if by_channel else 16)
    chunk = block_c if by_channel else 4 * block_c
    programs = n * group_size * cdiv(height, tile_y * r) * cdiv(width, tile_x) * cdiv(channels, chunk)
    return Launch(
        _carafe_any.backward_features, (programs,), group_size, channels, height, width, rows, columns,
        kernel_size // 2, *grad.stride(), *masks.stride(), *out.stride(),
        K=kernel_size, S=scale_factor, T=stride, SP=sp, R=r, CHUNK=chunk, BLOCK_C=block_c,
        TILE_Y=tile_y, TILE_X=tile_x, EVEN_C=channels % block_c == 0,
        G_ORDER=_order(grad), M_ORDER=_order(masks), O_ORDER=_order(out),
        WIDE=_wide(grad, masks, out), num_warps=warps,
    )  # fmt: skip


def _backward_masks(
    grad: Tensor, features: Tensor, out: Tensor, kernel_size: int, group_size: int, scale_factor: int, stride: int
) -> Launch:
    n, c, height, width = features.shape
    channels, rows, columns = c // group_size, grad.shape[2] // scale_factor, grad.shape[3] // scale_factor
    if _in_pairs(kernel_size, scale_factor, stride, fine=(features,), coarse=(grad, out)):
        warps, block_c = 2, 8
        grid, shift = _grid(n * group_size * 2 * kernel_size // warps, height, width)
        return Launch(
            _carafe_pairs.backward_masks, grid, group_size, channels, height, width, shift,
            _in_vectors(fine=(features,), coarse=(grad, out)),
            *grad.stride()[:3], *features.stride()[:3], *out.stride()[:3],
            K=kernel_size, WARPS=warps, CHANNELS=block_c, TILE=_PAIRS, EVEN_C=channels % block_c == 0,
            WIDE=_wide(grad, features, out), num_warps=warps, maxnreg=128,
        )  # fmt: skip
    lines = scale_factor if scale_factor <= 4 else 1
    taps = min(kernel_size**2, max(1, 10 // lines))
    by_channel = _order(grad) > 0
    tile_y, tile_j = _tile(4 if by_channel else 32)
    block_c = _block(channels, 32) if by_channel else 1
    parts = cdiv(kernel_size**2, taps) * (scale_factor // lines)
    programs = n * group_size * cdiv(rows, tile_y) * cdiv(columns * scale_factor, tile_j) * parts
    return Launch(
        _carafe_any.backward_masks, (programs,), group_size, channels, height, width, rows, columns, kernel_size // 2,
        *grad.stride(), *features.stride(), *out.stride(),
        K=kernel_size, S=scale_factor, T=stride, ROWS=lines, TAPS=taps, BLOCK_C=block_c,
        TILE_Y=tile_y, TILE_J=tile_j, EVEN_C=channels % block_c == 0,
        G_ORDER=_order(grad), F_ORDER=_order(features), O_ORDER=_order(out),
        WIDE=_wide(grad, features, out), num_warps=1,
    )  # fmt: skip


_PAIRS = 32
"""The pairs of centres or pixels of a tile of ``_carafe_pairs``: one for each thread of a warp."""


def _in_pairs(
    kernel_size: int, scale_factor: int, stride: int, fine: tuple[Tensor, ...], coarse: tuple[Tensor, ...]
) -> bool:
    """Whether ``_carafe_pairs`` serves: twofold upsampling, stored row by row, results and weights in pairs."""
    return (
        (kernel_size <= 7 and scale_factor == 2 and stride == 1)
        and all(tensor.stride(3) == 1 for tensor in (*fine, *coarse))
        and all(_is_multiple(tensor, 2) for tensor in coarse)
    )


def _in_vectors(fine: tuple[Tensor, ...], coarse: tuple[Tensor, ...]) -> int:
    """Whether all pairs of pixels and quads of results lie alike in memory, so that each is loaded at once.

    If their first element does not lie so, Triton compiles the kernel without such loads.
    """
    return int(all(_is_multiple(tensor, 2) for tensor in fine) and all(_is_multiple(tensor, 4) for tensor in coarse))


def _is_multiple(tensor: Tensor, of: int) -> bool:
    """Whether the elements of a row, and the strides of the other axes, are."""
    return tensor.shape[3] % of == 0 and all(stride % of == 0 for stride in tensor.stride()[:3])


def _grid(parts: int, rows: int, width: int) -> tuple[tuple[int], int]:
    """The programs of ``_carafe_pairs``, ``parts`` for each tile, and log2 of the pairs beside each other in a tile.

    They are 16 where the map has them, as a square tile reads fewer borders.
    """
    tile_x = min(16 if rows > 1 else 32, next_power_of_2(cdiv(width, 2)))
    return (parts * cdiv(rows, _PAIRS // tile_x) * cdiv(width, 2 * tile_x),), tile_x.bit_length() - 1


def _order(tensor: Tensor) -> int:
    """How the kernels of ``_carafe_any`` are to know a tensor.

    -1: its columns are neighbours; 1 or more: its channels are, and its other strides multiples of that number, which
    for a dense tensor depends on the channels alone; 0: neither.
    """
    n, c, h, w = tensor.stride()
    if w == 1:
        return -1
    return math.gcd(16, n, h, w) if c == 1 else 0


def _result(shape: Sequence[int], like: Tensor) -> Tensor:
    """A result, without memory: what is known of it before it is made."""
    layout = memory_format(like)
    return torch.empty(tuple(shape), dtype=like.dtype, device="meta", memory_format=layout)


def _wide(*tensors: Tensor) -> bool:
    """Whether offsets need 64 bits within an image too; in 32 the kernels are faster."""
    return any(
        sum((size - 1) * step for size, step in zip(tensor.shape[1:], tensor.stride()[1:], strict=True)) >= 2**31
        for tensor in tensors
    )


def _is_copied(tensor: Tensor) -> bool:
    """Whether a row spans more than the kernels' 32-bit columns reach, or repeats an element.

    The latter is the gradient of a sum. It is rare elsewhere, and would need kernels of its own.
    """
    return tensor.shape[3] * tensor.stride(3) >= 2**31 or (tensor.stride(3) == 0 and tensor.shape[3] > 1)


def _dense(tensor: Tensor | None) -> Tensor | None:
    """The tensor, copied where the kernels want it so."""
    return tensor.contiguous() if tensor is not None and _is_copied(tensor) else tensor


def _tile(size: int) -> tuple[int, int]:
    """Rows and columns of a tile of ``size`` lanes: up to 16 wide, as a square tile reads fewer borders.

    It is the same for maps that are smaller, for which another kernel would have to be compiled.
    """
    tile_x = min(16, size)
    return size // tile_x, tile_x


def _block(channels: int, most: int) -> int:
    """The channels of a tile: a power of two, no more than there are."""
    return max(1, min(most, next_power_of_2(channels)))
