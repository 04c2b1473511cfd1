"""Connected components in Triton: launches the kernels; ``omniops.ops.connected_components`` says what they compute.

Six launches whatever the masks hold, and no look at a result in between: the host never waits, and a CUDA graph can
record them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from omniops.backends import as_signed, empty
from omniops.backends.cuda import _connected_components as kernels
from omniops.backends.cuda._grid import cdiv

# Words of 32 pixels of a program. A lane waits for the longest way of its program, so a warp is best alone.
_WORDS, _WARPS = 32, 1
# And of the two kernels that see every pixel.
_PIXEL_WORDS, _PIXEL_WARPS = 32, 4


def connected_components(mask: Tensor, connectivity: int) -> tuple[Tensor, Tensor]:
    """(N, 1, H, W) -> labels and counts, (N, 1, H, W), int32."""
    n, _, height, width = mask.shape
    check_sizes(mask.shape)
    labels, counts = (empty(mask.shape, like=mask, dtype=torch.int32) for _ in range(2))
    mask = as_signed(mask).contiguous()
    words = cdiv(width, 32)
    bits = torch.empty((n, height, words), dtype=torch.int32, device=mask.device)
    sizes = height, width, words
    diagonals = connectivity == 8
    grid = (n * cdiv(height * words, _WORDS),)
    pixel_grid = (n * cdiv(height * words, _PIXEL_WORDS),)
    by_word = {"BLOCK": _WORDS, "num_warps": _WARPS}
    by_pixel = {"BLOCK": _PIXEL_WORDS, "num_warps": _PIXEL_WARPS}
    with torch.cuda.device_of(mask):
        kernels.pack_mask[pixel_grid](mask, bits, *sizes, **by_pixel)
        kernels.link_runs[grid](bits, labels, counts, *sizes, DIAGONALS=diagonals, **by_word)
        kernels.flatten_runs[grid](bits, labels, counts, *sizes, COUNT=False, **by_word)
        kernels.merge_runs[grid](bits, labels, *sizes, DIAGONALS=diagonals, **by_word)
        kernels.flatten_runs[grid](bits, labels, counts, *sizes, COUNT=True, **by_word)
        kernels.write_result[pixel_grid](bits, labels, counts, *sizes, **by_pixel)
    return labels, counts


def check_sizes(mask: Sequence[int]) -> None:
    """Raise ValueError for masks that are more programs than a grid has."""
    n, _, height, width = mask
    words = min(_WORDS, _PIXEL_WORDS)
    if n * cdiv(height * cdiv(width, 32), words) >= 2**31:
        raise ValueError(
            f"mask must have N * ceil(H * ceil(W / 32) / {words}) below 2**31 on CUDA, got shape {tuple(mask)}: "
            "cut the batch into parts"
        )
