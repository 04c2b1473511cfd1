"""Connected components in Triton: launches the kernels; ``omniops.ops.connected_components`` says what they compute.

Six launches whatever the masks hold, and no look at a result in between: the host never waits, and a CUDA graph can
record them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from omniops.backends import as_signed, prepared
from omniops.backends.cuda import _connected_components as kernels
from omniops.backends.cuda._grid import cdiv
from omniops.backends.cuda._launch import Launch, on_device

# Words of 32 pixels of a program. A lane waits for the longest way of its program, so a warp is best alone.
_WORDS, _WARPS = 32, 1
# And of the two kernels that see every pixel.
_PIXEL_WORDS, _PIXEL_WARPS = 32, 4


@prepared
def connected_components(mask: Tensor, connectivity: int) -> Callable[[Tensor, int], tuple[Tensor, Tensor]]:
    """(N, 1, H, W) -> labels and counts, (N, 1, H, W), int32."""
    check_sizes(mask.shape)
    shape = mask.shape
    n, _, height, width = shape
    words = height * cdiv(width, 32)
    strides = height * width, height * width, width, 1
    is_signed_and_contiguous = mask.dtype.is_signed and mask.is_contiguous()
    diagonals = int(connectivity == 8)

    def by_word(kernel: object, flag: int) -> Launch:
        return Launch(kernel, (n * cdiv(words, _WORDS),), height, width, flag, BLOCK=_WORDS, num_warps=_WARPS)

    def by_pixel(kernel: object) -> Launch:
        grid = (n * cdiv(words, _PIXEL_WORDS),)
        return Launch(kernel, grid, height, width, 0, BLOCK=_PIXEL_WORDS, num_warps=_PIXEL_WARPS)

    pack, write = by_pixel(kernels.pack_mask), by_pixel(kernels.write_result)
    link, merge = by_word(kernels.link_runs, diagonals), by_word(kernels.merge_runs, diagonals)
    flatten, flatten_and_count = (by_word(kernels.flatten_runs, count) for count in (0, 1))

    def run(mask: Tensor, _: int) -> tuple[Tensor, Tensor]:
        if not is_signed_and_contiguous:
            mask = as_signed(mask).contiguous()
        labels = mask.new_empty_strided(shape, strides, dtype=torch.int32)
        counts = torch.empty_like(labels)
        bits = labels.new_empty((n * words,))
        with on_device(labels) as stream:
            pack(stream, mask, bits, counts)
            link(stream, bits, labels, counts)
            flatten(stream, bits, labels, counts)
            merge(stream, bits, labels, counts)
            flatten_and_count(stream, bits, labels, counts)
            write(stream, bits, labels, counts)
        return labels, counts

    return run


def check_sizes(mask: Sequence[int]) -> None:
    """Raise ValueError for masks that are more programs than a grid has."""
    n, _, height, width = mask
    words = min(_WORDS, _PIXEL_WORDS)
    if n * cdiv(height * cdiv(width, 32), words) >= 2**31:
        raise ValueError(
            f"mask must have N * ceil(H * ceil(W / 32) / {words}) below 2**31 on CUDA, got shape {tuple(mask)}: "
            "cut the batch into parts"
        )
