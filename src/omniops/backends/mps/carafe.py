"""CARAFE in Metal: launches the kernels of both its sources; ``omniops.ops.carafe`` has the formula.

The kernels read and write contiguous tensors. Inputs of another layout are copied, and so is the result where the
first argument is channels_last.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from omniops.backends import empty, memory_format
from omniops.backends.mps._library import library

# These stand in the Metal sources too, which say what they are.
CHANNELS = 8
ROWS = 2
TAPS = 4
SIMD = 32
DOUBLING_KERNEL_SIZES = (3, 5)

# Tensors of so many elements go to the general kernels that take 64-bit offsets.
WIDE_ELEMENTS = 2**31

# carafe_backward_masks_doubling splits the channels among lanes until there are this many simdgroups, or MAX_SPLITS.
ENOUGH_SIMDGROUPS = 8192
MAX_SPLITS = 8


def carafe(
    features: Tensor, masks: Tensor, kernel_size: int, group_size: int, scale_factor: int, stride: int
) -> Tensor:
    """(N, C, H, W), (N, G*k*k, H*s/t, W*s/t) -> (N, C, H*s/t, W*s/t)."""
    n, c, h, w = features.shape
    rows, columns = masks.shape[2:]
    shape = (n, c, rows, columns)
    check_sizes(features=features.shape, masks=masks.shape)
    variant = _variant((features.shape, masks.shape, shape), c, w, group_size, kernel_size, scale_factor, stride)
    doubling = _doubling(variant)
    own = forward_channels(features.dtype) if doubling else CHANNELS
    blocks = n * group_size * _blocks(c // group_size, own)
    return _launch(
        "carafe",
        variant,
        (features, masks),
        shape,
        [n * group_size, c // group_size, h, w, kernel_size, scale_factor, _narrowed(stride, h, w)],
        threads=((w + 1) // 2, h, blocks) if doubling else (columns, rows, blocks),
        group_size=_group(blocks),
    )


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
    """The gradients of features, which take ``masks``, and of masks; without elements where None was given."""
    sizes = (kernel_size, group_size, scale_factor, stride)
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
    shape = (n, c, height, width)
    check_sizes(grad=grad.shape, masks=masks.shape, features=shape)
    variant = _variant((grad.shape, masks.shape, shape), c, width, group_size, kernel_size, scale_factor, stride)
    doubling = _doubling(variant)
    blocks = n * group_size * _blocks(c // group_size, CHANNELS)
    return _launch(
        "carafe_backward_features",
        variant,
        (grad, masks),
        shape,
        [n * group_size, c // group_size, height, width, kernel_size, scale_factor, _narrowed(stride, height, width)],
        threads=((width + 1) // 2, _blocks(height, ROWS), blocks) if doubling else (width, height, blocks),
        group_size=_group(blocks),
    )


def carafe_backward_masks(
    grad: Tensor, features: Tensor, kernel_size: int, group_size: int, scale_factor: int, stride: int
) -> Tensor:
    """(N, C, H*s/t, W*s/t), (N, C, H, W) -> (N, G*k*k, H*s/t, W*s/t)."""
    n, c, h, w = features.shape
    rows, columns = grad.shape[2:]
    shape = (n, group_size * kernel_size**2, rows, columns)
    check_sizes(grad=grad.shape, features=features.shape, masks=shape)
    groups = n * group_size
    sizes = [groups, c // group_size, h, w]
    variant = _variant((grad.shape, features.shape, shape), c, w, group_size, kernel_size, scale_factor, stride)
    if _doubling(variant):
        pairs = (w + 1) // 2 * h
        splits = 1
        while splits < MAX_SPLITS and pairs * splits * kernel_size * groups < ENOUGH_SIMDGROUPS * SIMD:
            splits *= 2
        sizes += [splits]
        threads = (_blocks(pairs, SIMD // splits) * SIMD, kernel_size, groups)
        group = (SIMD, kernel_size, 1)
    else:
        sizes += [kernel_size, scale_factor, _narrowed(stride, h, w)]
        threads = (columns, rows, groups * kernel_size * _blocks(kernel_size, TAPS))
        group = _group(threads[2])
    return _launch("carafe_backward_masks", variant, (grad, features), shape, sizes, threads=threads, group_size=group)


def check_sizes(**shapes: tuple[int, ...]) -> None:
    """Raise ValueError for a shape (N, C, H, W) whose planes, or whose number of planes, the kernels cannot index.

    They take 32-bit offsets within the planes of eight channels, and 64-bit ones where a tensor needs these: the number
    of elements as a whole has no limit.
    """
    for name, shape in shapes.items():
        n, c, h, w = shape
        if h * w >= 2**28:
            raise ValueError(f"{name} must have H * W below 2**28 on MPS, got shape {tuple(shape)}")
        if n * c >= 2**31:
            raise ValueError(f"{name} must have N * C below 2**31 on MPS, got shape {tuple(shape)}")


def _narrowed(stride: int, height: int, width: int) -> int:
    """A stride of the same result that 32 bits hold: where one centre is left, no larger stride leaves fewer."""
    return min(stride, max(height, width))


def forward_channels(dtype: torch.dtype) -> int:
    """The channels that a thread of carafe owns in carafe_doubling.metal: FORWARD_CHANNELS there."""
    return 4 if dtype == torch.float32 else 8


def _variant(
    shapes: Sequence[Sequence[int]],
    channels: int,
    width: int,
    group_size: int,
    kernel_size: int,
    scale_factor: int,
    stride: int,
) -> str:
    """What the name of an operator's kernel has after its own, for tensors of these shapes (N, C, H, W)."""
    # A kernel's offset may go on to planes behind the last, where it reads nothing.
    if any((n * c + MAX_SPLITS) * h * w >= WIDE_ELEMENTS for n, c, h, w in shapes):
        return "_wide"
    served = kernel_size in DOUBLING_KERNEL_SIZES and (scale_factor, stride) == (2, 1)
    if not served or channels // group_size < CHANNELS:
        return ""
    return f"_k{kernel_size}_{'odd' if width % 2 else 'even'}"


def _doubling(variant: str) -> bool:
    """Whether it is one of carafe_doubling.metal."""
    return variant.startswith("_k")


def _group(blocks: int) -> tuple[int, int, int]:
    """Threads of a group for a grid of columns, rows and blocks of channels, which share their masks in the cache.

    Half a simdgroup is 16 neighbours in a row. The other half is the next block, where there are blocks to spare, so
    that both load the same masks at once, else the next row.
    """
    return (16, 1, 8) if blocks >= 8 else (16, 2, 4)


def _launch(
    operator: str,
    variant: str,
    inputs: tuple[Tensor, Tensor],
    shape: tuple[int, ...],
    sizes: list[int],
    threads: tuple[int, int, int],
    group_size: tuple[int, int, int],
) -> Tensor:
    first, second = (_aligned(tensor) for tensor in inputs)
    out = empty(shape, like=first)
    source = "carafe_doubling" if _doubling(variant) else "carafe"
    kernel = getattr(library(source, first.dtype), f"{operator}{variant}")
    kernel(first, second, out, sizes, threads=threads, group_size=group_size, arg_casts={3: "int32"})
    return out.contiguous(memory_format=memory_format(inputs[0]))


def _aligned(tensor: Tensor) -> Tensor:
    """Contiguous, from a multiple of four elements on, as the kernels' vector loads want it."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.storage_offset() % 4 else tensor


def _blocks(length: int, block: int) -> int:
    return (length + block - 1) // block
