"""CARAFE in Metal: launches the kernels of carafe.metal; ``omniops.ops.carafe`` has the formula.

The kernels read and write contiguous tensors. Inputs of another layout are copied, and so is the result where the
first argument is channels_last.
"""

from torch import Tensor

from omniops.backends import empty, memory_format
from omniops.backends.mps._library import library

# These stand in carafe.metal too, which says what they are.
CHANNELS = 8
ROWS = 4
TAPS = 4
SIMD = 32
DOUBLING_KERNEL_SIZES = (3, 5)

# A simdgroup is 16 wide and 2 high, so that the rows that it reads overlap; the simdgroups of a threadgroup differ in
# their channels, so that they find each other's masks in the cache.
GROUP = (16, 2, 8)

# carafe_backward_masks_doubling splits the channels among lanes until there are this many simdgroups, or MAX_SPLITS.
ENOUGH_SIMDGROUPS = 4096
MAX_SPLITS = 8


def carafe(
    features: Tensor, masks: Tensor, kernel_size: int, group_size: int, scale_factor: int, stride: int
) -> Tensor:
    """(N, C, H, W), (N, G*k*k, H*s/t, W*s/t) -> (N, C, H*s/t, W*s/t)."""
    n, c, h, w = features.shape
    rows, columns = masks.shape[2:]
    check_sizes(features=features.shape, masks=masks.shape)
    doubling = _doubling(c, h, w, group_size, kernel_size, scale_factor, stride)
    blocks = n * group_size * _blocks(c // group_size, CHANNELS)
    return _launch(
        f"carafe{doubling}",
        (features, masks),
        (n, c, rows, columns),
        [n * group_size, c // group_size, h, w, kernel_size, scale_factor, _narrowed(stride, h, w)],
        threads=((w + 1) // 2, h, blocks) if doubling else (columns, rows, blocks),
        group_size=GROUP,
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
    doubling = _doubling(c, height, width, group_size, kernel_size, scale_factor, stride)
    blocks = n * group_size * _blocks(c // group_size, CHANNELS)
    return _launch(
        f"carafe_backward_features{doubling}",
        (grad, masks),
        shape,
        [n * group_size, c // group_size, height, width, kernel_size, scale_factor, _narrowed(stride, height, width)],
        threads=((width + 1) // 2, _blocks(height, ROWS), blocks) if doubling else (width, height, blocks),
        group_size=GROUP,
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
    if doubling := _doubling(c, h, w, group_size, kernel_size, scale_factor, stride):
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
        group = GROUP
    name = f"carafe_backward_masks{doubling}"
    return _launch(name, (grad, features), shape, sizes, threads=threads, group_size=group)


def check_sizes(**shapes: tuple[int, ...]) -> None:
    """Raise ValueError for a shape (N, C, H, W) whose planes, or whose number of planes, the kernels cannot index.

    They take 32-bit offsets within the planes of eight channels and 64-bit ones beyond: the number of elements as a
    whole has no limit.
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


def _doubling(c: int, h: int, w: int, group_size: int, kernel_size: int, scale_factor: int, stride: int) -> str:
    """What the name of the kernels made for this case has more than the general ones', empty where there are none."""
    served = kernel_size in DOUBLING_KERNEL_SIZES and (scale_factor, stride) == (2, 1)
    if not served or c // group_size < CHANNELS or h * w >= 2**25:
        return ""
    return f"_doubling_k{kernel_size}_{'odd' if w % 2 else 'even'}"


def _launch(
    name: str,
    inputs: tuple[Tensor, Tensor],
    shape: tuple[int, ...],
    sizes: list[int],
    threads: tuple[int, int, int],
    group_size: tuple[int, int, int],
) -> Tensor:
    first, second = (_aligned(tensor) for tensor in inputs)
    out = empty(shape, like=first)
    kernel = getattr(library("carafe", first.dtype), name)
    kernel(first, second, out, sizes, threads=threads, group_size=group_size, arg_casts={3: "int32"})
    return out.contiguous(memory_format=memory_format(inputs[0]))


def _aligned(tensor: Tensor) -> Tensor:
    """Contiguous, from a multiple of four elements on, as the kernels' vector loads want it."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.storage_offset() % 4 else tensor


def _blocks(length: int, block: int) -> int:
    return (length + block - 1) // block
