"""CARAFE in Triton: the launches of its kernels for arguments of given shapes and layouts."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor

from omniops.backends.cuda import _carafe_any, _carafe_pairs, _carafe_tuning
from omniops.backends.cuda._carafe_tuning import MAX_LINES, PAIRS, PairsTile
from omniops.backends.cuda._grid import cdiv, next_power_of_2
from omniops.backends.cuda._launch import Launch


class Settings(NamedTuple):
    """The operator's numbers."""

    kernel_size: int
    group_size: int
    scale_factor: int
    stride: int


def forward(features: Tensor, masks: Tensor, out: Tensor, settings: Settings) -> Launch:
    """``out`` from features and masks."""
    n, c, height, width = features.shape
    _, group_size, scale_factor, _ = settings
    channels = c // group_size
    if _in_pairs(settings, fine=features, coarse=(masks, out)):
        tile = _carafe_tuning.FORWARD_PAIRS[features.element_size()]
        chunks = n * group_size * cdiv(channels, _carafe_pairs.BLOCKS.value * tile.channels)
        return _launch_pairs(
            _carafe_pairs.forward, tile, chunks, height, (features, masks, out), features, (masks, out), settings
        )
    by_channel = _order(out) > 0
    tuning = _carafe_tuning.FORWARD_CHANNELS_LAST if by_channel else _carafe_tuning.FORWARD
    lines = scale_factor if scale_factor <= MAX_LINES else 1
    tile_y, tile_x = _tile(tuning.lanes)
    sums = tuning.sums * 32 * tuning.warps
    block_c = _block(channels, sums // (tuning.lanes * next_power_of_2(lines * scale_factor)))
    chunk = tuning.steps * block_c
    rows, columns = masks.shape[2] // scale_factor, masks.shape[3] // scale_factor
    programs = n * group_size * cdiv(rows, tile_y) * cdiv(columns, tile_x)
    return _launch_any(
        _carafe_any.forward, programs * cdiv(channels, chunk) * (scale_factor // lines), tuning.warps,
        {"F": features, "M": masks, "O": out}, (channels, height, width, rows, columns), settings,
        ROWS=lines, CHUNK=chunk, BLOCK_C=block_c, TILE_Y=tile_y, TILE_X=tile_x, EVEN_C=channels % block_c == 0,
        PAIRS=scale_factor == 2 and out.stride(3) == 1,
    )  # fmt: skip


def backward_features(grad: Tensor, masks: Tensor, out: Tensor, settings: Settings) -> Launch:
    """``out``, the gradient of features."""
    n, c, height, width = out.shape
    kernel_size, group_size, scale_factor, _ = settings
    channels = c // group_size
    rows_of_thread = _carafe_pairs.ROWS.value
    if _in_pairs(settings, fine=out, coarse=(grad, masks)):
        table = (
            _carafe_tuning.BACKWARD_FEATURES_PAIRS if kernel_size <= 5 else _carafe_tuning.BACKWARD_FEATURES_PAIRS_WIDE
        )
        tile = table[grad.element_size()]
        return _launch_pairs(
            _carafe_pairs.backward_features, tile, n * group_size * cdiv(channels, tile.channels),
            cdiv(height, rows_of_thread), (grad, masks, out), out, (grad, masks), settings,
        )  # fmt: skip
    by_channel = _order(out) > 0
    tuning = _carafe_tuning.BACKWARD_FEATURES_CHANNELS_LAST if by_channel else _carafe_tuning.BACKWARD_FEATURES
    padded_scale = next_power_of_2(scale_factor)
    tile_y, tile_x = _tile(max(1, tuning.lanes // padded_scale))
    block_c = _block(channels, tuning.channels)
    chunk = tuning.steps * block_c
    rows, columns = grad.shape[2] // scale_factor, grad.shape[3] // scale_factor
    programs = n * group_size * cdiv(height, tile_y * rows_of_thread) * cdiv(width, tile_x)
    return _launch_any(
        _carafe_any.backward_features, programs * cdiv(channels, chunk), tuning.warps,
        {"G": grad, "M": masks, "O": out}, (channels, height, width, rows, columns), settings,
        SP=padded_scale, R=rows_of_thread, CHUNK=chunk, BLOCK_C=block_c, TILE_Y=tile_y, TILE_X=tile_x,
        EVEN_C=channels % block_c == 0,
    )  # fmt: skip


def backward_masks(grad: Tensor, features: Tensor, out: Tensor, settings: Settings) -> Launch:
    """``out``, the gradient of masks."""
    n, c, height, width = features.shape
    kernel_size, group_size, scale_factor, _ = settings
    channels = c // group_size
    if _in_pairs(settings, fine=features, coarse=(grad, out)):
        tile = _carafe_tuning.BACKWARD_MASKS_PAIRS
        return _launch_pairs(
            _carafe_pairs.backward_masks, tile, n * group_size * 2 * kernel_size // tile.warps, height,
            (grad, features, out), features, (grad, out), settings,
        )  # fmt: skip
    by_channel = _order(grad) > 0
    tuning = _carafe_tuning.BACKWARD_MASKS_CHANNELS_LAST if by_channel else _carafe_tuning.BACKWARD_MASKS
    lines = scale_factor if scale_factor <= MAX_LINES else 1
    taps = min(kernel_size**2, max(1, _carafe_tuning.BACKWARD_MASKS_SUMS // lines))
    tile_y, tile_j = _tile(tuning.lanes)
    block_c = _block(channels, tuning.channels)
    rows, columns = grad.shape[2] // scale_factor, grad.shape[3] // scale_factor
    programs = n * group_size * cdiv(rows, tile_y) * cdiv(columns * scale_factor, tile_j)
    return _launch_any(
        _carafe_any.backward_masks, programs * cdiv(kernel_size**2, taps) * (scale_factor // lines), tuning.warps,
        {"G": grad, "F": features, "O": out}, (channels, height, width, rows, columns), settings,
        ROWS=lines, TAPS=taps, BLOCK_C=block_c, TILE_Y=tile_y, TILE_J=tile_j, EVEN_C=channels % block_c == 0,
    )  # fmt: skip


def _launch_pairs(
    kernel: Any,
    tile: PairsTile,
    programs_of_tile: int,
    rows: int,
    tensors: tuple[Tensor, Tensor, Tensor],
    fine: Tensor,
    coarse: tuple[Tensor, Tensor],
    settings: Settings,
) -> Launch:
    """Of a kernel of ``_carafe_pairs``, whose tiles cover so many rows; ``tensors`` are as it takes them."""
    _, c, height, width = fine.shape
    channels = c // settings.group_size
    # 16 pairs beside each other where the map has them, as a square tile reads fewer borders.
    tile_x = min(16 if rows > 1 else 32, next_power_of_2(cdiv(width, 2)))
    return Launch(
        kernel, (programs_of_tile * cdiv(rows, PAIRS // tile_x) * cdiv(width, 2 * tile_x),),
        settings.group_size, channels, height, width, tile_x.bit_length() - 1, _in_vectors(fine, coarse),
        *(stride for tensor in tensors for stride in tensor.stride()[:3]),
        K=settings.kernel_size, WARPS=tile.warps, CHANNELS=tile.channels, TILE=PAIRS,
        EVEN_C=channels % tile.channels == 0, WIDE=_wide(*tensors), num_warps=tile.warps, maxnreg=tile.max_registers,
    )  # fmt: skip


def _launch_any(
    kernel: Any,
    programs: int,
    warps: int,
    tensors: dict[str, Tensor],
    sizes: tuple[int, int, int, int, int],
    settings: Settings,
    **constants: int,
) -> Launch:
    """Of a kernel of ``_carafe_any``; ``sizes`` are its channels, height, width, rows and columns."""
    kernel_size, group_size, scale_factor, stride = settings
    orders = {f"{name}_ORDER": _order(tensor) for name, tensor in tensors.items()}
    return Launch(
        kernel, (programs,), group_size, *sizes, kernel_size // 2,
        *(stride for tensor in tensors.values() for stride in tensor.stride()),
        K=kernel_size, S=scale_factor, T=stride, **constants, **orders, WIDE=_wide(*tensors.values()), num_warps=warps,
    )  # fmt: skip


def _in_pairs(settings: Settings, fine: Tensor, coarse: tuple[Tensor, ...]) -> bool:
    """Whether ``_carafe_pairs`` serves: twofold upsampling, stored row by row, results and weights in pairs."""
    return (
        (settings.kernel_size <= 7 and settings.scale_factor == 2 and settings.stride == 1)
        and all(tensor.stride(3) == 1 for tensor in (fine, *coarse))
        and all(_is_multiple(tensor, 2) for tensor in coarse)
    )


def _in_vectors(fine: Tensor, coarse: tuple[Tensor, ...]) -> int:
    """Whether all pairs of pixels and quads of results lie alike in memory, so that each is loaded at once.

    If their first element does not lie so, Triton compiles the kernel without such loads.
    """
    return int(_is_multiple(fine, 2) and all(_is_multiple(tensor, 4) for tensor in coarse))


def _is_multiple(tensor: Tensor, divisor: int) -> bool:
    """Whether the elements of a row, and the strides of the other axes, are."""
    return tensor.shape[3] % divisor == 0 and all(stride % divisor == 0 for stride in tensor.stride()[:3])


def _order(tensor: Tensor) -> int:
    """How the kernels of ``_carafe_any`` are to know a tensor.

    -1: its columns are neighbours; 1 or more: its channels are, and its other strides multiples of that number, which
    for a dense tensor depends on the channels alone; 0: neither.
    """
    n, c, h, w = tensor.stride()
    if w == 1:
        return -1
    return math.gcd(16, n, h, w) if c == 1 else 0


def _wide(*tensors: Tensor) -> bool:
    """Whether offsets need 64 bits within an image too; in 32 the kernels are faster."""
    return any(
        sum((size - 1) * step for size, step in zip(tensor.shape[1:], tensor.stride()[1:], strict=True)) >= 2**31
        for tensor in tensors
    )


def _tile(size: int) -> tuple[int, int]:
    """Rows and columns of a tile of ``size`` lanes: up to 16 wide, as a square tile reads fewer borders.

    It is the same for maps that are smaller, for which another kernel would have to be compiled.
    """
    tile_x = min(16, size)
    return size // tile_x, tile_x


def _block(channels: int, limit: int) -> int:
    """The channels of a tile: a power of two, no more than there are."""
    return max(1, min(limit, next_power_of_2(channels)))
